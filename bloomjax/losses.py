"""Cross-entropy of a linear head over a large vocabulary, with the gradients made on the way forward.

BLOOM's head has 250,880 rows: float32 logits of 16k tokens are 16 GB, and autodiff keeps them, turns both backward
matmuls into float32 ones and scatters into [T, V]. Here each chunk of tokens computes its logits once, and from them
the loss, dx and dW: three matmuls in the compute dtype, float32 accumulation, nothing of size [all tokens, V]. What is
done with a chunk, and how large it is, stands in loss_chunks.py; here is what is differentiated and how it is split.

Dimension key: B batch, L length, T = B * L tokens, V vocabulary, D emb_dim. Inside shard_map all are one device's.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from bloomjax import partitioning
from bloomjax.loss_chunks import Head, head_in_chunks


def linear_cross_entropy(
    x_BLD: jax.Array,
    embedding_VD: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    *,
    z_loss: float = 0.0,
    chunk_tokens: int | None = None,
    num_tokens_in_vocab: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of -log softmax(x.E^T)[target] (+ z_loss * logsumexp^2), and the plain loss of each token.

    Args:
      x_BLD: final hidden states; their dtype is that of the matmuls. Rows may be split over `data` and `fsdp`.
      embedding_VD: float32 master weights of the tied head, split over `tensor` and `fsdp`.
      targets_BL: int32 token ids.
      weights_BL: float32; 0 leaves a token out. Already divided by their sum if a mean is wanted.
      z_loss: weight of logsumexp^2 (PaLM, arXiv 2204.02311, section 5).
      chunk_tokens: tokens of one device whose gradient by logits exists at the same time, at most; None leaves it to
        `loss_chunks.chunk_tokens_for`.
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
        return _local(options, with_grads, None, x_BLD, w_VD, targets_BL, weights_BL)
    w_VD = jax.lax.optimization_barrier(w_VD)  # or XLA gathers first: twice the bytes
    rows = P(partitioning.BATCH_AXES)
    out_specs = (P(), rows) + (
        (P(partitioning.BATCH_AXES, "tensor"), P("tensor", "fsdp")) * with_grads
    )
    local = functools.partial(_local, options, with_grads, "tensor")
    return jax.shard_map(
        local, in_specs=(rows, P("tensor"), rows, rows), out_specs=out_specs, check_vma=False
    )(x_BLD, w_VD, targets_BL, weights_BL)  # fmt: skip


def _local(options, with_grads, vocab_axis, x_BLD, w_VD, targets_BL, weights_BL):
    """Loss (and gradients) of the rows and the vocabulary slice that this device holds."""
    z_loss, chunk_tokens, num_tokens_in_vocab = options
    B, L, D = x_BLD.shape
    head = Head(z_loss, num_tokens_in_vocab, vocab_axis)
    weights_T = weights_BL.reshape(-1)
    lse_T, nll_T, *grads = head_in_chunks(
        head,
        with_grads,
        chunk_tokens,
        w_VD,
        x_BLD.reshape(-1, D),
        targets_BL.reshape(-1),
        weights_T,
    )
    total = jnp.sum(weights_T * (nll_T + z_loss * jnp.square(lse_T)))
    if vocab_axis:
        total = jax.lax.psum(total, partitioning.BATCH_AXES)
    nll_BL = nll_T.reshape(B, L)
    if not with_grads:
        return total, nll_BL
    dx_BLD, dw_VD = grads[0].reshape(B, L, D), grads[1]
    if vocab_axis:
        # Each tensor shard saw its part of the vocabulary, each batch shard its rows.
        dx_BLD = jax.lax.psum_scatter(dx_BLD, "tensor", scatter_dimension=1, tiled=True)
        dw_VD = jax.lax.psum_scatter(dw_VD, "fsdp", scatter_dimension=1, tiled=True)
        dw_VD = jax.lax.psum(dw_VD, "data")
    return total, nll_BL, dx_BLD, dw_VD
