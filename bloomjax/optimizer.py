"""AdamW as BLOOM used it: decay by parameter path, global-norm clipping, moments in a chosen dtype."""

import jax
import jax.numpy as jnp
import optax

from bloomjax.errors import BadInput


def decay_mask(params):
    """True where weight decay applies: embeddings and kernels, never LayerNorms or biases.

    Decided by the parameter's path (Megatron's groups; there a class name once let a LayerNorm slip into the decay).
    """

    def decays(path, _):
        return path[-1].key in ("kernel", "embedding")

    return jax.tree_util.tree_map_with_path(decays, params)


def adamw(
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    epsilon: float = 1e-8,
    weight_decay: float = 0.1,
    clip_norm: float = 1.0,
    first_moment_dtype: str = "float32",
) -> "SkippingTransformation":
    """Gradients to the direction of the update; the caller multiplies by -learning_rate.

    Clips the global L2 norm, then Adam with bias correction (arXiv 1412.6980), then adds weight_decay * parameter
    (arXiv 1711.05101) where `decay_mask` says so. The learning rate is no part of it: schedules count samples.
    """
    if first_moment_dtype not in ("float32", "bfloat16"):
        raise BadInput(
            f"first_moment_dtype must be 'float32' or 'bfloat16', got {first_moment_dtype!r}"
        )
    chain = optax.chain(
        optax.clip_by_global_norm(clip_norm),
        _scale_by_adam(b1, b2, epsilon, jnp.dtype(first_moment_dtype)),
        optax.add_decayed_weights(weight_decay, mask=decay_mask),
    )
    return SkippingTransformation(chain.init, chain.update)


class SkippingTransformation(optax.GradientTransformationExtraArgs):
    """Its `update` takes `is_taken` (bool scalar): where that is False, the state that it returns is the one given.

    And `rates`, a tree of numbers like the parameters: factors of the learning rate of each, which weight decay does
    not have (see mup.Widths.rate).
    """


def _scale_by_adam(
    b1: float, b2: float, epsilon: float, mu_dtype: jnp.dtype
) -> optax.GradientTransformationExtraArgs:
    """optax.scale_by_adam, whose `update` also takes `is_taken` (bool scalar): False leaves the moments as they were.
    And `rates`, which its result is multiplied by.

    Moments are selected before the update is made of them; afterwards it would cost a pass over both on CPUs
    (benchmarks/NOTES.md).
    """
    plain = optax.scale_by_adam(b1=b1, b2=b2, eps=epsilon, mu_dtype=mu_dtype)

    def update(updates, state, params=None, *, is_taken=None, rates=None, **extra):
        del extra
        updates, state = step(updates, state, params, is_taken)
        if rates is not None:
            updates = jax.tree.map(lambda u, r: u if r == 1.0 else u * r, updates, rates)
        return updates, state

    def step(updates, state, params, is_taken):
        if is_taken is None:
            return plain.update(updates, state, params)

        def kept(new, old):
            return jax.tree.map(lambda n, o: jnp.where(is_taken, n, o), new, old)

        mu = kept(optax.tree.update_moment(updates, state.mu, b1, 1), state.mu)
        nu = kept(optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2), state.nu)
        count = optax.safe_increment(state.count)
        mu_hat = optax.tree.bias_correction(mu, b1, count)
        nu_hat = optax.tree.bias_correction(nu, b2, count)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + epsilon), mu_hat, nu_hat)
        count = jnp.where(is_taken, count, state.count)
        mu, nu = optax.tree.cast(mu, mu_dtype), optax.tree.cast_like(nu, state.nu)
        return updates, state._replace(count=count, mu=mu, nu=nu)

    return optax.GradientTransformationExtraArgs(plain.init, update)
