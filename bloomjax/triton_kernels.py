"""The kernels of `flash_attention_gpu`: forward; dq; dk and dv.

Each program owns a tile of queries (forward, dq) or of keys (dk and dv) and walks over the others in steps; it alone
writes its tile. After FlashAttention-2 (arXiv 2307.08691), with ALiBi and all masks computed from positions.

Dimension key: O rows of the tile that a program owns, T rows of a step. Positions count from the start of the window.
"""

import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

_LOG2_E = math.log2(math.e)
_MASKED = -1e30  # finite: a row whose first steps are masked altogether stays free of NaN


class Tile(NamedTuple):
    """How one kernel divides its work: rows that a program owns, rows of a step, and Triton's two options."""

    own: int
    step: int
    num_warps: int
    num_stages: int


class Common(NamedTuple):
    """What every kernel reads besides its own arrays, as refs: the blocks to walk over, and what it sees of them."""

    first_block: Any
    end_block: Any
    slope: Any  # None: no bias
    first_key: Any  # of each query; None: 0
    last_key: Any  # of each query; None: its own
    document_end: Any  # of each token; None: the window's


class Static(NamedTuple):
    """What a kernel knows when it is traced."""

    tile: Tile
    owns_keys: bool
    num_tiles: int
    tiles_per_block: int
    steps_per_block: int
    head_dim: int
    is_exact: bool  # float32
    interpret: bool

    def own_tile(self, program):
        """The longest walks, from the last queries or the first keys, start first."""
        return program if self.owns_keys else self.num_tiles - 1 - program


def forward_kernel(static: Static, common: Common, q_ref, k_ref, v_ref, context_ref, lse_ref):
    """Owns queries; the logsumexp is natural."""
    own, step, common = static.tile.own, static.tile.step, _begin(common)
    first_q = own * static.own_tile(pl.program_id(0))
    q = _parts(q_ref, static)

    def body(n, carry, is_masked):
        sums, most_O, total_O = carry
        k, v = _parts(k_ref, static, n), _parts(v_ref, static, n)
        scores_OT = _scores(q, k, first_q, n * step, common, static, is_masked)
        new_most_O = jnp.maximum(most_O, jnp.max(scores_OT, axis=1))
        p_OT = _exp2(scores_OT - new_most_O[:, None], static)
        shrink_O = _exp2(most_O - new_most_O, static)
        total_O = total_O * shrink_O + jnp.sum(p_OT, axis=1)
        sums = _add([part * shrink_O[:, None] for part in sums], p_OT.astype(v_ref.dtype), v)
        return sums, new_most_O, total_O

    carry = _zeros(static), jnp.full((own,), _MASKED, jnp.float32), jnp.zeros((own,), jnp.float32)
    sums, most_O, total_O = _walk(body, carry, _key_spans(first_q, common, static))
    _store(context_ref, [part / total_O[:, None] for part in sums], static)
    lse_ref[...] = (most_O - _shift(own, common, static)) / _LOG2_E + jnp.log(total_O)


def dq_kernel(
    static: Static, common: Common, q_ref, k_ref, v_ref, g_ref, lse_ref, delta_ref, dq_ref
):
    """Owns queries; makes the scores again from their logsumexp."""
    own, step, common = static.tile.own, static.tile.step, _begin(common)
    first_q = own * static.own_tile(pl.program_id(0))
    q, g = _parts(q_ref, static), _parts(g_ref, static)
    lse_O1 = (lse_ref[...] * _LOG2_E + _shift(own, common, static))[:, None]
    delta_O1 = delta_ref[...][:, None]

    def body(n, dq, is_masked):
        k, v = _parts(k_ref, static, n), _parts(v_ref, static, n)
        scores_OT = _scores(q, k, first_q, n * step, common, static, is_masked)
        ds_OT = _exp2(scores_OT - lse_O1, static) * (_products(g, v) - delta_O1)
        return _add(dq, ds_OT.astype(k_ref.dtype), k)

    dq = _walk(body, _zeros(static), _key_spans(first_q, common, static))
    _store(dq_ref, [part * static.head_dim**-0.5 for part in dq], static)


def dkdv_kernel(
    static: Static, common: Common, q_ref, k_ref, v_ref, g_ref, lse_ref, delta_ref, dk_ref, dv_ref
):
    """Owns keys. Scores are made transposed, keys by queries: no matrix has to be transposed in registers."""
    own, step, common = static.tile.own, static.tile.step, _begin(common)
    first_k = own * static.own_tile(pl.program_id(0))
    k, v = _parts(k_ref, static), _parts(v_ref, static)

    def body(m, carry, is_masked):
        dk, dv = carry
        q, g = _parts(q_ref, static, m), _parts(g_ref, static, m)
        rows = pl.ds(m * step, step)
        scores_OT = _scores(k, q, m * step, first_k, common, static, is_masked)
        lse_T = lse_ref[rows] * _LOG2_E + _shift(step, common, static)
        p_OT = _exp2(scores_OT - lse_T[None, :], static)
        dv = _add(dv, p_OT.astype(g_ref.dtype), g)
        ds_OT = p_OT * (_products(v, g) - delta_ref[rows][None, :])
        return _add(dk, ds_OT.astype(q_ref.dtype), q), dv

    dk, dv = _walk(body, (_zeros(static), _zeros(static)), _query_spans(first_k, common, static))
    _store(dk_ref, [part * static.head_dim**-0.5 for part in dk], static)
    _store(dv_ref, dv, static)


# ---- scores ----


def _begin(common):
    """With the slope's value, for base 2."""
    if common.slope is None:
        return common
    return common._replace(slope=common.slope[...] * _LOG2_E)


