"""What may be left out of attention: bounds against scores in float64, and how much it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_bloom import jit

from bloomjax.attention import alibi_slopes, prefix_last_key
from bloomjax.block_skipping import MAX_SKIPPED_SHARE, keep_blocks, needed_blocks

BQ, BK = 32, 16


def arrays(L, H, K, spread, seed=0):
    """q and k whose scores have this standard deviation, and the slopes; float32."""
    rng = np.random.default_rng(seed)
    q, k = np.sqrt(spread) * rng.standard_normal((2, 1, L, H, K))
    return jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32), jnp.asarray(
        alibi_slopes(H), jnp.float32
    )  # fmt: skip


def probabilities(q, k, slopes, seen):
    """float64 [B, H, L, S]."""
    q, k, slopes = (np.asarray(a, np.float64) for a in (q, k, slopes))
    position = np.arange(q.shape[1])
    scores = np.einsum("blhk,bshk->bhls", q, k) / q.shape[3] ** 0.5
    scores += slopes[:, None, None] * (position - position[:, None])
    scores = np.where(seen, scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def spread_out(keep, L):
    """keep [B, H, M, N] for each pair of tokens."""
    return np.repeat(np.repeat(np.asarray(keep), BQ, 2), BK, 3)[:, :, :L, :L]


def adversarial(L, H, K):
    """Scores up to +-50, the largest between far tokens, and keys whose norms grow away from the query."""
    q, k, slopes = arrays(L, H, K, 1.0, seed=1)
    q = q.at[:, -BQ:].multiply(12.0)
    k = k.at[:, :BK].set(50 * K**0.5 * q[:, -1:] / jnp.sum(q[:, -1:] ** 2, -1, keepdims=True))
    return q, k, slopes


@pytest.mark.parametrize("kind", ["trained", "wide", "adversarial"])
def test_what_is_skipped_is_beyond_float32(kind):
    L, H, K = 512, 16, 16
    q, k, slopes = (
        adversarial(L, H, K) if kind == "adversarial"
        else arrays(L, H, K, {"trained": 1.0, "wide": 15.0}[kind])
    )  # fmt: skip
    keep = jit(keep_blocks, static_argnums=(3, 4))(q, k, slopes, BQ, BK)
    p = probabilities(q, k, slopes, np.tri(L, dtype=bool))
    skipped = np.where(spread_out(keep, L), 0, p).sum(-1)
    assert skipped.max() <= MAX_SKIPPED_SHARE
    causal = np.tri(L // BQ * 2, dtype=bool).reshape(L // BQ, 2, -1).any(1)
    share = np.asarray(keep).sum((0, 2, 3)) / causal.sum()  # of each head
    most = {"trained": 0.45, "wide": 0.98, "adversarial": 0.8}  # of slopes 0.7, 0.5, 0.35
    assert share[:3].max() < most[kind]
    assert share[-1] == 1  # slope 1/256: all of 512 tokens count
    if kind == "adversarial":  # the key of a score of 50 is 500 tokens away
        scores = np.einsum("hk,shk->hs", q[0, -1], k[0]) / K**0.5
        assert scores.max() > 49 and keep[0, -1, -1, 0]


def test_the_bound_is_not_idle():
    """A larger share is lost with a threshold an e-fold looser than the stated one, at least in the tight case: one
    norm, own scores at their maximum, far keys at theirs."""
    L, H, K = 512, 1, 8
    q = jnp.ones((1, L, H, K)) * 2.0
    slopes = jnp.array([0.2], jnp.float32)
    keep = np.asarray(keep_blocks(q, q, slopes, BQ, BK))[0, 0]
    first = keep.argmax(1) * BK  # the first key that each block of queries keeps
    threshold = np.log(L / MAX_SKIPPED_SHARE)
    for block in np.flatnonzero(first):
        distance = block * BQ - (first[block] - 1)  # of the nearest pair that is skipped
        assert threshold <= 0.2 * distance < threshold + 0.2 * BK + 0.02  # (1.001: see the code)


def test_without_skipping_only_what_cannot_be_seen_is_left_out():
    L = 128
    q, k, slopes = arrays(L, 2, 8, 1.0)
    seen = np.tri(L, dtype=bool)
    keep = keep_blocks(q, k, slopes, BQ, BK, skip_far_blocks=False)
    assert keep.shape == (1, 1, 4, 8)
    np.testing.assert_array_equal(keep[0, 0], seen.reshape(4, BQ, 8, BK).any((1, 3)))

    documents = jnp.asarray(np.repeat([0, 1, 4], [20, 50, 58]), jnp.int32)[None]
    last_key = prefix_last_key(jnp.array([75]), L)
    keep = keep_blocks(
        q, k, slopes, BQ, BK, documents_BL=documents, last_key_BL=last_key, skip_far_blocks=False
    )
    seen = np.arange(L) <= np.asarray(last_key)[0][:, None]
    seen &= np.asarray(documents)[0] == np.asarray(documents)[0][:, None]
    needed = seen.reshape(4, BQ, 8, BK).any((1, 3))
    assert not np.any(needed & ~np.asarray(keep)[0, 0])
    assert np.asarray(keep).sum() <= needed.sum() + 2  # a block on the border of two documents


def test_ranges_hold_all_that_is_kept_and_both_ways_agree():
    L = 256
    q, k, slopes = arrays(L, 16, 16, 1.0)
    k = k.at[:, 40].multiply(60.0)  # one far key that counts: a hole in what is skipped
    keep = np.asarray(keep_blocks(q, k, slopes, BQ, BK))
    blocks = needed_blocks(q, k, slopes, BQ, BK)
    first, end, q_first, q_end = (np.asarray(a) for a in blocks)
    assert all(a.dtype == np.int32 for a in (first, end, q_first, q_end))
    assert first.shape == (1, 16, 8) and q_first.shape == (1, 16, 16)
    for h in range(16):
        for m in range(8):
            kept = np.flatnonzero(keep[0, h, m])
            assert (first[0, h, m], end[0, h, m]) == (kept[0], kept[-1] + 1)
        for n in range(16):
            kept = np.flatnonzero(keep[0, h, :, n])
            expected = (kept[0], kept[-1] + 1) if len(kept) else (0, 0)
            assert (q_first[0, h, n], q_end[0, h, n]) == expected
    assert len({tuple(f) for f in first[0]}) > 3  # heads differ


def test_nothing_is_skipped_for_what_is_not_finite():
    L = 256
    q, k, slopes = arrays(L, 16, 8, 1.0)
    plain = np.asarray(keep_blocks(q, k, slopes, BQ, BK))
    assert not plain[0, 0, -1, 0]
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        for changed in ((q, k.at[0, 3, 0, 0].set(bad)), (q.at[0, -1, 0, 0].set(bad), k)):
            assert keep_blocks(*changed, slopes, BQ, BK)[0, 0, -1, 0], bad


def test_the_search_costs_no_matrix_of_scores():
    """Of the compiled program: nothing larger than a tenth of [H, L, L] float32."""
    L, H = 2048, 4
    shapes = jax.ShapeDtypeStruct((1, L, H, 64), jnp.float32)
    slopes = jax.ShapeDtypeStruct((H,), jnp.float32)
    compiled = jit(needed_blocks, static_argnums=(3, 4)).lower(shapes, shapes, slopes, 128, 128)
    memory = compiled.compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * H * L * L / 10
