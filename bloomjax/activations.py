"""What stands between the two matrices of an MLP: GELU, squared ReLU, or a gate (BloomConfig.activation).

A gated unit has two inputs, gate and value, which one matrix product makes. All compute in float32, with gradients
written out, and keep for the backward pass what that product made, nothing else.
Dimension key: B batch, L length, D emb_dim, F mlp_dim, g the two inputs of a gated unit.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bloomjax.partitioning import constrain_activation
from bloomjax.pointwise import gelu

_GELU = math.sqrt(2.0 / math.pi), 0.044715


@dataclasses.dataclass(frozen=True)
class Activation:
    """One input a unit; what is made of it is `of`."""

    @property
    def num_inputs(self) -> int:
        """Matrices of D x F before it."""
        return 1

    def default_mlp_dim(self, emb_dim: int) -> int:
        """What mlp_dim=None stands for."""
        return 4 * emb_dim

    def mlp_in(self, dense: Callable[..., Any], h_BLD: Any, mlp_dim: int, init_std: float) -> Any:
        """The hidden layer [B, L, F]; `dense` is `dense.Dense` but for what is given here. Called inside the block."""
        D, F = h_BLD.shape[-1], mlp_dim
        h_BLF = dense(
            "BLD,DF->BLF", ("embed", "mlp"), (D, F), ("mlp",), init_std, name="mlp_in"
        )(h_BLD)  # fmt: skip
        h_BLF = constrain_activation(h_BLF, "batch", "length", "mlp")
        return self.of(checkpoint_name(h_BLF, "pre_activation"))

    def of(self, h_BLF: Any) -> Any:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Gelu(Activation):
    """GELU in its tanh form. BLOOM's."""

    def of(self, h_BLF: Any) -> Any:
        return gelu(h_BLF)


@dataclasses.dataclass(frozen=True)
class SquaredRelu(Activation):
    """max(x, 0)^2 (So et al. 2021, arXiv 2109.08668)."""

    def of(self, h_BLF: Any) -> Any:
        return _squared_relu(h_BLF)


@jax.custom_vjp
def _squared_relu(x):
    return jnp.square(jax.nn.relu(x.astype(jnp.float32))).astype(x.dtype)


def _squared_relu_backward(x, g):
    return ((2.0 * jax.nn.relu(x.astype(jnp.float32)) * g.astype(jnp.float32)).astype(x.dtype),)


_squared_relu.defvjp(lambda x: (_squared_relu(x), x), _squared_relu_backward)


@dataclasses.dataclass(frozen=True)
class Gated(Activation):
    """gate(x W) * (x V), in place of an activation of x W (Shazeer 2020, arXiv 2002.05202).

    Three matrices in place of two: without mlp_dim a unit's width is two thirds of 4 emb_dim, rounded to the nearest
    multiple of 16, so that parameters and FLOPs stay (5,456 at 2,048, as in BigScience's tr9).
    """

    @property
    def num_inputs(self) -> int:
        return 2

    def default_mlp_dim(self, emb_dim: int) -> int:
        return max(16, 16 * round(8 * emb_dim / 3 / 16))

    def mlp_in(self, dense: Callable[..., Any], h_BLD: Any, mlp_dim: int, init_std: float) -> Any:
        D, F = h_BLD.shape[-1], mlp_dim
        h_BLgF = dense(
            "BLD,DgF->BLgF", ("embed", "gate", "mlp"), (D, 2, F), ("gate", "mlp"), init_std, name="mlp_in"
        )(h_BLD)  # fmt: skip
        h_BLgF = constrain_activation(h_BLgF, "batch", "length", "gate", "mlp")
        return self.of(checkpoint_name(h_BLgF, "pre_activation"))

    def of(self, h_BLF: Any) -> Any:
        return _gated(self, h_BLF)

    def gate(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Its value and its slope at float32 x."""
        raise NotImplementedError


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated(kind: Gated, h_BLgF):
    a_BLF, b_BLF = _inputs(h_BLgF)
    return (kind.gate(a_BLF)[0] * b_BLF).astype(h_BLgF.dtype)


def _inputs(h_BLgF):
    return (x.squeeze(2) for x in jnp.split(h_BLgF.astype(jnp.float32), 2, axis=2))


def _gated_backward(kind, h_BLgF, g_BLF):
    a_BLF, b_BLF = _inputs(h_BLgF)
    g_BLF = g_BLF.astype(jnp.float32)
    value_BLF, slope_BLF = kind.gate(a_BLF)
    grads = jnp.stack([g_BLF * b_BLF * slope_BLF, g_BLF * value_BLF], axis=2)
    return (grads.astype(h_BLgF.dtype),)


_gated.defvjp(lambda kind, h: (_gated(kind, h), h), _gated_backward)


@dataclasses.dataclass(frozen=True)
class SwiGlu(Gated):
    """x sigmoid(x) as gate."""

    def gate(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        s = jax.nn.sigmoid(x)
        return x * s, s + x * s * (1.0 - s)


@dataclasses.dataclass(frozen=True)
class GeGlu(Gated):
    """GELU as gate, in the tanh form of BLOOM's (Megatron-DeepSpeed's GEGLU took the exact one)."""

    def gate(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        root, cubic = _GELU
        s = jax.nn.sigmoid(2.0 * root * (x + cubic * x**3))
        return x * s, s + x * s * (1.0 - s) * 2.0 * root * (1.0 + 3 * cubic * x**2)


@dataclasses.dataclass(frozen=True)
class ReGlu(Gated):
    """max(x, 0) as gate."""

    def gate(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.nn.relu(x), (x > 0).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class LiGlu(Gated):
    """x itself as gate: a bilinear layer."""

    def gate(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x, jnp.ones_like(x)