def _scores(own, others, first_q, first_k, common, static, is_masked):
    """Base 2: q.k / sqrt(K) + slope * (key - query), in bfloat16 without the query's share of it, which `_shift` is.

    That makes ALiBi one operation a score instead of three. It costs up to 1e-5 of a probability where a slope is
    steep, of which bfloat16 sees nothing; float32 would.
    """
    q, k = _rows(static)
    distance = (first_k - first_q).astype(jnp.float32) + k.astype(jnp.float32)
    if static.is_exact:
        distance -= q.astype(jnp.float32)
    scale = jnp.float32(static.head_dim**-0.5 * _LOG2_E)
    if common.slope is None:
        scores_OT = _products(own, others) * scale
    else:
        scores_OT = _fma(_products(own, others), scale, common.slope * distance, static)
    if not is_masked:
        return scores_OT
    rows = pl.ds(first_q, static.tile.step) if static.owns_keys else slice(None)
    refs = common.first_key, common.last_key
    first_key, last_key = (None if ref is None else ref[rows].reshape(q.shape) for ref in refs)
    is_seen = first_k + k <= (first_q + q if last_key is None else last_key)
    if first_key is not None:
        is_seen &= first_k + k >= first_key
    return jnp.where(is_seen, scores_OT, _MASKED)


def _shift(num_queries, common, static):
    """What `_scores` has too much, in each of the queries from its first one on."""
    rows = jnp.arange(num_queries).astype(jnp.float32)
    return rows * (0.0 if static.is_exact or common.slope is None else common.slope)


def _rows(static):
    """Numbers of the queries and of the keys of a product, from 0 on, along their axes."""
    own_O1, step_1T = jnp.arange(static.tile.own)[:, None], jnp.arange(static.tile.step)[None, :]
    return (step_1T, own_O1) if static.owns_keys else (own_O1, step_1T)


# ---- walks ----


def _key_spans(first_q, common, static):
    """Steps [first, end) over keys, and whether they need a mask: not those that all queries of the tile see."""
    own, step = static.tile.own, static.tile.step
    first, end = (ref[...] * static.steps_per_block for ref in common[:2])
    if common.last_key is not None:
        return [(first, end, True)]
    end = jnp.minimum(end, (first_q + own + step - 1) // step)
    full_end = jnp.clip(first_q // step, first, end)
    if common.first_key is None:
        return [(first, full_end, False), (full_end, end, True)]
    full_first = jnp.clip((common.first_key[own - 1] + step - 1) // step, first, full_end)
    return [(first, full_first, True), (full_first, full_end, False), (full_end, end, True)]


def _query_spans(first_k, common, static):
    """The same over queries: no mask for those that see all keys of the tile."""
    own, step = static.tile.own, static.tile.step
    first, end = (ref[...] * static.steps_per_block for ref in common[:2])
    if common.last_key is not None:
        return [(first, end, True)]
    first = jnp.maximum(first, first_k // step)
    full_first = jnp.clip((first_k + own + step - 1) // step, first, end)
    if common.document_end is None:
        return [(first, full_first, True), (full_first, end, False)]
    full_end = jnp.clip(common.document_end[0] // step, full_first, end)
    return [(first, full_first, True), (full_first, full_end, False), (full_end, end, True)]


def _walk(body, carry, spans):
    for first, end, is_masked in spans:
        carry = jax.lax.fori_loop(first, end, functools.partial(body, is_masked=is_masked), carry)
    return carry


# ---- matrices, cut along head_dim into powers of two ----


def _cuts(head_dim):
    """Slices, the widest first."""
    cuts, first = [], 0
    for width in (128, 64, 32, 16):
        if head_dim - first >= width:
            cuts.append(slice(first, first + width))
            first += width
    return cuts


def _parts(ref, static, step=None):
    """An owned tile, or a step of all rows."""
    rows = slice(None) if step is None else pl.ds(step * static.tile.step, static.tile.step)
    return [ref[rows, cut] for cut in _cuts(static.head_dim)]


def _zeros(static):
    widths = [cut.stop - cut.start for cut in _cuts(static.head_dim)]
    return [jnp.zeros((static.tile.own, width), jnp.float32) for width in widths]


def _store(ref, parts, static):
    for cut, part in zip(_cuts(static.head_dim), parts, strict=True):
        ref[:, cut] = part.astype(ref.dtype)


def _products(own, others):
    """Of each owned row with each of the others, over head_dim: float32 [O, T]."""
    return functools.reduce(operator.add, map(_dot, own, (part.T for part in others)))


def _add(sums, weights_OT, others):
    return [part + _dot(weights_OT, other) for part, other in zip(sums, others, strict=True)]


def _dot(a, b):
    # Triton's default for float32 is TF32, which has 10 bits.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


# ---- instructions ----


def _fma(a, b, c, static):
    """a * b + c: XLA lets Triton round each product, where one instruction does both."""
    if static.interpret:
        return a * b + c
    b, c = (jnp.broadcast_to(each, a.shape) for each in (b, c))
    return _instruction("fma.rn.f32 $0, $1, $2, $3;", a, b, c)


def _exp2(a, static):
    """One instruction; the library's function spends three more on results below 2^-126, which are 0 here."""
    return jnp.exp2(a) if static.interpret else _instruction("ex2.approx.ftz.f32 $0, $1;", a)


def _instruction(text, *arguments):
    (result,) = plgpu.elementwise_inline_asm(
        text, args=arguments, constraints=",".join(["=f"] + ["f"] * len(arguments)), pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(arguments[0].shape, jnp.float32)],
    )  # fmt: skip
    return result
