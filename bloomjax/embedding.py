"""Rows of a table whose vocabulary is split over devices, and the gradient that goes back into it.

Dimension key: B batch, L length, V vocabulary, D emb_dim.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from bloomjax import partitioning


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def embed(dtype, table_VD, tokens_BL):
    """Rows of the float32 table in `dtype` [B, L, D], the sequence split over `tensor`.

    Each device looks up in its slice of the vocabulary: the table is gathered over `fsdp` in `dtype`, never over
    `tensor`. Gradients of equal tokens are added in float32.
    """
    return _embed_forward(dtype, table_VD, tokens_BL)[0]


def _lookup(on_mesh, table_VD, tokens_BL):
    if not on_mesh:
        return jnp.take(table_VD, tokens_BL, axis=0)
    tokens_BL = tokens_BL - jax.lax.axis_index("tensor") * table_VD.shape[0]
    mine_BL = (tokens_BL >= 0) & (tokens_BL < table_VD.shape[0])
    x_BLD = jnp.take(table_VD, jnp.where(mine_BL, tokens_BL, 0), axis=0)
    x_BLD = jnp.where(mine_BL[..., None], x_BLD, 0)
    return jax.lax.psum_scatter(x_BLD, "tensor", scatter_dimension=1, tiled=True)


def _scatter_add(on_mesh, num_rows, g_BLD, tokens_BL):
    if on_mesh:
        g_BLD = jax.lax.all_gather(g_BLD, "tensor", axis=1, tiled=True)
        tokens_BL = tokens_BL - jax.lax.axis_index("tensor") * num_rows
        # `drop` takes what lies beyond the slice; what lies before it would count from the end.
        tokens_BL = jnp.where(tokens_BL < 0, num_rows, tokens_BL)
    dtable_VD = jnp.zeros((num_rows, g_BLD.shape[-1]), jnp.float32)
    dtable_VD = dtable_VD.at[tokens_BL].add(g_BLD.astype(jnp.float32), mode="drop")
    if on_mesh:
        dtable_VD = jax.lax.psum_scatter(dtable_VD, "fsdp", scatter_dimension=1, tiled=True)
        dtable_VD = jax.lax.psum(dtable_VD, "data")
    return dtable_VD


def _embed_forward(dtype, table_VD, tokens_BL):
    lookup = functools.partial(_lookup, partitioning.on_mesh())
    rows_VD = table_VD.astype(dtype)
    if partitioning.on_mesh():
        rows_VD = jax.lax.optimization_barrier(rows_VD)  # cast, then gathered: half the bytes
        rows, residual = P(partitioning.BATCH_AXES), P(partitioning.BATCH_AXES, "tensor")
        lookup = jax.shard_map(
            lookup, in_specs=(P("tensor"), rows), out_specs=residual, check_vma=False
        )
    return lookup(rows_VD, tokens_BL), (tokens_BL, table_VD.shape[0])


def _embed_backward(dtype, residuals, g_BLD):
    del dtype
    tokens_BL, vocab_size = residuals
    if not partitioning.on_mesh():
        return _scatter_add(False, vocab_size, g_BLD, tokens_BL), None
    mesh = jax.sharding.get_abstract_mesh()
    rows, residual = P(partitioning.BATCH_AXES), P(partitioning.BATCH_AXES, "tensor")
    scatter_add = functools.partial(_scatter_add, True, vocab_size // mesh.shape["tensor"])
    return jax.shard_map(
        scatter_add, in_specs=(residual, rows), out_specs=P("tensor", "fsdp"), check_vma=False
    )(g_BLD, tokens_BL), None


embed.defvjp(_embed_forward, _embed_backward)


class Table(nn.Module):
    """A float32 matrix of its own, called "embedding" so that it decays as one: positions, a head that is not tied."""

    shape: tuple[int, int]
    names: tuple[str, str]
    std: float

    @nn.compact
    def __call__(self) -> Any:
        init = nn.with_logical_partitioning(nn.initializers.normal(self.std), self.names)
        return self.param("embedding", init, self.shape, jnp.float32)


def head_table(params: Any) -> Any:
    """The output matrix [V, D] among the parameters of a model, tied or not."""
    return params.get("head", params)["embedding"]
