"""Flash attention for NVIDIA Hopper: the kernels, out of what `hopper_blocks` has.

Rows are queries; for dk and dv, whose scores are transposed, they are keys. Scores are in powers of two: exp2 is what
the chip has. The bias of a tile is slope * (column + tile's position - row): one number for each column and one for
each row, in float32.

Dimension key: B batch, L queries, S keys, H heads, K head_dim, M blocks of queries, N blocks of keys.
"""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from bloomjax.errors import BadInput
from bloomjax.flash_attention import Inputs
from bloomjax.hopper_blocks import (
    BLOCK,
    GROUPS,
    LOG2_E,
    OF_COLUMNS,
    OF_ROWS,
    ROWS,
    Block,
    Launch,
    across,
    down,
    plus,
)

HEAD_DIMS = (64, 80, 96, 128)
_MASKED = -1e30  # finite: a row that sees nothing of its first tile stays free of NaN


@dataclasses.dataclass(frozen=True)
class HopperKernel:
    """`FlashKernel` for H100 and H200: bfloat16, head_dim of HEAD_DIMS; BadInput for others.

    Attributes:
      num_stages: slots for tiles in shared memory, at least 1; None for as many as fit, up to 4.
      interpret: jax's InterpretGPUParams, to run on a CPU (slowly, for tests); None to compile.
    """

    num_stages: int | None = None
    interpret: Any = None

    @property
    def _options(self) -> dict[str, Any]:
        return {"num_stages": self.num_stages, "interpret": self.interpret}

    def takes(self, head_dim: int, dtype: Any) -> bool:
        return head_dim in HEAD_DIMS and dtype == jnp.bfloat16

    def block_sizes(self, length: int, head_dim: int) -> tuple[int, int]:
        if head_dim not in HEAD_DIMS:
            there = ", ".join(map(str, HEAD_DIMS))
            raise BadInput(
                f"attention kernel 'flash_hopper' has no head_dim {head_dim}, there are {there}; take 'flash_gpu'"
            )
        return BLOCK, BLOCK

    def forward(self, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        B, L, H, _ = inputs.q_BLHK.shape
        reads = _reads(inputs)
        ranges = {"first": inputs.blocks.key_first_BHM, "end": inputs.blocks.key_end_BHM}
        writes = {"o": inputs.q_BLHK, "lse": jax.ShapeDtypeStruct((B, H, L), jnp.float32)}
        o, lse = Launch(
            "forward", _forward, **self._options, num_products=2, tile_tokens=BLOCK, rows=_among(reads, "q"),
            stages=(("k",), ("v",)), scratch=("lse",),
        ).run(reads | ranges, writes)  # fmt: skip
        return o, lse

    def backward(
        self, inputs: Inputs, lse_BHL: jax.Array, delta_BHL: jax.Array, g_BLHK: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        like, blocks = inputs.q_BLHK, inputs.blocks
        g_BLHK = g_BLHK.astype(like.dtype)
        reads = _reads(inputs) | {"g": g_BLHK, "lse": lse_BHL, "delta": delta_BHL}
        queries = _among(reads, "q", "g", "lse", "delta")
        (dq,) = Launch(
            "dq", _backward_dq, **self._options, num_products=3, tile_tokens=ROWS, rows=queries,
            stages=(("k", "v"),),
        ).run(reads | {"first": blocks.key_first_BHM, "end": blocks.key_end_BHM}, {"dq": like})  # fmt: skip
        dk, dv = Launch(
            "dkv", _backward_dkv, **self._options, num_products=4, tile_tokens=ROWS, rows=("k", "v"),
            stages=(queries,),
        ).run(
            reads | {"first": blocks.query_first_BHN, "end": blocks.query_end_BHN},
            {"dk": like, "dv": like},
        )  # fmt: skip
        return dq, dk, dv


KERNEL = HopperKernel()


def require_hopper(device: Any) -> None:
    """BadInput if the kernel cannot run on a device (of `jax.devices()`, or one that only is compiled for)."""
    capability = getattr(device, "compute_capability", None)
    if capability != "9.0":
        what = f"{device.platform} {device.device_kind}".strip()
        what += f" of compute capability {capability}" if capability else ""
        raise BadInput(
            f"attention kernel 'flash_hopper' needs compute capability 9.0 (H100, H200), got {what}; take 'flash_gpu'"
        )


def _reads(inputs: Inputs) -> dict[str, jax.Array]:
    """By name; `slopes` only if there is a bias, `limits` and `full` only if there are documents or last keys.

    limits: first and last key of each query, int32 [B, 2, L]: documents grow along the row, so that the keys a query
      sees are neighbours.
    full: blocks of keys, [first, end), of which all queries of a block see every key, int32 [2, B, M].
    """
    q_BLHK, k_BSHK, v_BSHK, slopes_H, documents_BL, last_BL, _ = inputs
    if q_BLHK.dtype != jnp.bfloat16:
        raise BadInput(
            f"attention kernel 'flash_hopper' takes bfloat16, got {q_BLHK.dtype}; take 'flash_gpu'"
        )
    reads = {"q": q_BLHK, "k": k_BSHK, "v": v_BSHK}
    if slopes_H is not None:
        reads["slopes"] = slopes_H
    if documents_BL is None and last_BL is None:
        return reads
    B, L, _, _ = q_BLHK.shape
    position_BL = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, L))
    first_BL = jnp.zeros_like(position_BL)
    last_BL = position_BL if last_BL is None else last_BL.astype(jnp.int32)
    if documents_BL is not None:
        changes = jnp.diff(documents_BL, axis=1) != 0
        yes_B1 = jnp.ones((B, 1), bool)
        is_first_BL = jnp.concatenate([yes_B1, changes], axis=1)
        is_last_BL = jnp.concatenate([changes, yes_B1], axis=1)
        first_BL = lax.cummax(jnp.where(is_first_BL, position_BL, 0), axis=1)
        document_last_BL = lax.cummin(jnp.where(is_last_BL, position_BL, L), axis=1, reverse=True)
        last_BL = jnp.minimum(last_BL, document_last_BL)
    full_first_BM = (first_BL.reshape(B, -1, BLOCK).max(2) + BLOCK - 1) // BLOCK
    full_end_BM = (last_BL.reshape(B, -1, BLOCK).min(2) + 1) // BLOCK
    limits_B2L = jnp.stack([first_BL, last_BL], axis=1)
    return reads | {"limits": limits_B2L, "full": jnp.stack([full_first_BM, full_end_BM])}


