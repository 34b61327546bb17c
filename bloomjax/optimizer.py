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
) -> optax.GradientTransformation:
    """Gradients to the direction of the update; the caller multiplies by -learning_rate.

    Clips the global L2 norm, then Adam with bias correction (arXiv 1412.6980), then adds weight_decay * parameter
    (arXiv 1711.05101) where `decay_mask` says so. The learning rate is no part of it: schedules count samples.
    """
    if first_moment_dtype not in ("float32", "bfloat16"):
        raise BadInput(
            f"first_moment_dtype must be 'float32' or 'bfloat16', got {first_moment_dtype!r}"
        )
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.scale_by_adam(b1=b1, b2=b2, eps=epsilon, mu_dtype=jnp.dtype(first_moment_dtype)),
        optax.add_decayed_weights(weight_decay, mask=decay_mask),
    )
