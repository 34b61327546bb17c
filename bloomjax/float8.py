"""Rounding to 8 bits with one scale a tensor, found anew each time: e4m3 for what goes forward, e5m2 for gradients.

Micikevicius et al. 2022, "FP8 formats for deep learning" (arXiv 2209.05433). Tensor cores from NVIDIA's Ada and Hopper
on multiply these numbers; others compute the same products in bfloat16, which holds each of them.
"""

import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bloomjax.errors import BadInput

FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2
_FIRST_CAPABILITY = 8.9  # Ada; Hopper is 9.0


class Operand(NamedTuple):
    """An array of any float dtype, and what it is to be multiplied by (float32 scalar; None for 1)."""

    values: jax.Array
    scale: jax.Array | None


def quantize(x: jax.Array, dtype: Any) -> Operand:
    """`x` rounded to `dtype` after division by the least power of two with which nothing overflows.

    A power of two costs no precision, in bfloat16 neither. What is not finite stays so: the step's guard has to see it.
    """
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    mantissa, exponent = jnp.frexp(largest / float(jnp.finfo(dtype).max))
    exponent = exponent - (mantissa == 0.5)  # of exactly a power of two
    # Not below float32's normal numbers: a tensor of zeros, or nearly so, has any scale.
    scale = jnp.ldexp(jnp.float32(1), jnp.maximum(exponent, -100))  # exp2 is not exact
    return Operand((x.astype(jnp.float32) / scale).astype(dtype), scale)


def einsum(spec: str, a: Operand, b: Operand, dtype: Any) -> jax.Array:
    """einsum(spec, a, b) in `dtype`, summed in float32; without scales plainly that of the values."""
    if a.scale is None or b.scale is None:
        return jnp.einsum(spec, a.values, b.values, preferred_element_type=dtype)
    # XLA:GPU makes of the conversions, the product and the scale one float8 matmul.
    a_values, b_values = a.values.astype(jnp.bfloat16), b.values.astype(jnp.bfloat16)
    y = jnp.einsum(spec, a_values, b_values, preferred_element_type=dtype)
    return y * (a.scale * b.scale).astype(dtype)


def check_devices(devices: Iterable[Any], compiler_options: Mapping[str, Any] | None) -> None:
    """BadInput unless these devices multiply float8; on CPUs, which are for trying it, it says that they do not.

    Args:
      devices: jax's, of one kind; absent ones will do.
      compiler_options: of the program. XLA's own (Triton) matmuls would convert to bfloat16 first.
    """
    device = next(iter(devices))
    if device.platform == "cpu":
        print(
            "bloomjax: BloomConfig.matmul_dtype='float8' on a CPU is the same rounding, computed in bfloat16: slower "
            "than without",
            file=sys.stderr,
        )
        return
    capability = str(getattr(device, "compute_capability", ""))
    try:
        has_float8 = device.platform in ("gpu", "cuda") and float(capability) >= _FIRST_CAPABILITY
    except ValueError:  # AMD's have names
        has_float8 = False
    if not has_float8:
        kind = device.device_kind or f"GPU of compute capability {capability}"
        raise BadInput(
            f"BloomConfig.matmul_dtype='float8' needs an NVIDIA GPU of compute capability {_FIRST_CAPABILITY} or more "
            f"(H100, H200, RTX 4090), and this is a {kind}: leave it None"
        )
    if (compiler_options or {}).get("xla_gpu_enable_triton_gemm", True):
        raise BadInput(
            "BloomConfig.matmul_dtype='float8' needs StepOptions.compiler_options with 'xla_gpu_enable_triton_gemm': "
            "False, as gin/hardware/h100_8.gin has them: else XLA multiplies in bfloat16"
        )
