"""Maximal update parametrization (muP): hyperparameters found at one width hold at all (arXiv 2203.03466, table 8).

Of the paper's two equivalent tables the 8th, because in it the embedding and the tied head are scaled alike. With
m = width / base width, as factors of what the base has:

                                      initial std    multiplier              learning rate (Adam)
  embedding = head                    1              1/m, of the head only   1
  biases, LayerNorms                  (constants)    1                       1
  qkv, out, mlp_in (sum over D)       1/sqrt(m)      1                       1/m
  mlp_out (sums over F)               1/sqrt(m_F)    1                       1/m_F
  q.k                                                1/K in place of 1/sqrt(K)

Depth, batch and length are no part of it. Dimension key as in model.py: D emb_dim, F mlp_dim, K head_dim.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bloomjax.errors import BadInput

Path = tuple[str, ...]


class Widths(NamedTuple):
    """How many times wider than the base a model is, and what follows for its weights; all 1 without muP.

    Attributes:
      emb, mlp, head: emb_dim, mlp_dim and head_dim over those of the base.
      output, attention: the tunable multipliers of `MuP`.
    """

    emb: float = 1.0
    mlp: float = 1.0
    head: float = 1.0
    output: float = 1.0
    attention: float = 1.0

    @property
    def output_multiplier(self) -> float:
        """Of the final hidden state, that is of the logits."""
        return self.output / self.emb

    @property
    def query_multiplier(self) -> float:
        """Of q, before the attention divides q.k by sqrt(K): together attention * sqrt(base K) / K."""
        return self.attention * self.head**-0.5

    def fan_in(self, kernel: str) -> float:
        """What the kernel of this name sums over, as a multiple of the base's."""
        return {"qkv": self.emb, "out": self.emb, "mlp_in": self.emb, "mlp_out": self.mlp}[kernel]

    def stds(self, init_std: float, num_layers: int) -> dict[str, float]:
        """Initial standard deviation of each kernel; those that write to the residual stream have Megatron's depth."""
        depth = math.sqrt(2 * num_layers)
        into_residual = {"qkv": 1.0, "out": depth, "mlp_in": 1.0, "mlp_out": depth}
        return {k: init_std / (d * self.fan_in(k) ** 0.5) for k, d in into_residual.items()}

    def scaled_query(self, q_BLHK: jax.Array) -> jax.Array:
        """q times its multiplier, in float32: bfloat16 would round the factor."""
        if self.query_multiplier == 1.0:
            return q_BLHK
        return (q_BLHK.astype(jnp.float32) * self.query_multiplier).astype(q_BLHK.dtype)

    def rate(self, path: Path) -> float:
        """Factor of the learning rate of the parameter at `path`.

        It belongs to Adam's step alone. Weight decay takes learning rate * weight_decay of every weight at every width:
        then what an average over past steps remembers, 1 / (learning rate * weight_decay) steps, is the same, too. So
        do the paper's authors (github.com/microsoft/mup, MuAdamW: weight_decay *= width_mult).
        """
        return 1.0 / self.fan_in(path[-2]) if path[-1] == "kernel" else 1.0

    def rates(self, params: Any) -> Any:
        """`rate` of each parameter, a tree like `params`."""
        return jax.tree_util.tree_map_with_path(
            lambda path, _: self.rate(tuple(each.key for each in path)), params
        )

    def rounded(self, params: Any, dtype: np.dtype) -> Any:
        """float32 arrays as they come back from an export in `dtype`, which rounds what `folds` has made of them."""
        folds = self.folds()

        def one(path, x):
            factor = folds.get(tuple(each.key for each in path), np.float32(1))
            return (np.asarray(x) * factor).astype(dtype).astype(np.float32) / factor

        return jax.tree_util.tree_map_with_path(one, params)

    def folds(self) -> dict[Path, np.ndarray]:
        """What makes a plain model of this one: factors of parameters, by path, which broadcast from the right.

        The output's go into the last LayerNorm, the attention's into the part of q. A model with these parameters and
        without muP computes the same.
        """
        output = np.array(self.output_multiplier, np.float32)
        query = np.array([self.query_multiplier, 1, 1], np.float32).reshape(3, 1, 1)
        return {
            ("final_norm", "scale"): output,
            ("final_norm", "bias"): output,
            ("layers", "qkv", "kernel"): query,
            ("layers", "qkv", "bias"): query,
        }


@dataclasses.dataclass(frozen=True)
class MuP:
    """The base at which hyperparameters were found; a model of this shape is the same with muP and without.

    BloomConfig.init_std, the learning rate and the multipliers are then those of the base, whatever the width.

    Attributes:
      base_emb_dim, base_num_heads, base_mlp_dim: its shape, None for 4 * base_emb_dim. Heads may grow in size, in
        number, or both; only their size counts.
      output_multiplier, attention_multiplier: of the logits and of q.k, two more hyperparameters that hold at every
        width. The embedding needs none: a LayerNorm follows it.
    """

    base_emb_dim: int
    base_num_heads: int
    base_mlp_dim: int | None = None
    output_multiplier: float = 1.0
    attention_multiplier: float = 1.0

    def __post_init__(self):
        for name in ("base_emb_dim", "base_num_heads", "base_mlp_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"MuP.{name} must be at least 1, got {value}")
        if self.base_emb_dim % self.base_num_heads:
            raise BadInput(
                f"MuP.base_num_heads={self.base_num_heads} does not divide base_emb_dim={self.base_emb_dim}"
            )
        for name in ("output_multiplier", "attention_multiplier"):
            if not 0 < getattr(self, name) < float("inf"):
                raise BadInput(f"MuP.{name} must be positive, got {getattr(self, name)}")


def widths_of(config: Any) -> Widths:
    """Of the model of a BloomConfig."""
    base = config.mup
    if base is None:
        return Widths()
    return Widths(
        config.emb_dim / base.base_emb_dim,
        config.mlp_width / (base.base_mlp_dim or 4 * base.base_emb_dim),
        config.head_dim / (base.base_emb_dim // base.base_num_heads),
        base.output_multiplier,
        base.attention_multiplier,
    )
