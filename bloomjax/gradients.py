"""Loss and gradient of a batch, at once or microbatch by microbatch, and the norms that tell of the gradient's
noise."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from bloomjax import partitioning


def loss_weights(batch: Mapping[str, Any]) -> jax.Array:
    """Of each row in the loss, [B]: its `weights`, and with weights of its tokens, how much these are together."""
    if "token_weights" not in batch:
        return batch["weights"]
    return batch["weights"] * jnp.sum(batch["token_weights"], axis=1)


@jax.custom_vjp
def _used_often(x):
    """x, whose gradient is the sum over all its uses before anything is done with it: one all-reduce, one addition."""
    return x


_used_often.defvjp(lambda x: (x, None), lambda _, g: (g,))


def _differentiated(params, gradient_dtype: str) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """By path: the parameters whose gradients are asked for, and slots for those of the others, the layers' kernels, if
    they are to exist in another dtype (see dense.Dense)."""
    own: dict[Any, Any] = flatten_dict(params)
    if gradient_dtype == "float32":
        return own, {}
    kernels = [path for path in own if path[-1] == "kernel"]
    return own, {path: jnp.zeros(own.pop(path).shape, gradient_dtype) for path in kernels}


def loss_and_gradient(
    loss_fn: Callable[..., jax.Array],
    params: Any,
    batch: Mapping[str, Any],
    key: jax.Array | None,
    *,
    num_microbatches: int,
    gradient_dtype: str,
) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
    """Loss, gradient (float32), and of several microbatches `part_norm` and `part_samples`.

    Those are the norm of the first one's mean gradient, and how many rows it is the mean of: with the norm of the whole
    they tell the gradient's noise (noise_scale.py). Loss and gradient are sums over microbatches of `loss_fn(params,
    batch, key, slots)` and its gradient; it has to be linear in batch["weights"]. Row r goes to microbatch r %
    num_microbatches, so that each device splits its own rows and none move.
    """

    def loss_of(differentiated, batch, key):
        own, slots = differentiated
        found = unflatten_dict(flatten_dict(params) | own)
        found["embedding"] = _used_often(found["embedding"])
        return loss_fn(found, batch, key, unflatten_dict(slots))

    differentiated, parts = _differentiated(params, gradient_dtype), {}
    if num_microbatches == 1:
        loss, grads = jax.value_and_grad(loss_of)(differentiated, batch, key)
    else:
        loss, grads, first_norm = _accumulate(loss_of, differentiated, batch, key, num_microbatches)
        weights_B = loss_weights(batch)
        first, total = jnp.sum(weights_B[::num_microbatches]), jnp.sum(weights_B)
        # A share of the batch's mean; the mean of the part itself is larger.
        num_first = jnp.sum(batch["weights"][::num_microbatches])
        parts = {"part_norm": first_norm * total / first, "part_samples": num_first}
    gradient = unflatten_dict(grads[0] | grads[1])
    return loss, jax.tree.map(lambda g: g.astype(jnp.float32), gradient), parts


def _accumulate(loss_of, differentiated, batch, key, num_microbatches):
    """Sums of loss and gradient, and the norm of the first microbatch's."""

    def split(a):
        a = a.reshape(a.shape[0] // num_microbatches, num_microbatches, *a.shape[1:])
        return jnp.swapaxes(a, 0, 1)

    def body(carry, inputs):
        total, first_norm = carry
        number, microbatch = inputs
        microbatch = {k: partitioning.constrain_activation(v, "batch", *(None,) * (v.ndim - 1))
                      for k, v in microbatch.items()}  # fmt: skip
        micro_key = None if key is None else jax.random.fold_in(key, number)
        loss, vjp = jax.vjp(lambda d: loss_of(d, microbatch, micro_key), differentiated)
        vjp.with_refs(grads)(jnp.ones_like(loss))
        first_norm = jax.lax.cond(number == 0, lambda: _norm(grads), lambda: first_norm)
        return (total + loss, first_norm), None

    # Gradients are added in place, each as soon as it is known: no second set of them exists.
    grads = jax.tree.map(lambda a: jax.new_ref(jnp.zeros_like(a)), differentiated)
    inputs = (jnp.arange(num_microbatches), jax.tree.map(split, batch))
    zeros = (jnp.zeros((), jnp.float32),) * 2
    (total, first_norm), _ = jax.lax.scan(body, zeros, inputs)
    return total, jax.tree.map(jax.freeze, grads), first_norm


def _norm(refs) -> jax.Array:
    return optax.tree.norm(jax.tree.map(lambda ref: ref[...].astype(jnp.float32), refs))