def _among(reads: dict[str, Any], *names: str) -> tuple[str, ...]:
    """What belongs to each query: `names`, and its limits if it has any."""
    return *names, *(["limits"] if "limits" in reads else [])


def _hide(x, instead, is_partial, keys, limits):
    """x, with `instead` where a key is not within the limits; looked at only in tiles that are partial."""

    def hidden(x):
        first, last = limits()
        visible = keys() <= last if first is None else (keys() <= last) & (keys() >= first)
        return jnp.where(visible, x, instead)

    return lax.cond(is_partial, hidden, lambda x: x, x)


def _forward(b: Block) -> None:
    # Late blocks have the most keys: they go first. Keys are taken from the diagonal backwards: the first tile has a
    # key that each query sees and, with ALiBi, mostly the largest score.
    m = b.L // BLOCK - 1 - b.number
    first, count = b.range(m)
    last = first + count - 1
    pl.when(b.group == GROUPS)(lambda: b.copy_tiles(count, lambda i: (last - i) * BLOCK))

    @pl.when(b.group < GROUPS)
    def _():
        row0 = m * BLOCK + b.group * ROWS
        b.load_rows(row0)
        q, shape, is_partial = b.smem["q"].at[b.group], (ROWS, BLOCK), b.limits(m)
        row, limits = _row_limits(b, row0)
        column = b.numbers(BLOCK, OF_COLUMNS)
        column_bias = b.bias(column)

        def meet():
            b.arrive("turn", 0)
            b.wait("turn", 0)

        def step(i, carry):
            o, top, total = carry
            n, slot = last - i, lax.rem(i, b.num_slots)
            b.wait("k_ready", slot)
            scores = b.product(q, b.smem["k"].at[slot], meet)
            b.arrive("k_free", slot)
            scores = plus(scores * (b.scale * LOG2_E), across(column_bias, shape))
            scores = _hide(
                scores, _MASKED, is_partial(n), lambda: across(column, shape), lambda: limits(n * BLOCK, shape)
            )  # fmt: skip
            # The bias is slope * (column + position of the tile - row): what all columns share goes into the maximum.
            row_bias = b.bias(n * BLOCK - row)
            new_top = jnp.maximum(top, plus(scores.max(axis=1), row_bias))
            top_here = new_top if row_bias is None else new_top - row_bias
            p = jnp.exp2(scores - down(top_here, shape))
            shrink = jnp.exp2(top - new_top)
            total = total * shrink + p.sum(axis=1)
            o = o * down(shrink, o.shape)
            # The softmax of one warpgroup is done while the products of the other run: it waits for its turn.
            o, total, p = lax.optimization_barrier((o, total, p.astype(jnp.bfloat16)))
            b.arrive("turn", 0)
            b.wait("v_ready", slot)
            b.wait("turn", 0)
            (o,) = b.add_products((o, lambda: p, b.smem["v"].at[slot]))
            b.arrive("v_free", slot)
            return o, new_top, total

        pl.when(b.group == 1)(meet)
        start = b.zeros(ROWS, b.K), b.zeros(ROWS) - jnp.inf, b.zeros(ROWS)
        o, top, total = lax.fori_loop(0, count, step, start)
        pl.when(b.group == 0)(meet)
        q[...] = (o * down(1.0 / total, o.shape)).astype(jnp.bfloat16)
        b.smem["lse"].at[b.group][...] = top * (1.0 / LOG2_E) + jnp.log(total)
        b.store_rows(row0, o="q", lse="lse")


