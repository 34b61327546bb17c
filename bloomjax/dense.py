"""A matrix product with its gradients: what is gathered, summed and scattered over the mesh, and in which dtype.

Dimension key of an einsum's text: B batch, L length; those of `w` that the result lacks are summed.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bloomjax import partitioning
from bloomjax.partitioning import constrain_activation


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def dense(spec: str, names: tuple[str | None, ...], gradient_dtype: str, x, w, b):
    """einsum(spec, x, w) + b in x's dtype, accumulated in float32; the bias is added before rounding,
    except to parts of a sum from several devices (`_dot`).

    `x` begins with B, L; `w` is the float32 master weight with logical axes `names`, cast and then gathered over
    `fsdp`; `b` has w's output dimensions. Backward, too, every matmul has operands of x's dtype: autodiff of a float32
    accumulation would make them float32 x float32. The weight gradient is summed over devices in `gradient_dtype` and
    leaves in float32, laid out as the parameter.
    """
    return _dense_forward(spec, names, gradient_dtype, x, w, b)[0]


def _gathered(names, w, dtype):
    w = partitioning.constrain(w.astype(dtype), partitioning.gathered_spec(names))
    return checkpoint_name(w, "gathered")  # so that no policy keeps it from the forward pass


def _summed_over_devices(spec, names) -> bool:
    """Whether einsum(spec, x, w) adds parts that lie on different devices."""
    inputs, out = spec.split("->")
    w_dims = inputs.split(",")[1]
    return partitioning.is_split(
        [n for dim, n in zip(w_dims, names, strict=True) if dim not in out]
    )


def _dot(spec, names, x, w):
    """einsum(spec, x, w), float32. Where the sum runs over devices it comes in x's dtype: the parts of 176B's residual
    stream are most of what a step on a pod sends, and would be twice the bytes.
    """
    dtype = x.dtype if _summed_over_devices(spec, names) else jnp.float32
    return jnp.einsum(spec, x, w, preferred_element_type=dtype)


def _dense_forward(spec, names, gradient_dtype, x, w, b):
    del gradient_dtype
    w = _gathered(names, w, x.dtype)
    y = _dot(spec, names, x, w)
    y = y.astype(jnp.float32) + b[(None,) * (y.ndim - b.ndim)]
    return y.astype(x.dtype), (x, w)


def _dense_backward(spec, names, gradient_dtype, residuals, g):
    x, w = residuals
    inputs, out = spec.split("->")
    x_dims, w_dims = inputs.split(",")
    dx_spec = f"{out},{w_dims}->{x_dims}"
    dx = _dot(dx_spec, names, g, w).astype(x.dtype)
    dw = jnp.einsum(f"{x_dims},{out}->{w_dims}", x, g, preferred_element_type=gradient_dtype)
    dw = partitioning.constrain(dw, partitioning.parameter_spec(names))
    if _summed_over_devices(dx_spec, names):
        dx = constrain_activation(dx, "batch", "residual_length", "embed")
    if partitioning.is_split(names):
        # Both before anything that follows: XLA would put off dw, and keep the gathered x and g of several matmuls for
        # it (3.4 of 36.4 GiB a device of 176B on v5p).
        dx, dw = jax.lax.optimization_barrier((dx, dw))
    return dx, dw.astype(jnp.float32), jnp.sum(g.astype(jnp.float32), axis=(0, 1))


dense.defvjp(_dense_forward, _dense_backward)


class Dense(nn.Module):
    """Kernel and bias of one `dense`. `names` and `shape` are the kernel's; the bias has its last dimensions."""

    spec: str
    names: tuple[str | None, ...]
    shape: tuple[int, ...]
    bias_names: tuple[str | None, ...]
    std: float
    gradient_dtype: str

    @nn.compact
    def __call__(self, x) -> Any:
        init = nn.with_logical_partitioning(nn.initializers.normal(self.std), self.names)
        w = self.param("kernel", init, self.shape, jnp.float32)
        bias_init = nn.with_logical_partitioning(nn.initializers.zeros, self.bias_names)
        bias_shape = self.shape[len(self.shape) - len(self.bias_names) :]
        b = self.param("bias", bias_init, bias_shape, jnp.float32)
        return dense(self.spec, self.names, self.gradient_dtype, x, w, b)
