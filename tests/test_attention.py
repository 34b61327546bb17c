"""Attention against float64 numpy: forward, backward, dropout, bf16, the cache."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from reference_bloom import jit

from bloomjax.attention import (
    alibi_scores,
    alibi_slopes,
    document_numbers,
    prefix_last_key,
    xla_attention,
)
from bloomjax.blocked_attention import blocked_attention
from bloomjax.cached_attention import cached_attention
from bloomjax.errors import BadInput

# (head, slope) as _build_alibi_tensor of bigscience-workshop/Megatron-DeepSpeed,
# megatron/model/transformer.py, gives them. BLOOM-176B has 112 heads.
GOLDEN_SLOPES = {
    6: [(0, 0.25), (1, 0.0625), (2, 0.015625), (3, 0.00390625), (4, 0.5), (5, 0.125)],
    16: [
        (0, 0.7071067811865476), (1, 0.5), (2, 0.35355339059327384), (7, 0.0625),
        (14, 0.005524271728019908), (15, 0.00390625),
    ],
    112: [
        (0, 0.9170040432046712), (1, 0.8408964152537145), (31, 0.0625),
        (62, 0.004259795830723658), (63, 0.00390625), (64, 0.9576032806985737),
        (65, 0.8781260801866498), (66, 0.8052451659746274), (100, 0.04232048584177807),
        (111, 0.016316777850428427),
    ],
}  # fmt: skip

NAMES = ("context", "dq", "dk", "dv")
BF16_ROUNDOFF = 2.0**-8  # 8 significant bits, to nearest


def problem(B, L, H, K, dtype=np.float32, seed=0):
    """q, k, v and a cotangent, already rounded to `dtype`, and the slopes."""
    rng = np.random.default_rng(seed)
    arrays = [jnp.asarray(rng.standard_normal((B, L, H, K)), dtype) for _ in range(4)]
    return *arrays, jnp.asarray(alibi_slopes(H), jnp.float32)


def bf16(a):
    return np.asarray(a, np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def reference(q, k, v, g, slopes, drop=1.0, rounding="exact"):
    """Context, dq, dk, dv and the probabilities, which `drop` [B, H, L, L] multiplies."""
    q, k, v, g, slopes = (np.asarray(a, np.float64) for a in (q, k, v, g, slopes))
    L, K = q.shape[1], q.shape[3]
    distance = np.arange(L)[None, :] - np.arange(L)[:, None]
    s = np.einsum("blhk,bshk->bhls", q, k) / np.sqrt(K)
    if rounding == "exact":
        s = s + slopes[:, None, None] * distance
    else:
        s = bf16(s + bf16(slopes[:, None, None] * np.arange(L)))
    s = np.where(distance <= 0, s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    context = np.einsum("bhls,bshk->blhk", p * drop, v)
    dp = np.einsum("blhk,bshk->bhls", g, v) * drop
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) / np.sqrt(K)
    dq = np.einsum("bhls,bshk->blhk", ds, k)
    dk = np.einsum("bhls,blhk->bshk", ds, q)
    dv = np.einsum("bhls,blhk->bshk", p * drop, g)
    return context, dq, dk, dv, p


# Blocks of 8: several of them, and a shorter one, in all problems of this file.
IN_BLOCKS = functools.partial(blocked_attention, block_tokens=8)
KERNELS = pytest.mark.parametrize("kernel", [xla_attention, IN_BLOCKS], ids=["whole", "blocked"])


@functools.partial(jit, static_argnames=("dropout_rate", "rounding", "kernel"))
def forward_and_backward(q, k, v, g, slopes, *, kernel=xla_attention, **options):
    context, pull = jax.vjp(lambda q, k, v: kernel(q, k, v, slopes, **options), q, k, v)
    return context, *pull(g)


@pytest.mark.parametrize("num_heads", GOLDEN_SLOPES)
def test_slopes_are_those_of_megatron(num_heads):
    slopes = alibi_slopes(num_heads)
    assert slopes.shape == (num_heads,) and slopes.dtype == np.float64
    for head, slope in GOLDEN_SLOPES[num_heads]:
        assert slopes[head] == pytest.approx(slope, rel=1e-14)


def test_slopes_need_a_head():
    assert alibi_slopes(1) == pytest.approx([2.0**-8])
    with pytest.raises(BadInput, match="num_heads must be at least 1, got 0"):
        alibi_slopes(0)


def test_the_reference_of_this_file_agrees_with_finite_differences():
    q, k, v, g, slopes = (np.asarray(a, np.float64) for a in problem(1, 5, 4, 8))
    drop = np.random.default_rng(1).integers(0, 2, (1, 4, 5, 5)) * 2.0
    _, *grads, _ = reference(q, k, v, g, slopes, drop)
    rng = np.random.default_rng(2)
    for argument, grad in enumerate(grads):
        direction = rng.standard_normal(q.shape)
        ends = []
        for sign in (1, -1):
            moved = [q, k, v]
            moved[argument] = moved[argument] + sign * 1e-5 * direction
            ends.append(np.sum(g * reference(*moved, g, slopes, drop)[0]))
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(np.sum(grad * direction), rel=1e-8)


@pytest.mark.parametrize(
    ("B", "L", "H", "K"),
    [(2, 33, 4, 64), (2, 17, 6, 80), (1, 65, 4, 96), (1, 261, 6, 128), (3, 1, 4, 64)],
)
@KERNELS
def test_float32_equals_float64(B, L, H, K, kernel):
    arguments = problem(B, L, H, K)
    expected = reference(*arguments)[:4]
    grads = forward_and_backward(*arguments, kernel=kernel)
    for name, got, want in zip(NAMES, grads, expected, strict=True):
        assert got.dtype == jnp.float32
        atol = 2e-6 * max(1, np.abs(want).max())
        np.testing.assert_allclose(got, want, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize(("B", "L", "H", "K"), [(2, 33, 4, 64), (1, 261, 6, 128)])
@KERNELS
def test_bf16_rounds_only_probabilities_and_results(B, L, H, K, kernel):
    arguments = problem(B, L, H, K, jnp.bfloat16)
    context, dq, dk, dv, p = reference(*arguments)
    got = forward_and_backward(*arguments, kernel=kernel)
    assert all(a.dtype == jnp.bfloat16 for a in got)
    got = [np.asarray(a, np.float64) for a in got]
    # Scores, softmax and sums are float32; each probability and then the sum round once to bf16.
    v = np.asarray(arguments[2], np.float64)
    bound = 2 * BF16_ROUNDOFF * np.einsum("bhls,bshk->blhk", p, np.abs(v))
    assert np.all(np.abs(got[0] - context) <= 1.01 * bound + 1e-5)
    # Backward too: one rounding inside and one at the end, here in the mean over all elements.
    for ours, theirs in zip(got[1:], (dq, dk, dv), strict=True):
        assert np.linalg.norm(ours - theirs) <= 2 * BF16_ROUNDOFF * np.linalg.norm(theirs)


def test_bias_is_exact_far_from_the_start():
    """Rounded to bf16, as slope * key position, it is off by up to 4 at position 2047."""
    slopes = alibi_slopes(112)
    q, k = jnp.zeros((1, 1, 112, 8), jnp.bfloat16), jnp.zeros((1, 2048, 112, 8), jnp.bfloat16)
    scores = alibi_scores(q, k, jnp.asarray(slopes, jnp.float32), jnp.array([2047]))
    exact = slopes[:, None] * (np.arange(2048) - 2047)
    np.testing.assert_allclose(scores[0, :, 0], exact, rtol=2e-7)


def test_bf16_hf_rounds_the_bias_and_then_the_sum():
    """By up to 4 each at position 2047 of BLOOM's 112 heads. XLA could drop a cast to bfloat16 and back."""
    slopes, position = alibi_slopes(112), np.arange(2048)
    q = jnp.zeros((1, 1, 112, 16), jnp.bfloat16)
    k = jnp.zeros((1, 2048, 112, 16), jnp.bfloat16)
    rounded = functools.partial(alibi_scores, rounding="bf16_hf")
    bias = jax.jit(rounded)(q, k, jnp.float32(slopes), jnp.array([2047]))[0, :, 0]
    np.testing.assert_array_equal(bias, bf16(slopes[:, None] * position))
    assert 3.9 < np.abs(bias - slopes[:, None] * position).max() <= 4
    # 1 / 4 more for every key, which is lost where numbers are 8 apart.
    scores = jax.jit(rounded)(q + 0.25, k + 0.25, jnp.float32(slopes), jnp.array([2047]))[0, :, 0]
    np.testing.assert_array_equal(scores, bf16(bias + 0.25))
    lost = np.asarray(scores == bias)
    assert lost[0, 1500:].all() and not lost[0, :10].any()
    # Of the valid keys alone, as the number of those before.
    valid = np.ones((1, 2048), bool)
    valid[0, :77] = False
    padded = jax.jit(rounded)(q, k, jnp.float32(slopes), jnp.array([2047]), valid)[0, :, 0]
    np.testing.assert_array_equal(padded[:, 77:], bias[:, :-77])
    assert np.all(padded[:, :77] < -1e29)