def _row_limits(b: Block, row0):
    """Positions of a warpgroup's queries; a function of a position to their first and last key, seen from there."""
    row = b.numbers(ROWS, OF_ROWS) + row0
    if "limits" not in b.smem:
        return row, lambda start, shape: (None, down(row - start, shape))
    first, last = (b.read(b.smem["limits"].at[b.group, i], OF_ROWS) for i in (0, 1))
    return row, lambda start, shape: (down(first - start, shape), down(last - start, shape))


def _backward_dq(b: Block) -> None:
    m = b.L // BLOCK - 1 - b.number
    first, count = (BLOCK // ROWS * each for each in b.range(m))
    pl.when(b.group == GROUPS)(lambda: b.copy_tiles(count, lambda i: (first + i) * ROWS))

    @pl.when(b.group < GROUPS)
    def _():
        row0 = m * BLOCK + b.group * ROWS
        b.load_rows(row0)
        q, g, lse, delta = (b.smem[name].at[b.group] for name in ("q", "g", "lse", "delta"))
        shape, is_partial = (ROWS, ROWS), b.limits(m)
        row, limits = _row_limits(b, row0)
        lse, delta = b.read(lse, OF_ROWS) * LOG2_E, b.read(delta, OF_ROWS)
        column = b.numbers(ROWS, OF_COLUMNS)
        column_bias = b.bias(column)

        def step(i, dq):
            key0, slot = (first + i) * ROWS, lax.rem(i, b.num_slots)
            k, v = b.smem["k"].at[slot], b.smem["v"].at[slot]
            row_bias = plus(-lse, b.bias(key0 - row))

            def softmax(scores):
                scores = plus(scores * (b.scale * LOG2_E), across(column_bias, shape))
                p = jnp.exp2(scores + down(row_bias, shape))
                return _hide(
                    p, 0.0, is_partial(lax.div(key0, BLOCK)),
                    lambda: across(column, shape), lambda: limits(key0, shape),
                )  # fmt: skip

            b.wait("k_ready", slot)
            p, dp = b.two_products(q, k, softmax, g, v)
            ds = (p * (dp - down(delta, shape))).astype(jnp.bfloat16)
            (dq,) = b.add_products((dq, lambda: ds, k))
            b.arrive("k_free", slot)
            return dq

        dq = lax.fori_loop(0, count, step, b.zeros(ROWS, b.K))
        q[...] = (dq * b.scale).astype(jnp.bfloat16)
        b.store_rows(row0, dq="q")


def _backward_dkv(b: Block) -> None:
    n = b.number
    first, count = (BLOCK // ROWS * each for each in b.range(n))
    pl.when(b.group == GROUPS)(lambda: b.copy_tiles(count, lambda i: (first + i) * ROWS))

    @pl.when(b.group < GROUPS)
    def _():
        row0 = n * BLOCK + b.group * ROWS
        b.load_rows(row0)
        k, v, shape = b.smem["k"].at[b.group], b.smem["v"].at[b.group], (ROWS, ROWS)
        row, column = b.numbers(ROWS, OF_ROWS) + row0, b.numbers(ROWS, OF_COLUMNS)
        column_bias = b.bias(column)

        def step(i, carry):
            dk, dv = carry
            query0, slot = (first + i) * ROWS, lax.rem(i, b.num_slots)
            q, g, lse, delta = (b.smem[name].at[slot] for name in ("q", "g", "lse", "delta"))
            is_partial = b.limits(lax.div(query0, BLOCK))(n)

            def limits():
                if "limits" not in b.smem:
                    return None, across(column + query0, shape)
                refs = (b.smem["limits"].at[slot, i] for i in (0, 1))
                return tuple(across(b.read(ref, OF_COLUMNS), shape) for ref in refs)

            def softmax(scores):
                shift = plus(b.read(lse, OF_COLUMNS) * LOG2_E, column_bias)
                scores = scores * (b.scale * LOG2_E) - across(shift, shape)
                p = jnp.exp2(plus(scores, down(b.bias(row - query0), shape)))
                return _hide(p, 0.0, is_partial, lambda: down(row, shape), limits)

            b.wait("q_ready", slot)
            p, dp = b.two_products(k, q, softmax, v, g)

            def ds():
                shifted = dp - across(b.read(delta, OF_COLUMNS), shape)
                return (p * shifted).astype(jnp.bfloat16)

            dv, dk = b.add_products((dv, lambda: p.astype(jnp.bfloat16), g), (dk, ds, q))
            b.arrive("q_free", slot)
            return dk, dv

        zeros = b.zeros(ROWS, b.K)
        dk, dv = lax.fori_loop(0, count, step, (zeros, zeros))
        k[...] = (dk * b.scale).astype(jnp.bfloat16)
        v[...] = dv.astype(jnp.bfloat16)
        b.store_rows(row0, dk="k", dv="v")
