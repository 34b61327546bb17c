"""Attention with ALiBi: the slopes, the scores and the plain XLA kernel.

Dimension key: B batch, L query length, S key length, H heads, K head_dim. Arrays end in their letters.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from bloomjax.errors import BadInput

ALIBI_ROUNDINGS = ("exact", "bf16_hf")  # see alibi_scores
_MASKED = -1e30  # finite: a row without any visible key (left padding) stays free of NaN
_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
# To a value of bfloat16, in float32. Not a cast and a cast back: XLA may drop such a pair.
_to_bf16 = functools.partial(jax.lax.reduce_precision, exponent_bits=8, mantissa_bits=7)


def alibi_slopes(num_heads: int, rounding: str = "exact") -> np.ndarray:
    """ALiBi's slope of each head, float64 [H].

    Press et al. 2022 (arXiv 2108.12409) give 2^(-8i/n) for n a power of two. For other n BLOOM takes the slopes of
    the next lower power of two, then every second slope of the next higher one (Megatron-DeepSpeed, transformer.py).
    For "bf16_hf" (see alibi_scores) they are powers of float32 numbers: 0.49999997 instead of 2^-1 decides ties.
    """
    if num_heads < 1:
        raise BadInput(f"num_heads must be at least 1, got {num_heads}")
    lower = 2 ** math.floor(math.log2(num_heads))
    base_dtype = np.float64 if rounding == "exact" else np.float32
    base = float(base_dtype(2.0 ** (-(2.0 ** -(math.log2(lower) - 3)))))
    slopes = [base**i for i in range(1, lower + 1)]
    extra_base = float(base_dtype(2.0 ** (-(2.0 ** -(math.log2(2 * lower) - 3)))))
    slopes += [extra_base**i for i in range(1, 2 * (num_heads - lower), 2)]
    return np.array(slopes)


def document_numbers(tokens_BL: jax.Array, document_end_id: int) -> jax.Array:
    """Which document of its row each token belongs to, int32 [B, L]; the token that ends one is its last."""
    is_end_BL = (tokens_BL == document_end_id).astype(jnp.int32)
    return jnp.cumsum(is_end_BL, axis=1) - is_end_BL


def prefix_last_key(prefix_length_B: jax.Array, length: int) -> jax.Array:
    """`last_key_BL` of a prefix LM, int32 [B, L]: tokens of the prefix see all of it, those after it what is before."""
    position_1L = jnp.arange(length, dtype=jnp.int32)[None]
    prefix_B1 = prefix_length_B.astype(jnp.int32)[:, None]
    return jnp.where(position_1L < prefix_B1, prefix_B1 - 1, position_1L)


def alibi_scores(
    q_BLHK: jax.Array,
    k_BSHK: jax.Array,
    slopes_H: jax.Array,
    q_position_L: jax.Array,
    k_valid_BS: jax.Array | None = None,
    rounding: str = "exact",
    documents: tuple[jax.Array, jax.Array] | None = None,
    last_key_BL: jax.Array | None = None,
) -> jax.Array:
    """Masked scores before the softmax, float32 [B, H, L, S]: q.k/sqrt(K) + slope*(key - query position).

    The bias is exact in float32. `rounding="bf16_hf"` is for comparisons only, with transformers in bfloat16 (and, but
    for ties, Megatron-DeepSpeed, which trained BLOOM so): slope*(number of valid keys before), equal up to a row
    constant, is rounded to bfloat16 and so is its sum with q.k, each by up to 4 at position 2047.
    Keys stand at positions 0..S-1; those after the query (or after `last_key_BL`, see `xla_attention`), of another
    document than the query's (`documents` has the numbers of both, [B, L] and [B, S]), and those where `k_valid_BS` is
    False are masked. Distances within a document are what they would be if it stood alone.
    """
    scores_BHLS = _dot("BLHK,BSHK->BHLS", q_BLHK, k_BSHK)
    distance_LS = jnp.arange(k_BSHK.shape[1])[None, :] - q_position_L[:, None]
    if rounding == "exact":
        bias_HLS = slopes_H[:, None, None] * distance_LS.astype(jnp.float32)[None]
        scores_BHLS = scores_BHLS * q_BLHK.shape[-1] ** -0.5 + bias_HLS[None]
    else:
        valid_BS = jnp.ones((1, k_BSHK.shape[1])) if k_valid_BS is None else k_valid_BS
        bias_BHS = _to_bf16(slopes_H[None, :, None] * (jnp.cumsum(valid_BS, axis=1) - 1.0)[:, None])
        scores_BHLS = _to_bf16(scores_BHLS * q_BLHK.shape[-1] ** -0.5 + bias_BHS[:, :, None])
    visible_BLS = (distance_LS <= 0)[None]
    if last_key_BL is not None:
        visible_BLS = jnp.arange(k_BSHK.shape[1])[None, None] <= last_key_BL[:, :, None]
    if documents is not None:
        q_documents_BL, k_documents_BS = documents
        visible_BLS = visible_BLS & (q_documents_BL[:, :, None] == k_documents_BS[:, None, :])
    scores_BHLS = jnp.where(visible_BLS[:, None], scores_BHLS, _MASKED)
    if k_valid_BS is not None:
        scores_BHLS = jnp.where(k_valid_BS[:, None, None, :], scores_BHLS, _MASKED)
    return scores_BHLS


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _xla_attention(rounding, keep_scale, q_BLHK, k_BSHK, v_BSHK, slopes_H, keep_BHLS, seen):
    return _xla_forward(rounding, keep_scale, q_BLHK, k_BSHK, v_BSHK, slopes_H, keep_BHLS, seen)[0]


def _xla_forward(rounding, keep_scale, q_BLHK, k_BSHK, v_BSHK, slopes_H, keep_BHLS, seen):
    block = 0, q_BLHK.shape[1], k_BSHK.shape[1]
    scores_BHLS = block_scores(block, q_BLHK, k_BSHK, slopes_H, rounding, seen)
    p_BHLS = jax.nn.softmax(scores_BHLS, axis=-1).astype(v_BSHK.dtype)
    context_BLHK = context_of(p_BHLS, v_BSHK, keep_BHLS, keep_scale)
    # Named here, where the backward pass takes it from: then a policy that keeps it spares the whole product.
    context_BLHK = checkpoint_name(context_BLHK, "context")
    return context_BLHK, (q_BLHK, k_BSHK, v_BSHK, slopes_H, keep_BHLS, p_BHLS, context_BLHK)


def _xla_backward(_, keep_scale, residuals, g_BLHK):
    q_BLHK, k_BSHK, v_BSHK, slopes_H, keep_BHLS, p_BHLS, context_BLHK = residuals
    grads = attention_grads(
        p_BHLS, q_BLHK, k_BSHK, v_BSHK, context_BLHK, g_BLHK, keep_BHLS, keep_scale
    )
    dq_BLHK, dk_BSHK, dv_BSHK = (grad.astype(q_BLHK.dtype) for grad in grads)
    # The slopes are constants of the architecture, the dropout mask is random, what is seen are whole numbers: not
    # differentiated.
    return dq_BLHK, dk_BSHK, dv_BSHK, jnp.zeros_like(slopes_H), None, None


_xla_attention.defvjp(_xla_forward, _xla_backward)


def block_scores(block, q_BLHK, k_BSHK, slopes_H, rounding, seen):
    """`alibi_scores` of the queries [first, last) of a window with the keys before `end`; the others are masked.

    `seen` is (documents_BL, last_key_BL), each or None.
    """
    first, last, end = block
    documents_BL, last_key_BL = seen
    documents = None
    if documents_BL is not None:
        documents = documents_BL[:, first:last], documents_BL[:, :end]
    if last_key_BL is not None:
        last_key_BL = last_key_BL[:, first:last]
    return alibi_scores(
        q_BLHK[:, first:last], k_BSHK[:, :end], slopes_H, jnp.arange(first, last), rounding=rounding,
        documents=documents, last_key_BL=last_key_BL,
    )  # fmt: skip


def context_of(p_BHLS, v_BSHK, keep_BHLS, keep_scale):
    """`keep_scale` multiplies float32 sums: 1 / 0.9 rounded to bf16 would be 0.16 % off in every element."""
    dropped_BHLS = p_BHLS if keep_BHLS is None else jnp.where(keep_BHLS, p_BHLS, 0)
    return (keep_scale * _dot("BHLS,BSHK->BLHK", dropped_BHLS, v_BSHK)).astype(v_BSHK.dtype)


def attention_grads(p_BHLS, q_BLHK, k_BSHK, v_BSHK, context_BLHK, g_BLHK, keep_BHLS, keep_scale):
    """dq, dk, dv in float32. Matmuls take the compute dtype; autodiff's would be float32 x float32."""
    dropped_BHLS = p_BHLS if keep_BHLS is None else jnp.where(keep_BHLS, p_BHLS, 0)
    dv_BSHK = keep_scale * _dot("BHLS,BLHK->BSHK", dropped_BHLS, g_BLHK)
    dp_BHLS = _dot("BLHK,BSHK->BHLS", g_BLHK, v_BSHK)
    if keep_BHLS is not None:
        dp_BHLS = jnp.where(keep_BHLS, keep_scale * dp_BHLS, 0)
    # Equal to sum_S p dp, but over K instead of S (arXiv 2205.14135, B.2): one pass over the probabilities less.
    delta_BLH = jnp.sum(g_BLHK.astype(jnp.float32) * context_BLHK.astype(jnp.float32), axis=-1)
    ds_BHLS = p_BHLS.astype(jnp.float32) * (dp_BHLS - jnp.moveaxis(delta_BLH, 1, 2)[..., None])
    ds_BHLS = (ds_BHLS * q_BLHK.shape[-1] ** -0.5).astype(q_BLHK.dtype)
    dq_BLHK = _dot("BHLS,BSHK->BLHK", ds_BHLS, k_BSHK)
    dk_BSHK = _dot("BHLS,BLHK->BSHK", ds_BHLS, q_BLHK)
    return dq_BLHK, dk_BSHK, dv_BSHK