@KERNELS
@pytest.mark.parametrize(("B", "L", "H", "K"), [(2, 33, 4, 64), (1, 261, 6, 128)])
def test_bf16_hf_is_the_attention_of_rounded_scores(B, L, H, K, kernel):
    """Backward is that of these probabilities: the rounding has the derivative 1."""
    arguments = problem(B, L, H, K, jnp.bfloat16)
    want = reference(*arguments, rounding="bf16_hf")[:4]
    exact = reference(*arguments)[:4]
    got = forward_and_backward(*arguments, rounding="bf16_hf", kernel=kernel)
    for ours, theirs, other in zip(got, want, exact, strict=True):
        ours = np.asarray(ours, np.float64)
        assert np.linalg.norm(ours - theirs) <= 2 * BF16_ROUNDOFF * np.linalg.norm(theirs)
        # Scores of 8 are rounded by up to 2^-6, those of 128 by 1/2.
        error = np.linalg.norm(ours - other) / np.linalg.norm(other)
        assert error < (0.02 if L == 33 else 0.2)


def test_position_bias_reaches_the_output():
    q, k, v, g, slopes = problem(2, 33, 4, 64)
    biased = np.asarray(forward_and_backward(q, k, v, g, slopes)[0])
    plain = np.asarray(forward_and_backward(q, k, v, g, 0 * slopes)[0])
    np.testing.assert_allclose(plain, reference(q, k, v, g, 0 * slopes)[0], rtol=0, atol=3e-6)
    assert np.all(plain[:, 0] == biased[:, 0])  # the first token has one key
    assert np.all(np.abs(plain - biased)[:, 16:].max((0, 1, 3)) > 0.02)  # of every head


