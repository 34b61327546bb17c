"""Cross-entropy of a linear head over a large vocabulary, in chunks, with the gradients made on the way forward.

BLOOM's head has 250,880 rows: float32 logits of 16k tokens are 16 GB, and autodiff keeps them, turns both backward
matmuls into float32 ones and scatters into [T, V]. Here each chunk of tokens computes its logits once, and from them
the loss, dx and dW: three matmuls in the compute dtype, float32 accumulation, nothing of size [T, V].

Dimension key: B batch, L length, T tokens of one chunk, V vocabulary, D emb_dim. Inside shard_map all are one device's.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from bloomjax import partitioning


def linear_cross_entropy(
    x_BLD: jax.Array,
    embedding_VD: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    *,
    z_loss: float = 0.0,
    chunk_tokens: int = 1024,
    num_tokens_in_vocab: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of -log softmax(x.E^T)[target] (+ z_loss * logsumexp^2), and the plain loss of each token.

    Args:
      x_BLD: final hidden states; their dtype is that of the matmuls. Rows may be split over `data` and `fsdp`.
      embedding_VD: float32 master weights of the tied head, split over `tensor` and `fsdp`.
      targets_BL: int32 token ids.
      weights_BL: float32; 0 leaves a token out. Already divided by their sum if a mean is wanted.
      z_loss: weight of logsumexp^2 (PaLM, arXiv 2204.02311, section 5).
      chunk_tokens: tokens of one device whose logits exist at the same time.
      num_tokens_in_vocab: columns from here on are padding and get no probability; None keeps them, as BLOOM does.

    Returns:
      The sum, a float32 scalar, differentiable in x and the embedding; and the loss in nats of each token, float32
      [B, L], without z-loss and not differentiable. If the sum is not differentiated, dx and dW are not computed.
    """
    options = (z_loss, chunk_tokens, num_tokens_in_vocab)
    result: Any = _cross_entropy(options, x_BLD, embedding_VD, targets_BL, weights_BL)
    total, nll_BL = result
    return total, jax.lax.stop_gradient(nll_BL)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(options, x_BLD, embedding_VD, targets_BL, weights_BL):
    return _run(options, False, x_BLD, embedding_VD, targets_BL, weights_BL)[:2]


def _forward(options, x_BLD, embedding_VD, targets_BL, weights_BL):
    total, nll_BL, dx_BLD, dw_VD = _run(options, True, x_BLD, embedding_VD, targets_BL, weights_BL)
    return (total, nll_BL), (dx_BLD, dw_VD)


def _backward(options, residuals, cotangents):
    del options
    dx_BLD, dw_VD = residuals
    g = cotangents[0]  # that of the per-token losses is zero: linear_cross_entropy stops it
    return (dx_BLD * g).astype(dx_BLD.dtype), dw_VD * g, None, None


_cross_entropy.defvjp(_forward, _backward)


def _run(options, with_grads, x_BLD, embedding_VD, targets_BL, weights_BL) -> tuple[Any, ...]:
    """Runs the chunks on each device's part of the batch and of the vocabulary; reduces once at the end."""
    w_VD = embedding_VD.astype(x_BLD.dtype)
    if not partitioning.on_mesh():
        return _local(options, with_grads, False, x_BLD, w_VD, targets_BL, weights_BL)
    w_VD = jax.lax.optimization_barrier(w_VD)  # or XLA gathers first: twice the bytes
    rows = P(partitioning.BATCH_AXES)
    out_specs = (P(), rows) + (
        (P(partitioning.BATCH_AXES, "tensor"), P("tensor", "fsdp")) * with_grads
    )
    local = functools.partial(_local, options, with_grads, True)
    return jax.shard_map(
        local, in_specs=(rows, P("tensor"), rows, rows), out_specs=out_specs, check_vma=False
    )(x_BLD, w_VD, targets_BL, weights_BL)  # fmt: skip


