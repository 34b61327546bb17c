"""A block of threads on an NVIDIA Hopper GPU (sm_90a), for attention: tiles come by TMA, products are wgmma's.

It is three warpgroups, as in FlashAttention-3 (arXiv 2407.08608): two compute on 64 rows each, the third one copies
tiles from global to shared memory for both. A slot for tiles has two barriers: at `ready` its copies arrive, at `free`
both computing warpgroups when they have read it. In Pallas' dialect for Mosaic GPU, a "thread" is a warpgroup.

Dimension key: B batch, L tokens, H heads, K head_dim.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

BLOCK = 128  # tokens: the rows of both computing warpgroups
ROWS = 64  # of one warpgroup, and of a wgmma
GROUPS = 2  # that compute; the third one copies
# All threads start with 65536 / 384 registers, rounded down to 168: 2 * 232 + 40 = 3 * 168.
_COMPUTE_REGISTERS, _COPY_REGISTERS = 232, 40
_TILES_BYTES = 200 * 2**10  # of the 227 KiB of shared memory that a block may have
_MAX_STAGES = 4
LOG2_E = math.log2(math.e)
_WGMMA = plgpu.Layout.WGMMA
OF_ROWS, OF_COLUMNS = _WGMMA.reduce(1), _WGMMA.reduce(0)  # layouts of vectors


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel, and what its blocks of threads hold in shared memory.

    Attributes:
      body: traces the program of a block.
      num_products: matrix products over all scores; for the estimate of its FLOPs.
      tile_tokens: of the tiles that are copied while others are computed with.
      rows: what each computing warpgroup holds of its own 64 tokens.
      stages: what comes in tiles; each tuple shares two barriers, called by its first name.
      scratch: as rows, but not copied from anywhere.
      num_stages, interpret: see flash_attention_hopper.HopperKernel.
    """

    name: str
    body: Callable[["Block"], None]
    num_products: int
    tile_tokens: int
    rows: tuple[str, ...]
    stages: tuple[tuple[str, ...], ...]
    scratch: tuple[str, ...] = ()
    num_stages: int | None = None
    interpret: Any = None

    def num_slots(self, K: int) -> int:
        """For tiles, in shared memory."""
        if self.num_stages is not None:
            return self.num_stages
        num_tiles = sum(_is_tile(name) for names in self.stages for name in names)
        rows_bytes = sum(map(_is_tile, self.rows)) * BLOCK * K * 2
        slot_bytes = num_tiles * self.tile_tokens * K * 2
        return min(_MAX_STAGES, (_TILES_BYTES - rows_bytes) // slot_bytes)

    def memory(self, K: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Buffers and barriers in shared memory."""

        def buffer(name: str, num: int, tokens: int) -> Any:
            if not _is_tile(name):
                shape = (num, 2, tokens) if name == "limits" else (num, tokens)
                return plgpu.SMEM(shape, jnp.int32 if name == "limits" else jnp.float32)
            # The widest swizzle (bytes, of 8 tokens) that divides K: tiles of 80 and 96 need no padding.
            swizzle = next(each for each in (128, 64, 32) if K % (each // 2) == 0)
            tiling = plgpu.TilingTransform((8, swizzle // 2))
            transforms = tiling, plgpu.SwizzleTransform(swizzle)
            return plgpu.SMEM((num, tokens, K), jnp.bfloat16, transforms=transforms)

        num_slots = self.num_slots(K)
        buffers = {name: buffer(name, GROUPS, ROWS) for name in (*self.rows, *self.scratch)}
        barriers = {
            "rows": plgpu.Barrier(num_barriers=GROUPS, num_arrivals=len(self.rows)),
            "turn": plgpu.Barrier(num_barriers=1, num_arrivals=GROUPS),
        }
        for names in self.stages:
            buffers |= {name: buffer(name, num_slots, self.tile_tokens) for name in names}
            for kind, num_arrivals in (("ready", len(names)), ("free", GROUPS)):
                barrier = plgpu.Barrier(num_barriers=num_slots, num_arrivals=num_arrivals)
                barriers[f"{names[0]}_{kind}"] = barrier
        return buffers, barriers

    def run(self, reads: dict[str, Any], writes: dict[str, Any]) -> tuple[jax.Array, ...]:
        B, L, H, K = reads["q"].shape

        def entry(*refs):
            def scoped(buffers, barriers):
                gmem = dict(zip([*reads, *writes], refs, strict=True))
                self.body(Block(self, (L, K), gmem, buffers, barriers))

            pl.run_scoped(scoped, *self.memory(K), collective_axes="warpgroup")

        arrays = *reads.values(), *writes.values()
        cost = pl.CostEstimate(
            flops=self.num_products * B * H * L * L * K,  # of all scores half, the causal ones
            transcendentals=B * H * L * L // 2,
            bytes_accessed=sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays),
        )
        mesh = plgpu.Mesh(
            grid=(H, L // BLOCK, B), grid_names=("head", "block", "batch"),
            num_threads=GROUPS + 1, thread_name="warpgroup",
        )  # fmt: skip
        params = plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        )
        out = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in writes.values())
        kernel: Any = pl.kernel(
            entry, out, mesh=mesh, compiler_params=params, cost_estimate=cost,
            interpret=self.interpret or False, name=f"hopper_attention_{self.name}",
        )  # fmt: skip
        return kernel(*reads.values())


def _is_tile(name: str) -> bool:
    return name in ("q", "k", "v", "g")


class Block:
    """A block of threads, while its program is traced: its memory by name, and what the kernels have in common."""

    def __init__(self, launch: Launch, shape: tuple[int, int], gmem, smem, barriers):
        self.launch, self.interpret = launch, launch.interpret
        self.L, self.K = shape
        self.gmem, self.smem, self.barriers = gmem, smem, barriers
        self.num_slots = launch.num_slots(self.K)
        self.scale = self.K**-0.5
        names = "batch", "head", "block", "warpgroup"
        self.batch, self.head, self.number, self.group = map(lax.axis_index, names)
        # Scores are in powers of two. None: no bias.
        self.slope = gmem["slopes"][self.head] * LOG2_E if "slopes" in gmem else None

    def bias(self, distance):
        """Float32; None without slopes."""
        return None if self.slope is None else distance.astype(jnp.float32) * self.slope

    def range(self, block):
        """The blocks that one needs: their first, and how many."""
        first = self.gmem["first"][self.batch, self.head, block]
        return first, self.gmem["end"][self.batch, self.head, block] - first

    def limits(self, m):
        """A function of n: whether some query of block m does not see some key of block n."""
        if "full" not in self.gmem:
            return lambda n: n == m
        first, end = (self.gmem["full"][i, self.batch, m] for i in (0, 1))
        return lambda n: (n < first) | (n >= end)

    # ---- copies ----

    def tokens(self, name: str, start, num: int):
        """Of this block's row and head: [num, K], [num], or limits [2, num]."""
        ref, at = self.gmem[name], pl.ds(start, num)
        if name == "limits":
            return ref.at[self.batch, :, at]
        is_tile = len(ref.shape) == 4
        return ref.at[self.batch, at, self.head] if is_tile else ref.at[self.batch, self.head, at]

    def copy_tiles(self, count, start: Callable[[Any], Any]) -> None:
        """The copying warpgroup: tile i, the tokens from start(i) on, goes to slot i % num_slots."""
        plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")

        @pl.loop(0, count)
        def _(i):
            slot = lax.rem(i, self.num_slots)
            for names in self.launch.stages:
                free = f"{names[0]}_free"
                pl.when(i >= self.num_slots)(lambda free=free: self.wait(free, slot))
                for name in names:
                    source = self.tokens(name, start(i), self.launch.tile_tokens)
                    ready = self.barriers[f"{names[0]}_ready"].at[slot]
                    plgpu.copy_gmem_to_smem(source, self.smem[name].at[slot], ready)

        # Who waits at a barrier has to see all its phases.
        @pl.loop(jnp.maximum(count - self.num_slots, 0), count)
        def _(i):
            for names in self.launch.stages:
                self.wait(f"{names[0]}_free", lax.rem(i, self.num_slots))

    def load_rows(self, row0) -> None:
        """A computing warpgroup, before all else."""
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        for name in self.launch.rows:
            source, ready = self.tokens(name, row0, ROWS), self.barriers["rows"].at[self.group]
            plgpu.copy_gmem_to_smem(source, self.smem[name].at[self.group], ready)
        self.wait("rows", self.group)

    def store_rows(self, row0, **buffers: str) -> None:
        """store_rows(row0, dq="q") for buffer q to array dq; of what is in shared memory at the end."""
        plgpu.commit_smem()
        for name, buffer in buffers.items():
            target = self.tokens(name, row0, ROWS)
            plgpu.copy_smem_to_gmem(self.smem[buffer].at[self.group], target)
        plgpu.wait_smem_to_gmem(0)

    def wait(self, name: str, slot) -> None:
        plgpu.barrier_wait(self.barriers[name].at[slot])

    def arrive(self, name: str, slot) -> None:
        plgpu.barrier_arrive(self.barriers[name].at[slot])

    # ---- what jax's interpreter has not got: layouts, and operands of wgmma that are transposed or in registers ----

    def lay(self, x, layout):
        return x if self.interpret else plgpu.layout_cast(x, layout)

    def zeros(self, *shape: int):
        return self.lay(jnp.zeros(shape, jnp.float32), _WGMMA if len(shape) == 2 else OF_ROWS)

    def numbers(self, num: int, layout):
        return self.lay(lax.broadcasted_iota(jnp.int32, (num,), 0), layout)

    def read(self, ref, layout):
        """Numbers from shared memory. Arrival at `free` orders these loads before the copy that overwrites them."""
        x = self.lay(ref[...], layout)
        if self.interpret:
            plgpu.commit_smem()  # the race detector wants a fence between loads and TMA besides
        return x

    def _dot(self, a, b, transposed: bool):
        a, b = a[...].astype(jnp.float32), b[...].astype(jnp.float32)
        plgpu.commit_smem()  # wgmma reads as TMA does, without
        return a @ (b.T if transposed else b)

    def product(self, a, b, meanwhile: Callable[[], None]):
        """a @ b^T in float32; `meanwhile` is done before it is waited for."""
        if self.interpret:
            meanwhile()
            return self._dot(a, b, True)

        def body(acc):
            plgpu.wgmma(acc, a, b.T)
            meanwhile()
            return acc[...]

        return pl.run_scoped(body, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[0]), jnp.float32))

    def two_products(self, a, b, use: Callable[[Any], Any], c, d):
        """use(a @ b^T), and c @ d^T, which runs at the same time."""
        if self.interpret:
            return use(self._dot(a, b, True)), self._dot(c, d, True)

        def body(first, second):
            plgpu.wgmma(first, a, b.T)
            plgpu.wgmma(second, c, d.T)
            used = use(plgpu.wgmma_accumulator_load(first, wait_n=1))
            return used, plgpu.wgmma_accumulator_load(second, wait_n=0)

        acc = plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[0]), jnp.float32)
        return pl.run_scoped(body, acc, acc)

    def add_products(self, *terms):
        """acc + a() @ b for each (acc, a, b); the next a is made while the product before runs."""
        if self.interpret:
            return [acc + self._dot(a(), b, False) for acc, a, b in terms]

        def body(refs):
            for ref, (_, a, b) in zip(refs, terms, strict=True):
                plgpu.wgmma(ref, a(), b)

        return pl.run_state(body)([plgpu.WGMMAAccumulatorRef.init(acc) for acc, _, _ in terms])


def plus(x, bias):
    return x if bias is None else x + bias


def down(vector, shape):
    """A number of each row, in all columns; None of None."""
    return None if vector is None else lax.broadcast_in_dim(vector, shape, [0])


def across(vector, shape):
    """A number of each column, in all rows; None of None."""
    return None if vector is None else lax.broadcast_in_dim(vector, shape, [1])