@KERNELS
def test_nothing_flows_back_from_the_future(kernel):
    run = functools.partial(forward_and_backward, kernel=kernel)
    q, k, v, g, slopes = problem(2, 33, 4, 64)
    before = run(q, k, v, g, slopes)[0]
    cut = 20
    q2, k2, v2 = (a.at[:, cut:].add(3.0) for a in (q, k, v))
    after = run(q2, k2, v2, g, slopes)[0]
    assert np.all(np.asarray(before)[:, :cut] == np.asarray(after)[:, :cut])
    assert np.all(np.abs(np.asarray(before - after)[:, cut:]).max(-1) > 0)
    # The gradient of the first outputs alone does not touch later keys and values.
    _, _, dk, dv = run(q, k, v, g.at[:, cut:].set(0), slopes)
    assert np.all(np.asarray(dk)[:, cut:] == 0) and np.all(np.asarray(dv)[:, cut:] == 0)


RATE = 0.25


def dropped_probabilities(dtype, seed, kernel=xla_attention):
    """With unit vectors for values the context is the dropped probabilities: the mask, seen."""
    L = 16
    q, k, _, _, slopes = problem(2, L, 4, L, dtype)
    v = jnp.broadcast_to(jnp.eye(L, dtype=dtype)[None, :, None], (2, L, 4, L))
    context, *_ = forward_and_backward(
        q, k, v, v, slopes, dropout_rate=RATE, dropout_rng=jax.random.key(seed), kernel=kernel
    )
    p = reference(q, k, v, v, slopes)[4]
    return np.asarray(jnp.moveaxis(context, 2, 1), np.float64), p


