"""A matrix product with its gradients: what is gathered, summed and scattered over the mesh, and in which dtype.

Dimension key of an einsum's text: B batch, L length; those of `w` that the result lacks are summed.
"""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bloomjax import float8, partitioning
from bloomjax.float8 import Operand
from bloomjax.partitioning import constrain_activation


class How(NamedTuple):
    """What `dense` multiplies, and in which numbers.

    Attributes:
      spec: text of the einsum; x and the result begin with B, L, and w has the other dimensions of x first.
      names: logical axes of `w`.
      gradient_dtype: in which the weight gradient is summed over devices.
      is_float8: whether the operands of all three products are rounded to float8 (see float8.py).
    """

    spec: str
    names: tuple[str | None, ...]
    gradient_dtype: str
    is_float8: bool = False


def dense(how: How, x, w, b, slot=None) -> Any:
    """einsum(spec, x, w) + b in x's dtype, accumulated in float32; the bias is added before rounding, except to parts
    of a sum from several devices (`_dot`).

    `w` is the float32 master weight, cast and then gathered over `fsdp`; `b` has w's last dimensions. Backward, too,
    every matmul has operands of x's dtype: autodiff of a float32 accumulation would make them float32 x float32. The
    weight gradient leaves laid out as the parameter, in float32; if a `slot` is given (an array like w that nobody
    reads) it leaves as the slot's, in its dtype, and w has none.
    """
    if partitioning.is_split(how.names):
        return _dense(how, x, w, b, slot)
    # As a matrix: several dimensions on one side compilers would transpose in memory, and add the bias afterwards.
    num_inputs, out_shape = w.ndim - b.ndim, b.shape
    names = tuple(
        group[0] if len(group) == 1 else None
        for group in (how.names[:num_inputs], how.names[num_inputs:])
    )
    w, slot = jax.tree.map(lambda a: a.reshape(-1, math.prod(out_shape)), (w, slot))
    how = how._replace(spec="BLI,IO->BLO", names=names)
    y: Any = _dense(how, x.reshape(*x.shape[:2], -1), w, b.reshape(-1), slot)
    return y.reshape(*y.shape[:2], *out_shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense(how: How, x, w, b, slot):
    return _dense_forward(how, x, w, b, slot)[0]


def _operand(how, x, dtype) -> Operand:
    return float8.quantize(x, dtype) if how.is_float8 else Operand(x, None)


def _gathered(how, w, dtype) -> Operand:
    w = _operand(how, w.astype(dtype), float8.FORWARD)
    values = partitioning.constrain(w.values, partitioning.gathered_spec(how.names))
    # Named so that no policy keeps it from the forward pass.
    return w._replace(values=checkpoint_name(values, "gathered"))


def _summed_over_devices(spec, names) -> bool:
    """Whether einsum(spec, x, w) adds parts that lie on different devices."""
    inputs, out = spec.split("->")
    w_dims = inputs.split(",")[1]
    return partitioning.is_split(
        [n for dim, n in zip(w_dims, names, strict=True) if dim not in out]
    )


def _dot(spec, names, x, w, dtype, b=None):
    """einsum(spec, x, w) + b in `dtype`, summed in float32. Parts of a sum over devices are rounded: those of 176B's
    residual stream are most of what a step on a pod sends, and would be twice the bytes.
    """

    def exact(x, w, b, sum_dtype=jnp.float32):
        y = float8.einsum(spec, x, w, sum_dtype)
        return (y if b is None else y.astype(jnp.float32) + b[None, None]).astype(dtype)

    def rounded(x, w, b):
        y = float8.einsum(spec, x, w, dtype)
        return y if b is None else y + b[None, None].astype(dtype)

    if _summed_over_devices(spec, names):
        return exact(x, w, b, dtype)
    # A GPU's libraries add a bias and round inside the matmul if sum and bias are of the result's dtype; of a float32
    # sum XLA makes passes over memory. Other compilers fuse those, too.
    return jax.lax.platform_dependent(x, w, b, cuda=rounded, rocm=rounded, default=exact)


def _dense_forward(how, x, w, b, slot):
    dtype = x.dtype
    x, w = _operand(how, x, float8.FORWARD), _gathered(how, w, dtype)
    slot = None if slot is None else jnp.zeros((0,), slot.dtype)
    return _dot(how.spec, how.names, x, w, dtype, b), (x, w, slot)


def _dense_backward(how, residuals, g):
    x, w, slot = residuals
    names, dtype = how.names, g.dtype
    inputs, out = how.spec.split("->")
    x_dims, w_dims = inputs.split(",")
    dx_spec = f"{out},{w_dims}->{x_dims}"
    db = jnp.sum(g.astype(jnp.float32), axis=(0, 1))
    g = _operand(how, g, float8.BACKWARD)
    dx = _dot(dx_spec, names, g, w, dtype)
    dw = float8.einsum(f"{x_dims},{out}->{w_dims}", x, g, jnp.dtype(how.gradient_dtype))
    dw = partitioning.constrain(dw, partitioning.parameter_spec(names))
    if _summed_over_devices(dx_spec, names):
        dx = constrain_activation(dx, "batch", "residual_length", "embed")
    if partitioning.is_split(names):
        # Both before anything that follows: XLA would put off dw, and keep the gathered x and g of several matmuls for
        # it (3.4 of 36.4 GiB a device of 176B on v5p).
        dx, dw = jax.lax.optimization_barrier((dx, dw))
    if slot is not None:
        return dx, None, db, dw.astype(slot.dtype)
    return dx, dw.astype(jnp.float32), db, None


_dense.defvjp(_dense_forward, _dense_backward)


class Dense(nn.Module):
    """Kernel and bias of one `dense`. `names` and `shape` are the kernel's; the bias has its last dimensions.

    An array for the kernel in a collection "slots" takes the kernel's gradient (see `dense`).
    """

    spec: str
    names: tuple[str | None, ...]
    shape: tuple[int, ...]
    bias_names: tuple[str | None, ...]
    std: float
    gradient_dtype: str
    is_float8: bool = False

    @nn.compact
    def __call__(self, x) -> Any:
        init = nn.with_logical_partitioning(nn.initializers.normal(self.std), self.names)
        w = self.param("kernel", init, self.shape, jnp.float32)
        bias_init = nn.with_logical_partitioning(nn.initializers.zeros, self.bias_names)
        bias_shape = self.shape[len(self.shape) - len(self.bias_names) :]
        b = self.param("bias", bias_init, bias_shape, jnp.float32)
        slot = self.get_variable("slots", "kernel")
        return dense(How(self.spec, self.names, self.gradient_dtype, self.is_float8), x, w, b, slot)
