"""Flash attention with ALiBi inside the kernel for TPUs, in Pallas (Mosaic): see `flash_attention.FlashKernel`.

Forward, a grid step holds one block of queries and a stretch of keys in VMEM and loops over the needed blocks of the
stretch. The backward pass makes the scores once for all three gradients, five matrix products a block (kernels of their
own for dq and for dk, dv need seven): a step holds one block of keys, and a stretch of queries with the sums of its dq.

Dimension key: B batch, L queries, S keys, H heads, K head_dim, M blocks of queries, N blocks of keys, C stretches of
queries. Numbers of one token each ("rows") are [.., 1, L] in memory, so that tokens lie along the 128 lanes.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from bloomjax.errors import BadInput
from bloomjax.flash_attention import Inputs

MAX_HEAD_DIM = 256
MAX_RANGES_BYTES = 960 * 2**10  # of the 1 MiB that a core has for scalars
_LANES = 128
# Finite: what a row gathers while it has met masked keys only is multiplied by exp2(-1e30) later.
_MASKED = -1e30
_LOG2_E = math.log2(math.e)
_NT = (((1,), (1,)), ((), ()))  # a b^T
_NN = (((1,), (0,)), ((), ()))  # a b
_TN = (((0,), (0,)), ((), ()))  # a^T b


@dataclasses.dataclass(frozen=True)
class TpuKernel:
    """FlashKernel for TPUs from v4 on: float32 or bfloat16, head_dim up to 256.

    Matrix products of float32 are float32's, not XLA's default for them on TPUs, one pass of bfloat16.

    Attributes:
      block_tokens: of queries and of keys, a multiple of 128; fewer for large heads, and where fewer pad less.
      stretch_bytes: of the keys, and of the values, that a step of the forward pass holds; half of it of the queries,
        and of the context's gradients, in the backward pass. At 2 MiB either compiles for v4 with 14 MiB of VMEM.
      interpret: run by XLA on any platform, for tests.
    """

    block_tokens: int = 512
    stretch_bytes: int = 2**21
    interpret: bool = False

    def takes(self, head_dim: int, dtype: Any) -> bool:
        return head_dim <= MAX_HEAD_DIM and dtype in (jnp.float32, jnp.bfloat16)

    def block_sizes(self, length: int, head_dim: int) -> tuple[int, int]:
        """The largest size that pads `length` by at most an eighth, or no more than the smallest does."""
        most = self.block_tokens * _LANES // max(_LANES, _padded(head_dim))
        sizes = range(max(_LANES, most // _LANES * _LANES), 0, -_LANES)
        most_padding = max(length // 8, -length % _LANES)
        size = next(size for size in sizes if -length % size <= most_padding)
        return size, size

    def forward(self, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        """See FlashKernel. BadInput for a dtype, head_dim or number of blocks that the kernel does not take."""
        return _forward(_Call(self, inputs), inputs)

    def backward(
        self, inputs: Inputs, lse_BHL: jax.Array, delta_BHL: jax.Array, g_BLHK: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See FlashKernel. BadInput as `forward`."""
        return _backward(_Call(self, inputs), inputs, lse_BHL, delta_BHL, g_BLHK)


TPU_KERNEL = TpuKernel()