@KERNELS
def test_dropout_scales_what_it_keeps(kernel):
    dropped, p = dropped_probabilities(jnp.float32, 3, kernel)
    causal = np.broadcast_to(np.tri(16, dtype=bool), p.shape)
    kept = dropped > 0
    np.testing.assert_allclose(dropped[kept], p[kept] / (1 - RATE), rtol=1e-5)
    assert not kept[~causal].any()
    n = causal.sum()
    assert abs(kept.sum() - (1 - RATE) * n) < 4 * np.sqrt(n * RATE * (1 - RATE))
    assert np.all(dropped == dropped_probabilities(jnp.float32, 3, kernel)[0])
    # Rows of the batch, heads and keys draw their own masks.
    other_key = dropped_probabilities(jnp.float32, 4, kernel)[0][0, 0] > 0
    others = kept[0, 0], kept[1, 0], kept[0, 1], other_key
    assert len({mask.tobytes() for mask in others}) == 4


@KERNELS
def test_gradient_with_dropout_uses_the_mask_of_the_forward_pass(kernel):
    dropped, p = dropped_probabilities(jnp.float32, 3, kernel)
    mask = (dropped > 0) / (1 - RATE)
    q, k, _, _, slopes = problem(2, 16, 4, 16)
    _, _, v, g, _ = problem(2, 16, 4, 16, seed=5)
    expected = reference(q, k, v, g, slopes, mask)[:4]
    dropout = {"dropout_rate": RATE, "dropout_rng": jax.random.key(3)}
    got = forward_and_backward(q, k, v, g, slopes, kernel=kernel, **dropout)
    for name, ours, theirs in zip(NAMES, got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6, err_msg=name)


def test_dropout_keeps_the_mean():
    q, k, v, g, slopes = problem(1, 9, 4, 16)
    num = 2000
    draw = jax.vmap(lambda key: xla_attention(q, k, v, slopes, dropout_rate=RATE, dropout_rng=key))
    contexts = np.asarray(jit(draw)(jax.random.split(jax.random.key(0), num)), np.float64)
    error = np.abs(contexts.mean(0) - reference(q, k, v, g, slopes)[0])
    assert np.all(error <= 4.5 * contexts.std(0) / np.sqrt(num))
    assert contexts.std() > 0.1


def test_dropout_keeps_the_mean_in_bf16():
    """Each probability is rounded, but 1 / (1 - rate) is not: else training and evaluation differ."""
    dropped, p = dropped_probabilities(jnp.bfloat16, 3)
    seen = (dropped > 0) & (p > 1e-3)
    ratio = dropped[seen] * (1 - RATE) / p[seen]
    assert np.all(np.abs(ratio - 1) < 2.02 * BF16_ROUNDOFF)
    assert abs(ratio.mean() - 1) < 4.5 * ratio.std() / np.sqrt(seen.sum())


def test_no_dropout_without_a_rate_or_a_key():
    q, k, v, _, slopes = problem(1, 9, 4, 16)

    @jit
    def three(key):
        attend = functools.partial(xla_attention, q, k, v, slopes)
        return attend(), attend(dropout_rng=key), attend(dropout_rate=RATE)

    plain, no_rate, no_key = three(jax.random.key(0))
    assert np.all(plain == no_rate) and np.all(plain == no_key)


def test_cached_attention_equals_full_attention():
    """A left-padded row and a full one: some tokens at once, then one by one; empty slots hold junk."""
    B, L, H, K, slots, padding = 2, 9, 6, 80, 16, 3
    q, k, v, g, slopes = problem(B, L, H, K)
    full = reference(q, k, v, g, slopes)[0][1]
    short = reference(*(a[:1, padding:] for a in (q, k, v, g)), slopes)[0][0]
    rng = np.random.default_rng(9)
    caches = 100 * rng.standard_normal((2, B, slots, H, K)).astype(np.float32)
    valid = np.ones((B, slots), bool)
    valid[0, :padding] = False
    attend = jit(cached_attention)
    outputs, written = [], 0
    q, k, v = (np.asarray(a) for a in (q, k, v))
    for size in (4, *(1,) * (L - 4)):
        end = written + size
        caches[:, :, written:end] = k[:, written:end], v[:, written:end]
        now = q[:, written:end]
        outputs.append(attend(now, *caches, slopes, start=np.int32(written), k_valid_BS=valid))
        written = end
    got = np.concatenate(outputs, axis=1)
    assert got.shape == (B, L, H, K)
    np.testing.assert_allclose(got[1], full, rtol=0, atol=3e-6)
    np.testing.assert_allclose(got[0, padding:], short, rtol=0, atol=3e-6)
    assert np.all(np.isfinite(got))  # a padded query sees no key at all


