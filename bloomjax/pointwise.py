"""LayerNorm and GELU in float32, with gradients written out: one pass over an activation where autodiff's take several.

Both keep their argument alone for the backward pass. Dimension key: B batch, L length, D emb_dim.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp


def layer_norm(
    x_BLD: jax.Array, scale_D: Any, bias_D: Any, epsilon: float, multiplier: float = 1.0
) -> Any:
    """`multiplier` times the LayerNorm over D, in float32, returned in x's dtype."""
    if multiplier != 1.0:
        scale_D, bias_D = scale_D * multiplier, bias_D * multiplier
    return _layer_norm(epsilon, x_BLD, scale_D, bias_D)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _layer_norm(epsilon, x_BLD, scale_D, bias_D):
    return _layer_norm_forward(epsilon, x_BLD, scale_D, bias_D)[0]


def _statistics(x32_BLD, epsilon):
    """Mean and 1 / standard deviation, [B, L, 1]."""
    mean_BL1 = jnp.mean(x32_BLD, axis=-1, keepdims=True)
    variance_BL1 = jnp.mean(jnp.square(x32_BLD - mean_BL1), axis=-1, keepdims=True)
    return mean_BL1, jax.lax.rsqrt(variance_BL1 + epsilon)


def _layer_norm_forward(epsilon, x_BLD, scale_D, bias_D):
    x32_BLD = x_BLD.astype(jnp.float32)
    mean_BL1, rstd_BL1 = _statistics(x32_BLD, epsilon)
    y_BLD = (x32_BLD - mean_BL1) * rstd_BL1 * scale_D[None, None] + bias_D[None, None]
    return y_BLD.astype(x_BLD.dtype), (x_BLD, scale_D)


def _layer_norm_backward(epsilon, residuals, g_BLD):
    x_BLD, scale_D = residuals
    x32_BLD, g32_BLD = x_BLD.astype(jnp.float32), g_BLD.astype(jnp.float32)
    # Behind a barrier, or XLA:GPU computes them again for the sums over tokens, and writes their float32 summands.
    mean_BL1, rstd_BL1 = jax.lax.optimization_barrier(_statistics(x32_BLD, epsilon))
    y_BLD = (x32_BLD - mean_BL1) * rstd_BL1
    dy_BLD = g32_BLD * scale_D[None, None]
    shift_BL1 = jnp.mean(dy_BLD, axis=-1, keepdims=True)
    slope_BL1 = jnp.mean(dy_BLD * y_BLD, axis=-1, keepdims=True)
    dx_BLD = (dy_BLD - shift_BL1 - y_BLD * slope_BL1) * rstd_BL1
    dscale_D, dbias_D = jnp.sum(g32_BLD * y_BLD, axis=(0, 1)), jnp.sum(g32_BLD, axis=(0, 1))
    return dx_BLD.astype(x_BLD.dtype), dscale_D, dbias_D


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def gelu(x: jax.Array) -> Any:
    """GELU in its tanh form, as BLOOM's (0.79788456 = sqrt(2/pi), 0.044715), computed in float32."""
    return _gelu(x)


@jax.custom_vjp
def _gelu(x):
    x32 = x.astype(jnp.float32)
    y = 0.5 * x32 * (1.0 + jnp.tanh(math.sqrt(2.0 / math.pi) * (x32 + 0.044715 * x32**3)))
    return y.astype(x.dtype)


def _gelu_backward(x, g):
    """With (1 + tanh u) / 2 = sigmoid(2 u): a tanh would be that of the recomputed GELU, and be kept in float32."""
    x32 = x.astype(jnp.float32)
    factor = 2.0 * math.sqrt(2.0 / math.pi)
    s = jax.nn.sigmoid(factor * (x32 + 0.044715 * x32**3))
    slope = s + x32 * s * (1.0 - s) * factor * (1.0 + 3 * 0.044715 * x32**2)
    return ((g.astype(jnp.float32) * slope).astype(x.dtype),)


_gelu.defvjp(lambda x: (_gelu(x), x), _gelu_backward)
