"""What the kernels that hold no scores have in common: padding, skipped blocks, and the gradient's frame.

A kernel works on blocks of queries and keys, keeps the logsumexp of each query, and makes the scores again for the
gradient (FlashAttention-2, arXiv 2307.08691). ALiBi, causality, documents and prefixes come from positions inside.

Dimension key: B batch, L queries, S keys, H heads, K head_dim, M blocks of queries, N blocks of keys.
"""

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bloomjax.block_skipping import Blocks, needed_blocks


class Inputs(NamedTuple):
    """What a kernel reads. L = S is a multiple of both block sizes.

    q, k, v share one dtype. The score of query r and key s is q.k / sqrt(K) + slope * (s - r), in float32. A key is
    seen if s <= last_key[r] (None: s <= r) and both are of the same document (None: always).
    """

    q_BLHK: jax.Array
    k_BSHK: jax.Array
    v_BSHK: jax.Array
    slopes_H: jax.Array | None  # float32; None: no bias
    documents_BL: jax.Array | None  # int32
    last_key_BL: jax.Array | None  # int32
    blocks: Blocks


class FlashKernel(Protocol):
    """One platform's kernel; a hashable object."""

    def takes(self, head_dim: int, dtype: Any, /) -> bool:
        """Whether it has this head_dim and dtype; if not, `forward` is BadInput that says what it has."""
        ...

    def block_sizes(self, length: int, head_dim: int, /) -> tuple[int, int]:
        """Tokens of a block of queries and of keys; one divides the other."""
        ...

    def forward(self, inputs: Inputs, /) -> tuple[jax.Array, jax.Array]:
        """The context [B, L, H, K] in v's dtype, and the logsumexp of each query's scores, float32 [B, H, L]."""
        ...

    def backward(
        self, inputs: Inputs, lse_BHL: jax.Array, delta_BHL: jax.Array, g_BLHK: jax.Array, /
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """dq, dk, dv in q's dtype from the context's gradient; `delta_BHL` is sum(g * context), float32.

        p = exp(score - lse), dv = p^T g, ds = p * (g v^T - delta), dq = ds k / sqrt(K), dk = ds^T q / sqrt(K); matrix
        products take q's dtype and accumulate in float32.
        """
        ...


def flash_attention(
    kernel: FlashKernel,
    q_BLHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    slopes_H: jax.Array | None,
    *,
    documents_BL: jax.Array | None = None,
    last_key_BL: jax.Array | None = None,
    skip_far_blocks: bool = True,
) -> jax.Array:
    """`attention.xla_attention` by a kernel: any L = S, O(S) memory; documents must grow along the row.

    Without slopes there is no bias, and far blocks, which only a bias makes, must not be asked for.
    """
    L, K = q_BLHK.shape[1], q_BLHK.shape[3]
    block_q, block_k = kernel.block_sizes(L, K)
    pad = -L % max(block_q, block_k)
    q, k, v = (jnp.pad(a, ((0, 0), (0, pad), (0, 0), (0, 0))) for a in (q_BLHK, k_BSHK, v_BSHK))
    # Padding is a document of its own; without documents it lies after all that the true queries see.
    if documents_BL is not None:
        largest = jnp.iinfo(jnp.int32).max
        documents_BL = jnp.pad(documents_BL, ((0, 0), (0, pad)), constant_values=largest)
    if last_key_BL is not None:
        after_BL = jnp.broadcast_to(jnp.arange(L, L + pad, dtype=jnp.int32), (len(q), pad))
        last_key_BL = jnp.concatenate([last_key_BL.astype(jnp.int32), after_BL], axis=1)
    options = kernel, block_q, block_k, skip_far_blocks
    context: Any = _flash(options, q, k, v, slopes_H, documents_BL, last_key_BL)
    return context[:, :L]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(options, q_BLHK, k_BSHK, v_BSHK, slopes_H, documents_BL, last_key_BL):
    return _forward(options, q_BLHK, k_BSHK, v_BSHK, slopes_H, documents_BL, last_key_BL)[0]


def _inputs(options, q_BLHK, k_BSHK, v_BSHK, slopes_H, documents_BL, last_key_BL) -> Inputs:
    _, block_q, block_k, skip_far_blocks = options
    blocks = needed_blocks(
        q_BLHK, k_BSHK, slopes_H, block_q, block_k, documents_BL=documents_BL,
        last_key_BL=last_key_BL, skip_far_blocks=skip_far_blocks,
    )  # fmt: skip
    return Inputs(q_BLHK, k_BSHK, v_BSHK, slopes_H, documents_BL, last_key_BL, blocks)


def _forward(options, *arrays) -> Any:
    context_BLHK, lse_BHL = options[0].forward(_inputs(options, *arrays))
    # Named here, where the backward pass takes them from: then a policy that keeps them spares the whole kernel.
    context_BLHK = checkpoint_name(context_BLHK, "context")
    lse_BHL = checkpoint_name(lse_BHL, "context")
    return context_BLHK, (arrays, context_BLHK, lse_BHL)


def _backward(options, residuals, g_BLHK):
    arrays, context_BLHK, lse_BHL = residuals
    delta_BLH = jnp.sum(g_BLHK.astype(jnp.float32) * context_BLHK.astype(jnp.float32), axis=-1)
    # The blocks are found again: two norms, against integers kept for each layer.
    inputs = _inputs(options, *arrays)
    grads = options[0].backward(inputs, lse_BHL, jnp.moveaxis(delta_BLH, 1, 2), g_BLHK)
    return *grads, jax.tree.map(jnp.zeros_like, inputs.slopes_H), None, None


_flash.defvjp(_forward, _backward)