@pytest.mark.slow
def test_rounded_positions_do_not_count_padding():
    """A row with padding on the left is the row without, but for a few scores midway between two numbers."""
    L, padding = 300, 100
    q, k, v, _, slopes = problem(1, L, 4, 64, jnp.bfloat16)
    alone = xla_attention(*(a[:, padding:] for a in (q, k, v)), slopes, rounding="bf16_hf")
    attend = functools.partial(cached_attention, q, k, v, slopes, start=0, rounding="bf16_hf")
    valid = np.arange(L)[None] >= padding
    got = np.asarray(attend(k_valid_BS=valid)[:, padding:], np.float64)
    assert np.linalg.norm(got - np.asarray(alone, np.float64)) < 1e-3 * np.linalg.norm(got)
    exact = xla_attention(*(a[:, padding:] for a in (q, k, v)), slopes)
    assert np.linalg.norm(got - np.asarray(exact, np.float64)) > 0.01 * np.linalg.norm(got)


def test_blocks_see_documents_and_never_make_all_scores():
    q, k, v, g, slopes = problem(2, 256, 4, 64)
    documents = document_numbers(jnp.asarray(np.random.default_rng(0).integers(0, 30, (2, 256))), 2)
    whole, blocked = (
        forward_and_backward(q, k, v, g, slopes, kernel=kernel, documents_BL=documents)
        for kernel in (xla_attention, IN_BLOCKS)
    )
    for ours, theirs in zip(blocked, whole, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)
    plain = forward_and_backward(q, k, v, g, slopes, kernel=IN_BLOCKS)
    assert np.abs(np.asarray(plain[0] - blocked[0])).max() > 0.1
    texts = []
    for kernel in (xla_attention, functools.partial(blocked_attention, block_tokens=32)):
        texts.append(forward_and_backward.lower(q, k, v, g, slopes, kernel=kernel).as_text())
    made = ["4x256x256xf32" in text for text in texts]  # the scores of all queries with all keys
    assert made == [True, False] and "4x32x256xf32" in texts[1]


@KERNELS
def test_a_prefix_sees_itself(kernel):
    B, L, H, K = 3, 21, 4, 8
    q, k, v, g, slopes = problem(B, L, H, K)
    prefix = jnp.array([0, 1, 13])
    last_key = prefix_last_key(prefix, L)
    np.testing.assert_array_equal(last_key[:2], [range(L), range(L)])  # prefixes of 0 and 1 token
    assert last_key[2].tolist() == [12] * 13 + list(range(13, L))
    found = forward_and_backward(q, k, v, g, slopes, kernel=kernel, last_key_BL=last_key)
    causal = forward_and_backward(q, k, v, g, slopes, kernel=kernel)
    np.testing.assert_allclose(found[0][:2], causal[0][:2], atol=1e-6)
    # Row 2 in float64: bias slope * (key - query) whatever the sign, the square of the prefix open.
    scores = np.einsum("lhk,shk->hls", *(np.asarray(a[2], np.float64) for a in (q, k))) / K**0.5
    scores += np.asarray(slopes, np.float64)[:, None, None] * (np.arange(L) - np.arange(L)[:, None])
    seen = np.tri(L, dtype=bool)
    seen[:13, :13] = True
    p = np.exp(np.where(seen, scores, -np.inf))
    expected = np.einsum("hls,shk->lhk", p / p.sum(-1, keepdims=True), np.asarray(v[2]))
    np.testing.assert_allclose(found[0][2], expected, atol=2e-6)


def test_gradients_of_a_prefix_in_blocks_are_those_of_all_scores():
    q, k, v, g, slopes = problem(2, 45, 4, 16)
    seen = {
        "last_key_BL": prefix_last_key(jnp.array([30, 7]), 45),
        "documents_BL": jnp.cumsum(jnp.arange(45) % 11 == 0)[None].repeat(2, 0),
    }
    whole = forward_and_backward(q, k, v, g, slopes, **seen)
    blocked = forward_and_backward(q, k, v, g, slopes, kernel=IN_BLOCKS, **seen)
    for name, got, want in zip(NAMES, blocked, whole, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6, err_msg=name)
