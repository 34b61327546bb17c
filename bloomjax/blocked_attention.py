"""Attention over blocks of queries, for any platform: the scores of one block at a time, in both directions.

Dimension key: B batch, L query length, S key length, H heads, K head_dim. Arrays end in their letters.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bloomjax.attention import attention_grads, block_scores, context_of


def _blocks(length, block_tokens, seen):
    """[first, last) of each block of queries (the last one may be shorter), and the end of the keys it may see."""
    lasts = [(a, min(a + block_tokens, length)) for a in range(0, length, block_tokens)]
    is_causal = seen[1] is None
    return [(first, last, last if is_causal else length) for first, last in lasts]


def _kept(dropout_rate, dropout_rng, block, shape):
    """Which probabilities of a block dropout leaves; the same when asked again."""
    if dropout_rng is None:
        return None
    key = jax.random.fold_in(dropout_rng, block[0])
    return jax.random.bernoulli(key, 1.0 - dropout_rate, shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(options, q_BLHK, k_BSHK, v_BSHK, slopes_H, dropout_rng, seen):
    arrays = q_BLHK, k_BSHK, v_BSHK, slopes_H, dropout_rng, seen
    return _blocked_forward(options, *arrays)[0]


def _blocked_forward(options, q_BLHK, k_BSHK, v_BSHK, slopes_H, dropout_rng, seen):
    rounding, rate, block_tokens = options
    parts = []
    for block in _blocks(q_BLHK.shape[1], block_tokens, seen):
        scores_BHLS = block_scores(block, q_BLHK, k_BSHK, slopes_H, rounding, seen)
        p_BHLS = jax.nn.softmax(scores_BHLS, axis=-1).astype(v_BSHK.dtype)
        keep_BHLS = _kept(rate, dropout_rng, block, p_BHLS.shape)
        context_BLHK = context_of(p_BHLS, v_BSHK[:, : block[2]], keep_BHLS, 1.0 / (1.0 - rate))
        parts.append((context_BLHK, jax.nn.logsumexp(scores_BHLS, axis=-1)))
    contexts, lses = zip(*parts, strict=True)
    context_BLHK = checkpoint_name(jnp.concatenate(contexts, axis=1), "context")
    lse_BHL = checkpoint_name(jnp.concatenate(lses, axis=2), "context")
    arrays = q_BLHK, k_BSHK, v_BSHK, slopes_H, dropout_rng, seen
    return context_BLHK, (*arrays, context_BLHK, lse_BHL)


def _blocked_backward(options, residuals, g_BLHK):
    rounding, rate, block_tokens = options
    *arrays, context_BLHK, lse_BHL = residuals
    q_BLHK, k_BSHK, v_BSHK, slopes_H, dropout_rng, seen = arrays
    dq_blocks = []
    dk_BSHK = dv_BSHK = jnp.zeros(k_BSHK.shape, jnp.float32)
    for block in _blocks(q_BLHK.shape[1], block_tokens, seen):
        first, last, end = block
        queries, keys = slice(first, last), slice(0, end)
        # One block after the other, and none from the scores of a forward pass that was just done again: XLA would keep
        # those of all blocks, 4 GiB a device of BLOOM-176B.
        q_BLHK, k_BSHK, dk_BSHK, dv_BSHK = jax.lax.optimization_barrier(
            (q_BLHK, k_BSHK, dk_BSHK, dv_BSHK)
        )
        scores_BHLS = block_scores(block, q_BLHK, k_BSHK, slopes_H, rounding, seen)
        p_BHLS = jnp.exp(scores_BHLS - lse_BHL[:, :, queries, None]).astype(v_BSHK.dtype)
        dq_block, dk_block, dv_block = attention_grads(
            p_BHLS, q_BLHK[:, queries], k_BSHK[:, keys], v_BSHK[:, keys], context_BLHK[:, queries],
            g_BLHK[:, queries], _kept(rate, dropout_rng, block, p_BHLS.shape),
            1.0 / (1.0 - rate),
        )  # fmt: skip
        dq_blocks.append(dq_block.astype(q_BLHK.dtype))
        dk_BSHK, dv_BSHK = dk_BSHK.at[:, keys].add(dk_block), dv_BSHK.at[:, keys].add(dv_block)
    dq_BLHK = jnp.concatenate(dq_blocks, axis=1)
    dk_BSHK, dv_BSHK = dk_BSHK.astype(k_BSHK.dtype), dv_BSHK.astype(v_BSHK.dtype)
    return dq_BLHK, dk_BSHK, dv_BSHK, jnp.zeros_like(slopes_H), None, None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def blocked_attention(
    q_BLHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    slopes_H: jax.Array,
    *,
    documents_BL: jax.Array | None = None,
    last_key_BL: jax.Array | None = None,
    rounding: str = "exact",
    dropout_rate: float = 0.0,
    dropout_rng: jax.Array | None = None,
    block_tokens: int = 512,
) -> jax.Array:
    """`xla_attention` for blocks of queries, each with the keys before its end: of 2,048 x 2,048 scores it never makes
    3/8, and holds those of one block at a time. The backward pass makes them again from the logsumexp of each query.

    Dropout draws another mask than `xla_attention` does.
    """
    rate, rng = (0.0, None) if dropout_rng is None else (dropout_rate, dropout_rng)
    rng = None if rate == 0.0 else rng
    options = rounding, rate, block_tokens
    seen = documents_BL, last_key_BL
    return _blocked(options, q_BLHK, k_BSHK, v_BSHK, slopes_H, rng, seen)
