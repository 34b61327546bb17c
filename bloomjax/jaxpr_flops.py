"""FLOPs of the matrix products of a traced program, those that are computed twice to save memory included.

The compilers' own `cost_analysis` counts the body of a loop once, which for a model that loops over its layers is wrong
by their number. The traced program has the length of each loop.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple


class FlopsOf(NamedTuple):
    """FLOPs of all devices together, and what is not in them.

    flops: 2mkn for each product of m x k by k x n, as often as it runs; of a kernel what its cost estimate says, of
    cuDNN's attention two products of causal (half) scores forward and five backward.
    opaque: names of what may hold matrix products that could not be counted, each once: kernels, convolutions, linear
        algebra, and "while" for loops of unknown length, whose matrix products are counted once.
    """

    flops: float
    opaque: tuple[str, ...]


# Neither elementwise nor made of other operations: what they compute is not to be seen, or is no plain product.
_OPAQUE = {
    "pallas_call", "mpmd_map", "ffi_call", "custom_partitioning", "pure_callback", "io_callback", "triton_kernel_call",
    "tpu_custom_call", "mosaic_gpu", "conv_general_dilated", "ragged_dot", "ragged_dot_general", "cholesky",
    "eig", "eigh", "lu", "qr", "svd", "triangular_solve", "custom_linear_solve", "fft", "scaled_matmul",
    "dot_product_attention_fwd_wrapper", "dot_product_attention_bwd_wrapper",
}  # fmt: skip


def matmul_flops(jaxpr: Any) -> FlopsOf:
    """Of a (closed) jaxpr, such as `jax.jit(f).trace(*arguments).jaxpr`.

    Loops count as often as they run, a conditional as its most expensive branch, and the body of a shard_map once for
    each device of its manual axes: what several devices compute alike counts several times.
    """
    flops, opaque = _count(getattr(jaxpr, "jaxpr", jaxpr))
    return FlopsOf(float(flops), tuple(dict.fromkeys(opaque)))


def _count(jaxpr: Any) -> tuple[int, list[str]]:
    """Exact FLOPs, and names with repetitions."""
    flops, opaque = 0, []
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            flops += _dot_flops(equation)
            continue
        if name in _OPAQUE:
            own = _kernel_flops(equation)
            flops += own or 0
            opaque += [_name(name, params)] * (own is None)
            continue
        counts = [_count(inner) for inner in _inner(params)]
        opaque += [each for _, names in counts for each in names]
        times = 1
        if name == "scan":
            times = params["length"]
        elif name == "shard_map":
            times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
        elif name == "cond":
            counts = [max(counts, key=lambda count: count[0])]
        elif name == "while" and any(count[0] for count in counts):
            opaque.append("while")
        flops += times * sum(count[0] for count in counts)
    return flops, opaque


def _kernel_flops(equation: Any) -> int | None:
    """What a kernel says of itself, or what is known of it; None for nothing."""
    if estimate := equation.params.get("cost_estimate"):
        return estimate.flops
    products = {
        "dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5
    }.get(equation.primitive.name)  # fmt: skip
    if products is None:
        return None
    q_shape, k_shape = (equation.invars[i].aval.shape for i in (0, 1))
    if equation.params["layout"] == 0:  # cuDNN's BTNH; causal, so half of the scores
        return products * math.prod(q_shape) * k_shape[1]
    return products * math.prod(q_shape) * k_shape[2]


def _dot_flops(equation: Any) -> int:
    """2mkn, times the batch dimensions."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return (
        2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    )


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """Jaxprs among the parameters of an equation; those of rules that are not run yet are functions, not jaxprs."""
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            each = getattr(each, "jaxpr", each)
            if hasattr(each, "eqns"):
                yield each


def _name(primitive: str, params: dict[str, Any]) -> str:
    """A kernel's own name, too, if it has one."""
    own = params.get("target_name") or params.get("name") or ""
    own = own or getattr(params.get("name_and_src_info"), "name", "")
    return f"{primitive} {own}" if own else primitive
