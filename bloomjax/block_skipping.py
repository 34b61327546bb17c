"""Which blocks of keys each block of queries needs: those it may see, less those whose share nobody could measure.

ALiBi takes slope * distance from a score, and scores are bounded by norms: beyond some distance the probability of a
key is below what float32 resolves. Long windows of steep heads consist mostly of such keys.

Dimension key: B batch, L queries, S keys, H heads, K head_dim, M blocks of queries, N blocks of keys.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Of a query's probability, all that is skipped together is at most this: half of float32's last bit at 1.
MAX_SKIPPED_SHARE = 2.0**-24


class Blocks(NamedTuple):
    """Ranges [first, end) of block numbers, int32: the keys of a block of queries, the queries of a block of keys.

    Kernels need not look at blocks outside of them. Within them every element is masked as usual.
    """

    key_first_BHM: jax.Array
    key_end_BHM: jax.Array
    query_first_BHN: jax.Array
    query_end_BHN: jax.Array


def needed_blocks(
    q_BLHK: jax.Array,
    k_BSHK: jax.Array,
    slopes_H: jax.Array | None,
    block_q: int,
    block_k: int,
    *,
    documents_BL: jax.Array | None = None,
    last_key_BL: jax.Array | None = None,
    skip_far_blocks: bool = True,
) -> Blocks:
    """The blocks of a self-attention over L = S tokens, a multiple of both block sizes; see `keep_blocks`."""
    keep_BHMN = keep_blocks(
        q_BLHK, k_BSHK, slopes_H, block_q, block_k, documents_BL=documents_BL,
        last_key_BL=last_key_BL, skip_far_blocks=skip_far_blocks,
    )  # fmt: skip
    B, L, H, _ = q_BLHK.shape
    keep_BHMN = jnp.broadcast_to(keep_BHMN, (B, H, L // block_q, L // block_k))
    return Blocks(*_range(keep_BHMN, 3), *_range(keep_BHMN, 2))


def keep_blocks(
    q_BLHK: jax.Array,
    k_BSHK: jax.Array,
    slopes_H: jax.Array | None,
    block_q: int,
    block_k: int,
    *,
    documents_BL: jax.Array | None = None,
    last_key_BL: jax.Array | None = None,
    skip_far_blocks: bool = True,
) -> jax.Array:
    """Whether a block of queries needs a block of keys, bool [B, H, M, N] (B and H may be 1).

    Without `skip_far_blocks`, which needs slopes, it needs every block with a key that one of its queries may see: not
    after `last_key_BL` (int32, the position of the last key of each query, at least its own; None for its own), nor of
    another document (`documents_BL`, int32, growing along the row).

    With it, a block is left out if for each query r, with own score d_r = q_r.k_r / sqrt(K) and bias 0,

        |q_r| max|k| / sqrt(K) + slope * (last key of the block - r) < d_r - ln(S / MAX_SKIPPED_SHARE).

    The left side bounds every score of the block (Cauchy-Schwarz; slopes are positive). Query r sees its own key, so
    that exp(d_r) is at most its sum of exponentials, and each key left out has a probability below
    MAX_SKIPPED_SHARE / S: all of them together below MAX_SKIPPED_SHARE. The context moves by at most twice that, times
    the largest |v|. Nothing is left out for a query or a key that is not finite.
    """
    L, S = q_BLHK.shape[1], k_BSHK.shape[1]
    if last_key_BL is None:
        last_key_BL = jnp.arange(L)[None]
    last_BM1 = jnp.max(_blocks(last_key_BL, 1, block_q), axis=2, keepdims=True)
    first_k_N = block_k * jnp.arange(S // block_k)
    keep = (first_k_N[None, None] <= last_BM1)[:, None]
    if documents_BL is not None:
        q_BMb, k_BNb = _blocks(documents_BL, 1, block_q), _blocks(documents_BL, 1, block_k)
        is_before_BMN = k_BNb.max(2)[:, None] < q_BMb.min(2)[:, :, None]
        is_after_BMN = k_BNb.min(2)[:, None] > q_BMb.max(2)[:, :, None]
        keep = keep & ~(is_before_BMN | is_after_BMN)[:, None]
    if skip_far_blocks:
        keep = keep & ~_is_far(q_BLHK, k_BSHK, slopes_H, block_q, block_k)
    return keep


def _is_far(q_BLHK, k_BSHK, slopes_H, block_q, block_k):
    """bool [B, H, M, N]; False for what is not finite (a maximum of XLA:CPU would lose a NaN)."""
    scale = q_BLHK.shape[-1] ** -0.5
    q, k = (jnp.moveaxis(a.astype(jnp.float32), 2, 1) for a in (q_BLHK, k_BSHK))
    own_BHL = scale * jnp.sum(q * k, axis=-1)
    # A thousandth more than the bound, for what float32 rounds on both sides.
    q_norm_BHL = _finite_or(1e15, (1.001 * scale) * jnp.sqrt(jnp.sum(q * q, axis=-1)))
    k_norm_BHL = _finite_or(1e15, jnp.sqrt(jnp.sum(k * k, axis=-1)))
    k_norm_BHN = jnp.max(_blocks(k_norm_BHL, 2, block_k), axis=3)
    slope_H1 = slopes_H[:, None]
    row_BHL = _finite_or(-1e30, own_BHL) + (slope_H1 * jnp.arange(q.shape[2])[None])[None]
    last_k_N = block_k * (1 + jnp.arange(k.shape[2] // block_k)) - 1
    # The maximum over the rows of a block, one block of keys after the other would do; XLA makes one reduction of it.
    slack_BHMbN = (
        _blocks(q_norm_BHL, 2, block_q)[..., None] * k_norm_BHN[:, :, None, None]
        - _blocks(row_BHL, 2, block_q)[..., None]
    )
    slack_BHMN = jnp.max(slack_BHMbN, axis=3) + (slope_H1 * last_k_N[None])[None, :, None]
    return slack_BHMN < -math.log(k.shape[2] / MAX_SKIPPED_SHARE)


def _finite_or(value, a):
    return jnp.where(jnp.isfinite(a), a, value)


def _blocks(a, axis, block):
    """Splits an axis into [number of blocks, block]."""
    return a.reshape(*a.shape[:axis], -1, block, *a.shape[axis + 1 :])


def _range(keep, axis):
    """First and end of what is kept along an axis; 0 and 0 where nothing is."""
    size = keep.shape[axis]
    first = jnp.argmax(keep, axis=axis)
    end = size - jnp.argmax(jnp.flip(keep, axis), axis=axis)
    return tuple(jnp.where(keep.any(axis), a, 0).astype(jnp.int32) for a in (first, end))