def xla_attention(
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
) -> jax.Array:
    """Self-attention with ALiBi on any platform; holds the [B, H, L, S] probabilities.

    Args:
      q_BLHK, k_BSHK, v_BSHK: of one floating dtype, L = S; softmax in float32.
      slopes_H: float32, positive.
      documents_BL: int32, growing along the row: a query sees keys of its own document only. None: all.
      last_key_BL: int32, the position of the last key each query sees, at least its own; None for its own (causal).
        `prefix_last_key` makes it from the length of a prefix.
      rounding: of ALiBi, see `alibi_scores`.
      dropout_rate: of the probabilities, where there is a `dropout_rng`.

    Returns:
      The context [B, L, H, K] in the inputs' dtype.
    """
    keep_BHLS, keep_scale = None, 1.0
    if dropout_rate > 0.0 and dropout_rng is not None:
        B, L, H, _ = q_BLHK.shape
        shape = (B, H, L, k_BSHK.shape[1])
        keep_BHLS = jax.random.bernoulli(dropout_rng, 1.0 - dropout_rate, shape)
        keep_scale = 1.0 / (1.0 - dropout_rate)
    arrays = q_BLHK, k_BSHK, v_BSHK, slopes_H, keep_BHLS, (documents_BL, last_key_BL)
    return _xla_attention(rounding, keep_scale, *arrays)