def _local(options, with_grads, on_mesh, x_BLD, w_VD, targets_BL, weights_BL):
    """Loss (and gradients) of the rows and the vocabulary slice that this device holds."""
    z_loss, chunk_tokens, num_tokens_in_vocab = options
    B, L, D = x_BLD.shape
    num_chunks = min(L, max(1, math.ceil(B * L / chunk_tokens)))
    pad = -L % num_chunks

    def chunks(a):  # [B, L, ...] -> [num_chunks, B * L/num_chunks, ...]; padding has weight 0
        a = jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2))
        a = a.reshape(B, num_chunks, (L + pad) // num_chunks, *a.shape[2:])
        return jnp.moveaxis(a, 1, 0).reshape(num_chunks, -1, *a.shape[3:])

    def unchunk(a):
        a = a.reshape(num_chunks, B, (L + pad) // num_chunks, *a.shape[2:])
        return jnp.moveaxis(a, 0, 1).reshape(B, L + pad, *a.shape[3:])[:, :L]

    chunk = functools.partial(
        _chunk, w_VD, z_loss, num_tokens_in_vocab, with_grads, "tensor" if on_mesh else ()
    )

    def body(carry, inputs):
        total, dw_VD = carry
        loss, nll_T, dx_TD, chunk_dw_VD = chunk(*inputs)
        return (total + loss, dw_VD + chunk_dw_VD if with_grads else None), (nll_T, dx_TD)

    dw_VD = jnp.zeros(w_VD.shape, jnp.float32) if with_grads else None
    (total, dw_VD), (nll, dx) = jax.lax.scan(
        body,
        (jnp.zeros((), jnp.float32), dw_VD),
        (chunks(x_BLD), chunks(targets_BL), chunks(weights_BL)),
    )
    if on_mesh:
        total = jax.lax.psum(total, partitioning.BATCH_AXES)
    if not with_grads:
        return total, unchunk(nll)
    dx_BLD = unchunk(dx)
    if on_mesh:
        # Each tensor shard saw its part of the vocabulary, each batch shard its rows.
        dx_BLD = jax.lax.psum_scatter(dx_BLD, "tensor", scatter_dimension=1, tiled=True)
        dw_VD = jax.lax.psum_scatter(dw_VD, "fsdp", scatter_dimension=1, tiled=True)
        dw_VD = jax.lax.psum(dw_VD, "data")
    return total, unchunk(nll), dx_BLD, dw_VD


def _chunk(w_VD, z_loss, num_tokens_in_vocab, with_grads, vocab_axes, x_TD, targets_T, weights_T):
    """Loss sum, loss per token and, if wanted, dx and dW of one chunk. `vocab_axes` is () without a mesh."""
    psum = (lambda a: jax.lax.psum(a, vocab_axes)) if vocab_axes else (lambda a: a)
    pmax = (lambda a: jax.lax.pmax(a, vocab_axes)) if vocab_axes else (lambda a: a)
    first = jax.lax.axis_index(vocab_axes) * w_VD.shape[0] if vocab_axes else 0
    logits_TV = jnp.einsum("TD,VD->TV", x_TD, w_VD, preferred_element_type=jnp.float32)
    column_1V = first + jnp.arange(w_VD.shape[0])[None, :]
    if num_tokens_in_vocab is not None:
        logits_TV = jnp.where(column_1V < num_tokens_in_vocab, logits_TV, -jnp.inf)
    hit_TV = column_1V == targets_T[:, None]  # compared, not scattered: it fuses
    max_T = pmax(jnp.max(logits_TV, axis=1))
    exp_TV = jnp.exp(logits_TV - max_T[:, None])
    sum_T = psum(jnp.sum(exp_TV, axis=1))
    row_T = targets_T - first
    gold_T = jnp.take_along_axis(logits_TV, row_T[:, None], axis=1, mode="clip")[:, 0]
    gold_T = psum(jnp.where((row_T >= 0) & (row_T < w_VD.shape[0]), gold_T, 0.0))
    lse_T = max_T + jnp.log(sum_T)
    nll_T = lse_T - gold_T
    loss = jnp.sum(weights_T * (nll_T + z_loss * jnp.square(lse_T)))
    if not with_grads:
        return loss, nll_T, None, None
    scale_T = weights_T * (1.0 + 2.0 * z_loss * lse_T) / sum_T
    dlogits_TV = scale_T[:, None] * exp_TV - jnp.where(hit_TV, weights_T[:, None], 0.0)
    dlogits_TV = dlogits_TV.astype(x_TD.dtype)
    dx_TD = jnp.einsum("TV,VD->TD", dlogits_TV, w_VD, preferred_element_type=jnp.float32)
    dlogits_VT = jax.lax.platform_dependent(
        dlogits_TV, cpu=_transpose_in_memory, default=jnp.transpose
    )
    dw_VD = jnp.einsum("VT,TD->VD", dlogits_VT, x_TD, preferred_element_type=jnp.float32)
    return loss, nll_T, dx_TD.astype(x_TD.dtype), dw_VD


def _transpose_in_memory(a):
    """For XLA:CPU, whose bfloat16 matmuls contract rows only; left to itself it takes float32 ones, 4x slower."""
    return with_layout_constraint(a.T, Layout(major_to_minor=(0, 1)))
