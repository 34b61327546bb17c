"""Flash attention in Triton, for NVIDIA GPUs from the A100 on: forward, and a backward pass without atomics.

The kernels are in `triton_kernels`; here is how they are launched. Each program alone writes its rows, so that a rerun
gives the same bits.

Dimension key: B batch, L queries, S keys, H heads, K head_dim, X blocks of the side that a program owns rows of; O rows
of its tile.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from bloomjax.errors import BadInput
from bloomjax.flash_attention import Inputs
from bloomjax.triton_kernels import Common, Static, Tile, dkdv_kernel, dq_kernel, forward_kernel


class Tiles(NamedTuple):
    """Those of the three kernels."""

    forward: Tile
    dq: Tile
    dkdv: Tile


# By the largest head_dim. Chosen from what the compiler makes of them for compute capability 8.0: no spilled register
# in the loops over full steps (but for dq and dkdv at 128: 8 and 4 loads), 32 rows a warp where the accumulators leave
# room for it, since 16 read shared memory more often than the tensor cores need; at most 99 KiB of it.
_TILES = {
    64: Tiles(Tile(128, 64, 4, 3), Tile(128, 32, 4, 3), Tile(128, 32, 4, 2)),
    80: Tiles(Tile(128, 32, 4, 3), Tile(128, 32, 4, 2), Tile(128, 16, 4, 2)),
    96: Tiles(Tile(128, 32, 4, 3), Tile(128, 32, 4, 2), Tile(128, 64, 8, 2)),
    128: Tiles(Tile(128, 32, 4, 3), Tile(128, 32, 4, 2), Tile(64, 64, 4, 2)),
}
_FLOAT32_TILES = Tiles(*[Tile(32, 16, 4, 1)] * 3)


@dataclasses.dataclass(frozen=True)
class TritonKernel:
    """A `flash_attention.FlashKernel` for NVIDIA GPUs of compute capability 8.0 or more.

    q, k, v are bfloat16 or float32; matrix products of float32 are exact (not TF32), and slow. head_dim is a multiple
    of 16 up to 128; it is cut into powers of two, so that 80 costs 80 and not 128. BadInput for anything else.

    Attributes:
      block_q, block_k: tokens of a block that may be skipped; powers of two, at least 16.
      tiles: rows are powers of two, at least 16, and no more than a block has; None for those of the head_dim.
      interpret: run on the CPU, for tests.
    """

    block_q: int = 128
    block_k: int = 128
    tiles: Tiles | None = None
    interpret: bool = False

    def takes(self, head_dim: int, dtype: Any) -> bool:
        is_head = head_dim % 16 == 0 and 16 <= head_dim <= max(_TILES)
        return is_head and dtype in (jnp.bfloat16, jnp.float32)

    def block_sizes(self, length: int, head_dim: int) -> tuple[int, int]:
        """A short window is one block: padding costs as much as tokens."""
        del head_dim
        whole = max(16, pl.next_power_of_2(length))
        return min(self.block_q, whole), min(self.block_k, whole)

    def forward(self, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        arrays = inputs.q_BLHK, inputs.k_BSHK, inputs.v_BSHK
        return self._launch("forward", inputs, arrays, "BOHK BLHK BLHK", "BOHK BHO")

    def backward(
        self, inputs: Inputs, lse_BHL: jax.Array, delta_BHL: jax.Array, g_BLHK: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        arrays = inputs.q_BLHK, inputs.k_BSHK, inputs.v_BSHK, g_BLHK, lse_BHL, delta_BHL
        (dq,) = self._launch("dq", inputs, arrays, "BOHK BLHK BLHK BOHK BHO BHO", "BOHK")
        axes = "BLHK BOHK BOHK BLHK BHL BHL"
        dk, dv = self._launch("dkdv", inputs, arrays, axes, "BOHK BOHK")
        return dq, dk, dv

    def _launch(self, name: str, inputs: Inputs, arrays, axes: str, out_axes: str) -> Any:
        """The kernel of this name on a grid of tiles x heads x rows of the batch; an array's O is its tile's, L all."""
        q = inputs.q_BLHK
        B, L, H, K = q.shape
        static, ranges = self._static(name, q, inputs.blocks)
        common = Common(*ranges, inputs.slopes_H, *_limits(inputs))
        common_axes = "BHX BHX H BL BL BO" if static.owns_keys else "BHX BHX H BO BO BO"
        tile = static.tile

        def spec(axes):
            size = {"B": None, "H": None, "X": None, "O": tile.own, "L": L, "K": K}

            def place(i, h, b):
                own = static.own_tile(i)
                at = {"B": b, "H": h, "X": own // static.tiles_per_block, "O": own, "L": 0, "K": 0}
                return tuple(at[axis] for axis in axes)

            return pl.BlockSpec(tuple(size[axis] for axis in axes), place)

        def specs(arrays, axes):
            pairs = zip(arrays, axes.split(), strict=True)
            return [None if array is None else spec(axes) for array, axes in pairs]

        size = {"B": B, "O": L, "H": H, "K": K}
        out_shape = [
            jax.ShapeDtypeStruct([size[a] for a in axes], q.dtype if "K" in axes else jnp.float32)
            for axes in out_axes.split()
        ]
        # Each tile walks over all that a causal window without documents lets it see.
        num_steps = sum(-(-(i + 1) * tile.own // tile.step) for i in range(static.num_tiles))
        num_scores = B * H * num_steps * tile.own * tile.step
        num_products = {"forward": 2, "dq": 3, "dkdv": 4}[name]
        moved = [array for array in (*common, *arrays, *out_shape) if array is not None]
        kernel = {"forward": forward_kernel, "dq": dq_kernel, "dkdv": dkdv_kernel}[name]
        return pl.pallas_call(
            functools.partial(kernel, static),
            grid=(static.num_tiles, H, B),
            in_specs=[Common(*specs(common, common_axes)), *specs(arrays, axes)],
            out_specs=specs(out_shape, out_axes),
            out_shape=out_shape,
            compiler_params=plgpu.CompilerParams(*tile[2:]),
            cost_estimate=pl.CostEstimate(
                flops=2 * num_products * K * num_scores,
                transcendentals=num_scores,
                bytes_accessed=sum(array.size * array.dtype.itemsize for array in moved),
            ),
            interpret=self.interpret,
            name=f"flash_attention_{name}",
        )(common, *arrays)

    def _static(self, name, q, blocks):
        """And the ranges of the blocks that each block of the owned side walks over."""
        L, K = q.shape[1], q.shape[3]
        tile = getattr(self.tiles or default_tiles(K, q.dtype), name)
        own, other = (L // ends_BHX.shape[2] for ends_BHX in (blocks[1], blocks[3]))
        ranges, owns_keys = blocks[:2], name == "dkdv"
        if owns_keys:
            ranges, own, other = blocks[2:], other, own
        tile = tile._replace(own=min(tile.own, own), step=min(tile.step, other))
        num_tiles, parts = L // tile.own, (own // tile.own, other // tile.step)
        is_exact = q.dtype == jnp.float32
        return Static(tile, owns_keys, num_tiles, *parts, K, is_exact, self.interpret), ranges


KERNEL = TritonKernel()


def default_tiles(head_dim: int, dtype: Any) -> Tiles:
    """BadInput for a head_dim or dtype that the kernels cannot take."""
    if not KERNEL.takes(head_dim, dtype):
        raise BadInput(
            f"attention kernel 'flash_gpu' takes a head_dim of 16, 32, ... or {max(_TILES)} in bfloat16 or float32, "
            f"not {head_dim} in {dtype}; take 'xla_blocked'"
        )
    if dtype == jnp.float32:
        return _FLOAT32_TILES
    return _TILES[min(up_to for up_to in _TILES if up_to >= head_dim)]


def _limits(inputs: Inputs):
    """First and last key of each query, and the end of each token's document; int32 [B, L] or None as in `Common`.

    Documents grow along the row, so that one is a range of positions.
    """
    documents_BL, last_key_BL = inputs.documents_BL, inputs.last_key_BL
    if documents_BL is None:
        return None, last_key_BL, None
    L = documents_BL.shape[1]
    position_1L = jnp.arange(L, dtype=jnp.int32)[None]
    is_last_BL = documents_BL[:, :-1] != documents_BL[:, 1:]
    is_last_BL = jnp.pad(is_last_BL, ((0, 0), (0, 1)), constant_values=True)
    is_first_BL = jnp.roll(is_last_BL, 1, axis=1)
    first_BL = jax.lax.cummax(jnp.where(is_first_BL, position_1L, 0), axis=1)
    end_BL = jax.lax.cummin(jnp.where(is_last_BL, position_1L + 1, L), axis=1, reverse=True)
    if last_key_BL is not None:
        last_key_BL = jnp.minimum(last_key_BL, end_BL - 1)
    return first_BL, last_key_BL, end_BL