class _Call:
    """What is known of a call when it is traced."""

    def __init__(self, kernel: TpuKernel, inputs: Inputs):
        self.B, self.L, self.H, self.K = inputs.q_BLHK.shape
        self.dtype = inputs.q_BLHK.dtype
        self.num_m = inputs.blocks.key_first_BHM.shape[2]
        self.num_n = inputs.blocks.query_first_BHN.shape[2]
        self.block_q, self.block_k = self.L // self.num_m, self.L // self.num_n
        self.interpret = kernel.interpret
        # The last key of each query, the document of each token; neither: a plain causal window.
        self.has_last_key = inputs.last_key_BL is not None
        self.has_documents = inputs.documents_BL is not None
        self.has_bias = inputs.slopes_H is not None
        self.is_causal = not (self.has_last_key or self.has_documents)
        self.stretch_n = _stretch(kernel.stretch_bytes, self.num_n, self.block_k, self)
        self.stretch_m = _stretch(kernel.stretch_bytes // 2, self.num_m, self.block_q, self)
        self.num_c = pl.cdiv(self.num_m, self.stretch_m)
        if not kernel.takes(self.K, self.dtype):
            raise BadInput(
                f"attention kernel 'flash_tpu' takes a head_dim up to {MAX_HEAD_DIM} in bfloat16 or float32, "
                f"not {self.K} in {self.dtype}; take 'xla_blocked'"
            )
        ranges_bytes = 8 * self.B * self.H * max(self.num_m, self.num_n + self.num_c)
        if ranges_bytes > MAX_RANGES_BYTES:
            raise BadInput(
                f"{self.B} x {self.L} tokens with {self.H} heads on one device: attention kernel 'flash_tpu' would "
                f"need {ranges_bytes} bytes for its ranges of blocks and has {MAX_RANGES_BYTES}; take a smaller "
                "StepOptions.microbatch_size_samples"
            )

    def cost(self, num_products: int, num_calls: int = 1) -> pl.CostEstimate:
        """2mkn of the matrix products of a causal window without documents or skipping, over `num_calls` equal calls.

        Each block with a visible key counts whole, as it is computed: at 2048 tokens and blocks of 512 that are
        10/16 of the square, where the model's FLOPs have half of it. Bytes: each array once.
        """
        last_keys = (self.block_q * (m + 1) - 1 for m in range(self.num_m))
        num_blocks = self.B * self.H * sum(key // self.block_k + 1 for key in last_keys)
        num_scores = num_blocks * self.block_q * self.block_k
        array_bytes = self.B * self.H * self.L * self.K * self.dtype.itemsize
        return pl.CostEstimate(
            flops=2 * num_products * num_scores * self.K // num_calls,
            transcendentals=num_scores // num_calls,
            bytes_accessed=(num_products + 2) * array_bytes // num_calls,
        )

    def slopes(self, inputs: Inputs) -> jax.Array:
        """float32 [H]; read only where there is a bias."""
        slopes_H = inputs.slopes_H
        return jnp.zeros(self.H) if slopes_H is None else slopes_H.astype(jnp.float32)

    def slope(self, slopes_ref, h):
        return slopes_ref[h] * _LOG2_E if self.has_bias else None

    def visible(self, q_position, k_position, q_rows, k_rows):
        """bool, of a block in either orientation; `q_rows` and `k_rows` are those of its queries and keys (`_rows`)."""
        visible = k_position <= (q_rows[0] if self.has_last_key else q_position)
        return visible & (q_rows[-1] == k_rows[-1]) if self.has_documents else visible


def _padded(size: int) -> int:
    """In whole vectors of 128 lanes."""
    return pl.cdiv(size, _LANES) * _LANES


def _stretch(stretch_bytes: int, num_blocks: int, block: int, call: _Call) -> int:
    """Blocks of one stretch: all stretches about equal, none larger than `stretch_bytes`."""
    most = max(1, stretch_bytes // (block * _padded(call.K) * call.dtype.itemsize))
    return pl.cdiv(num_blocks, pl.cdiv(num_blocks, most))


def _rows(inputs: Inputs) -> tuple[jax.Array, ...]:
    """What masks depend on beside positions, int32 [B, 1, L] each: last keys, documents."""
    given = inputs.last_key_BL, inputs.documents_BL
    return tuple(a.astype(jnp.int32)[:, None] for a in given if a is not None)


def _specs(tokens, K, index):
    """A head's part of [B, H, L, K], of [B, H, 1, L] and of [B, 1, L]: the tokens of block `index(b, h, ...)`."""
    return (
        pl.BlockSpec((None, None, tokens, K), lambda b, h, *at: (b, h, index(b, h, *at), 0)),
        pl.BlockSpec((None, None, 1, tokens), lambda b, h, *at: (b, h, 0, index(b, h, *at))),
        pl.BlockSpec((None, 1, tokens), lambda b, h, *at: (b, 0, index(b, h, *at))),
    )


def _dot(a, b, dimensions):
    # Named also for bfloat16, whose products are exact: a default from outside would be refused.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def _tokens(block, size):
    """The slice of a block within its stretch."""
    return pl.ds(pl.multiple_of(block * size, size), size)


def _positions(block, size, axis):
    """int32 positions of a block's tokens, [size, 1] (axis 0) or [1, size] (axis 1)."""
    shape = (size, 1) if axis == 0 else (1, size)
    return block * size + lax.broadcasted_iota(jnp.int32, shape, axis)


def _column(row):
    """[1, size] to [size, 128], equal along lanes."""
    return jnp.transpose(jnp.broadcast_to(row, (_LANES, row.shape[1])))


def _widen(column, size):
    """[tokens, 128], equal along lanes, to [tokens, size]."""
    return jnp.tile(column, (1, _padded(size) // _LANES))[:, :size]


def _log2_scores(products, slope, q_position, k_position, visible):
    """Biased (unless slope is None) and masked scores, float32, from products that are scaled; in units of log2, as
    `slope` is, for exp2."""
    scores = products
    if slope is not None:
        scores += slope * (k_position.astype(jnp.float32) - q_position.astype(jnp.float32))
    return scores if visible is None else jnp.where(visible, scores, _MASKED)


def _two_loops(first, middle, end, body):
    """body(i, False) for first <= i < middle, then body(i, True) for middle <= i < end."""
    middle = jnp.clip(middle, first, jnp.maximum(first, end))
    lax.fori_loop(first, middle, lambda i, _: body(i, False), None)
    lax.fori_loop(middle, end, lambda i, _: body(i, True), None)


# ---- forward: grid [B, H, M, stretches of keys] ----


def _forward_kernel(call, first_ref, end_ref, slopes_ref, q_ref, k_ref, v_ref, q_rows, k_rows,
                    context_ref, lse_ref, m_ref, l_ref, acc_ref, columns):  # fmt: skip
    b, h, m, j = (pl.program_id(axis) for axis in range(4))
    block_q, block_k = call.block_q, call.block_k
    at = (b * call.H + h) * call.num_m + m
    first, end, slope = first_ref[at], end_ref[at], call.slope(slopes_ref, h)
    # After the last stretch with a needed block the loops are empty.
    here = (lax.div(first, call.stretch_n) + j) * call.stretch_n

    @pl.when(j == 0)
    def _():
        m_ref[...] = jnp.full(m_ref.shape, _MASKED, jnp.float32)
        l_ref[...] = jnp.zeros(l_ref.shape, jnp.float32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)
        for column_ref, row_ref in zip(columns, q_rows, strict=True):
            column_ref[...] = _column(row_ref[...])

    def body(n, is_masked):
        keys = _tokens(n - here, block_k)
        positions = _positions(m, block_q, 0), _positions(n, block_k, 1)
        visible = None
        if is_masked:
            q_columns = [_widen(ref[...], block_k) for ref in columns]
            visible = call.visible(*positions, q_columns, [ref[:, keys] for ref in k_rows])
        products = (call.K**-0.5 * _LOG2_E) * _dot(q_ref[...], k_ref[keys, :], _NT)
        scores = _log2_scores(products, slope, *positions, visible)
        largest = m_ref[...]
        m_ref[...] = jnp.maximum(largest, jnp.max(scores, axis=1, keepdims=True))
        shrink = jnp.exp2(largest - m_ref[...])
        p = jnp.exp2(scores - _widen(m_ref[...], block_k))
        # Lane by lane; the lanes of a row are added at the end.
        sums = functools.reduce(jnp.add, (p[:, i : i + _LANES] for i in range(0, block_k, _LANES)))
        l_ref[...] = shrink * l_ref[...] + sums
        context = _dot(p.astype(v_ref.dtype), v_ref[keys, :], _NN)
        acc_ref[...] = _widen(shrink, call.K) * acc_ref[...] + context

    # Blocks whose last key is not after the first query need no mask.
    middle = lax.div(m * block_q, block_k) if call.is_causal else 0
    _two_loops(jnp.maximum(first, here), middle, jnp.minimum(end, here + call.stretch_n), body)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        log_sum = jnp.log(jnp.sum(l_ref[...], axis=1, keepdims=True))
        # An exact division is a dozen instructions on a TPU, and the logarithm is needed anyway.
        context_ref[...] = (acc_ref[...] * jnp.exp(-log_sum)).astype(context_ref.dtype)
        lse_ref[...] = jnp.transpose(m_ref[...] / _LOG2_E + log_sum)[:1]


def _forward(call: _Call, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    B, L, H, K, block_q = call.B, call.L, call.H, call.K, call.block_q
    stretch, rows = call.stretch_n, _rows(inputs)

    def stretch_of(b, h, m, j, first_ref, end_ref, _):
        """From the first to the last that this block of queries needs, where it stays: no other is fetched."""
        at = (b * H + h) * call.num_m + m
        last = lax.div(jnp.maximum(end_ref[at] - 1, 0), stretch)
        return jnp.minimum(lax.div(first_ref[at], stretch) + j, last)

    queries, lse_row, query_row = _specs(block_q, K, lambda b, h, m, *_: m)
    keys, _, key_row = _specs(stretch * call.block_k, K, stretch_of)
    statistic = pltpu.VMEM((block_q, _LANES), jnp.float32)
    columns = (pltpu.VMEM((block_q, _LANES), jnp.int32),) * len(rows)
    arrays = (jnp.swapaxes(a, 1, 2) for a in (inputs.q_BLHK, inputs.k_BSHK, inputs.v_BSHK))
    ranges = (a.reshape(-1) for a in (inputs.blocks.key_first_BHM, inputs.blocks.key_end_BHM))
    of = jax.ShapeDtypeStruct
    context_BHLK, lse_BH1L = pl.pallas_call(
        functools.partial(_forward_kernel, call),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, H, call.num_m, pl.cdiv(call.num_n, stretch)),
            in_specs=[queries, keys, keys, (query_row,) * len(rows), (key_row,) * len(rows)],
            out_specs=[queries, lse_row],
            scratch_shapes=[statistic, statistic, pltpu.VMEM((block_q, K), jnp.float32), columns],
        ),
        out_shape=[of((B, H, L, K), call.dtype), of((B, H, 1, L), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=call.cost(2),
        interpret=call.interpret,
        name="flash_forward",
    )(*ranges, call.slopes(inputs), *arrays, rows, rows)
    return jnp.swapaxes(context_BHLK, 1, 2), lse_BH1L[:, :, 0]


# ---- backward: grid [B, H, N], for each stretch of queries ----


def _backward_kernel(call, c_ref, key_first_ref, key_end_ref, query_first_ref, query_end_ref, slopes_ref, q_ref,
                     k_ref, v_ref, g_ref, lse_ref, delta_ref, q_rows, k_rows, sums, dq_ref, dk_ref, dv_ref,
                     dq_acc_ref, dk_acc_ref, dv_acc_ref):  # fmt: skip
    """Blocks are [keys, queries]: what is one number a query is a row then, and need not be made a column."""
    b, h, j = (pl.program_id(axis) for axis in range(3))
    block_q, block_k, scale = call.block_q, call.block_k, call.K**-0.5
    at = b * call.H + h
    slope, here = call.slope(slopes_ref, h), c_ref[0] * call.stretch_m
    n, end_n = key_first_ref[at] + j, key_end_ref[at]

    @pl.when(j == 0)
    def _():
        dq_acc_ref[...] = jnp.zeros(dq_acc_ref.shape, jnp.float32)

    @pl.when(n < end_n)
    def _():
        dk_acc_ref[...] = jnp.zeros(dk_acc_ref.shape, jnp.float32)
        dv_acc_ref[...] = jnp.zeros(dv_acc_ref.shape, jnp.float32)
        k_columns = [_widen(_column(ref[...]), block_q) for ref in k_rows]

        def body(m, is_unmasked):
            queries = _tokens(m - here, block_q)
            positions = _positions(m, block_q, 1), _positions(n, block_k, 0)
            visible = None
            if not is_unmasked:
                visible = call.visible(*positions, [ref[:, queries] for ref in q_rows], k_columns)
            q, g, k = q_ref[queries, :], g_ref[queries, :], k_ref[...]
            products = (scale * _LOG2_E) * _dot(k, q, _NT)
            scores = _log2_scores(products, slope, *positions, visible)
            p = jnp.exp2(scores - _LOG2_E * lse_ref[:, queries])
            dv_acc_ref[...] += _dot(p.astype(g.dtype), g, _NN)
            ds = (p * (_dot(v_ref[...], g, _NT) - delta_ref[:, queries])).astype(q.dtype)
            dk_acc_ref[...] += _dot(ds, q, _NN)
            dq_acc_ref[queries, :] += _dot(ds, k, _TN)

        first = jnp.maximum(query_first_ref[at * call.num_n + n], here)
        end = jnp.minimum(query_end_ref[at * call.num_n + n], here + call.stretch_m)
        # Blocks whose first query is not before the last key need no mask.
        middle = lax.div((n + 1) * block_k + block_q - 2, block_q) if call.is_causal else end
        _two_loops(first, middle, end, body)
        dk, dv = scale * dk_acc_ref[...], dv_acc_ref[...]
        if sums:
            dk, dv = dk + sums[0][...], dv + sums[1][...]
        dk_ref[...], dv_ref[...] = dk.astype(dk_ref.dtype), dv.astype(dv_ref.dtype)

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        dq_ref[...] = (scale * dq_acc_ref[...]).astype(dq_ref.dtype)


def _backward(call: _Call, inputs: Inputs, lse_BHL, delta_BHL, g_BLHK):
    B, L, H, K = call.B, call.L, call.H, call.K
    arrays = inputs.q_BLHK, inputs.k_BSHK, inputs.v_BSHK, g_BLHK
    arrays = [jnp.swapaxes(a, 1, 2) for a in arrays] + [lse_BHL[:, :, None], delta_BHL[:, :, None]]
    run = functools.partial(_backward_of_stretch, call, inputs, arrays)
    if call.num_c == 1:
        all_BH = jnp.full((B, H), call.num_n, jnp.int32)
        (dk, dv), dq = run((), (jnp.int32(0), jnp.zeros_like(all_BH), all_BH))
    else:
        starts = range(0, call.num_m, call.stretch_m)
        parts = [slice(start, start + call.stretch_m) for start in starts]
        first_CBH = jnp.stack([inputs.blocks.key_first_BHM[:, :, part].min(2) for part in parts])
        end_CBH = jnp.stack([inputs.blocks.key_end_BHM[:, :, part].max(2) for part in parts])
        zeros = jnp.zeros((B, H, L, K), jnp.float32)
        (dk, dv), dq = lax.scan(run, (zeros, zeros), (jnp.arange(call.num_c), first_CBH, end_CBH))
        dq = jnp.moveaxis(dq, 0, 2).reshape(B, H, -1, K)[:, :, :L]
    dq, dk, dv = (jnp.swapaxes(a, 1, 2).astype(call.dtype) for a in (dq, dk, dv))
    return dq, dk, dv


def _backward_of_stretch(call: _Call, inputs: Inputs, arrays, sums, c_and_range):
    """(dk, dv), dq: all keys' [B, H, L, K], and that of stretch c of the queries.

    With `sums`, dk and dv of other stretches in float32, it adds to them, and touches only the blocks of keys in the
    range of the stretch, which must not be empty. Without, dk and dv are of the inputs' dtype.
    """
    B, L, H, K, stretch, rows = call.B, call.L, call.H, call.K, call.stretch_m, _rows(inputs)
    c, key_first_BH, key_end_BH = c_and_range

    def block_of(b, h, j, c, first_ref, end_ref, *_):
        """Stays at the last one that is needed: no other is fetched or written."""
        return jnp.maximum(jnp.minimum(first_ref[b * H + h] + j, end_ref[b * H + h] - 1), 0)

    size = stretch * call.block_q
    queries, number, query_row = _specs(size, K, lambda b, h, j, c, *_: c[0])
    keys, _, key_row = _specs(call.block_k, K, block_of)
    blocks = inputs.blocks
    ranges = key_first_BH, key_end_BH, blocks.query_first_BHN, blocks.query_end_BHN
    scalars = c[None], *(a.reshape(-1) for a in ranges), call.slopes(inputs)
    before_sums = len(scalars) + len(arrays) + 2 * len(rows)
    key_grad = jax.ShapeDtypeStruct((B, H, L, K), jnp.float32 if sums else call.dtype)
    dq, dk, dv = pl.pallas_call(
        functools.partial(_backward_kernel, call),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(B, H, call.num_n),
            in_specs=[queries, keys, keys, queries, number, number, (query_row,) * len(rows),
                      (key_row,) * len(rows), (keys,) * len(sums)],
            out_specs=[_specs(size, K, lambda *_: 0)[0], keys, keys],
            scratch_shapes=[pltpu.VMEM((num, K), jnp.float32) for num in (size, call.block_k, call.block_k)],
        ),
        out_shape=[jax.ShapeDtypeStruct((B, H, size, K), call.dtype), key_grad, key_grad],
        input_output_aliases={before_sums + i: 1 + i for i in range(len(sums))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=call.cost(5, call.num_c),
        interpret=call.interpret,
        name="flash_backward",
    )(*scalars, *arrays, rows, rows, sums)  # fmt: skip
    return (dk, dv), dq
