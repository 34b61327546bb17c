"""LayerNorm and dropout as modules. Dimension key: B batch, L length, D emb_dim."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from bloomjax.pointwise import layer_norm


class Dropout(nn.Module):
    """Inverted dropout, scaled in float32: 1 / 0.9 rounded to bf16 would be 0.16 % off in every element."""

    rate: float
    deterministic: bool

    @nn.compact
    def __call__(self, x):
        if self.rate == 0.0 or self.deterministic:
            return x
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - self.rate, x.shape)
        return jnp.where(keep, x.astype(jnp.float32) / (1.0 - self.rate), 0.0).astype(x.dtype)


class LayerNorm(nn.Module):
    epsilon: float
    multiplier: float = 1.0  # of the result

    @nn.compact
    def __call__(self, x_BLD):
        names, shape = ("norm",), (x_BLD.shape[-1],)
        scale_D = self.param(
            "scale", nn.with_logical_partitioning(nn.initializers.ones, names), shape
        )
        bias_D = self.param(
            "bias", nn.with_logical_partitioning(nn.initializers.zeros, names), shape
        )
        return layer_norm(x_BLD, scale_D, bias_D, self.epsilon, self.multiplier)
