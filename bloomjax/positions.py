"""How a model knows the order of its tokens: none, learned, sinusoidal, rotary or ALiBi (BloomConfig.positions).

Each is an object with the three places where order can enter: a vector added to the embedding, a turn of queries and
keys, a slope on the scores. Dimension key: B batch, L tokens of a call, S cache slots, H heads, K head_dim, D emb_dim,
P rows of a table, R pairs of dimensions that are turned.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bloomjax import partitioning
from bloomjax.attention import alibi_slopes
from bloomjax.embedding import Table
from bloomjax.errors import BadInput

Turn = tuple[jax.Array, jax.Array]  # cosines and sines, float32 [1, L, 1, R]


class Places(NamedTuple):
    """Where the tokens of a call stand.

    Attributes:
      length: L.
      documents_BL: which document of its row each belongs to (`attention.document_numbers`); None: a row is one text.
      start: with a cache, the slot of the first token; None without.
      k_valid_BS: with a cache, False for slots that hold padding.
    """

    length: int
    documents_BL: jax.Array | None = None
    start: Any = None
    k_valid_BS: jax.Array | None = None

    def slots_L(self) -> jax.Array:
        """int32 [L]; the differences of two are distances of tokens, whatever the padding and the documents."""
        return jnp.arange(self.length) + (0 if self.start is None else self.start)

    def positions_BL(self) -> jax.Array:
        """int32 [B or 1, L], from 0 in each document, padding not counted."""
        if self.k_valid_BS is not None:
            # Slots that are not written yet may count as valid: they come after all that are asked for.
            position_BS = jnp.maximum(jnp.cumsum(self.k_valid_BS, axis=1) - 1, 0)
            size = position_BS.shape[0], self.length
            return jax.lax.dynamic_slice(position_BS, (0, self.start), size)
        slots_1L = self.slots_L()[None]
        if self.documents_BL is None:
            return slots_1L
        is_first_BL = jnp.diff(self.documents_BL, axis=1, prepend=-1) != 0
        return slots_1L - jax.lax.cummax(jnp.where(is_first_BL, slots_1L, 0), axis=1)


@dataclasses.dataclass(frozen=True)
class Positions:
    """What a model does without any; the others change what they need."""

    @property
    def num_rows(self) -> int:
        """Rows of emb_dim parameters."""
        return 0

    def check_length(self, length: int) -> None:
        """BadInput for a window of more tokens than there are positions."""

    def embed(self, x_BLD: Any, places: Places, *, init_std: float, word_std: float) -> Any:
        """The embedded tokens with their places; called inside the model's compact method.

        Args:
          init_std: of a table that is learned. word_std: of the elements of x at the start of training.
        """
        del places, init_std, word_std
        return x_BLD

    def turn(self, places: Places, head_dim: int) -> Turn | None:
        """What `rotate` needs, once for all layers; None if it does nothing."""
        del places, head_dim

    def rotate(self, q_BLHK: Any, k_BLHK: Any, turn: Turn | None) -> tuple[Any, Any]:
        """Queries and keys as attention (and the cache) takes them."""
        del turn
        return q_BLHK, k_BLHK

    def slopes(self, num_heads: int, rounding: str) -> jax.Array | None:
        """float32 [H] of a bias slope * (key - query position); None if there is none."""
        del num_heads, rounding


@dataclasses.dataclass(frozen=True)
class NoPositions(Positions):
    """None: the causal mask alone tells tokens apart (Haviv et al. 2022, arXiv 2203.16634)."""


@dataclasses.dataclass(frozen=True)
class Alibi(Positions):
    """A bias linear in the distance, with a slope a head (Press et al. 2022, arXiv 2108.12409). BLOOM's."""

    def slopes(self, num_heads: int, rounding: str) -> jax.Array:
        return jnp.asarray(alibi_slopes(num_heads, rounding), jnp.float32)


@dataclasses.dataclass(frozen=True)
class Rotary(Positions):
    """Pairs of dimensions of q and k are turned by an angle that grows with the position (Su et al. 2021, arXiv
    2104.09864), dimension i with i + R as in GPT-NeoX; in float32.

    Attributes:
      base: pair i turns by base^(-i / R) a token.
      fraction: of head_dim that is turned; 1 in BigScience's tr4, 0.25 in GPT-NeoX.
    """

    base: float = 10_000.0
    fraction: float = 1.0

    def __post_init__(self):
        if self.base <= 1 or not 0 < self.fraction <= 1:
            raise BadInput(
                f"Rotary needs base > 1 and 0 < fraction <= 1; got {self.base}, {self.fraction}"
            )

    def turn(self, places: Places, head_dim: int) -> Turn:
        num = int(head_dim * self.fraction)
        if num < 2 or num % 2:
            raise BadInput(
                f"Rotary turns pairs: fraction={self.fraction} of head_dim={head_dim} is {num}, which must be even"
            )
        rates_R = (self.base ** (-np.arange(0, num, 2) / num)).astype(np.float32)
        angles_LR = places.slots_L().astype(jnp.float32)[:, None] * rates_R[None]
        angles_1L1R = angles_LR[None, :, None]
        return jnp.cos(angles_1L1R), jnp.sin(angles_1L1R)

    def rotate(self, q_BLHK: Any, k_BLHK: Any, turn: Turn | None) -> tuple[Any, Any]:
        assert turn is not None
        return _turned(q_BLHK, *turn), _turned(k_BLHK, *turn)


def _turned(x_BLHK, cos_1L1R, sin_1L1R):
    """Linear in x: its gradient keeps nothing but the angles."""
    R = cos_1L1R.shape[-1]
    a, b, rest = jnp.split(x_BLHK.astype(jnp.float32), [R, 2 * R], axis=-1)
    parts = [a * cos_1L1R - b * sin_1L1R, b * cos_1L1R + a * sin_1L1R, rest]
    return jnp.concatenate(parts, axis=-1).astype(x_BLHK.dtype)


@dataclasses.dataclass(frozen=True)
class LearnedPositions(Positions):
    """A learned vector a position, added to the embedding, behind its LayerNorm if there is one (Megatron-DeepSpeed,
    whose word embedding holds the LayerNorm). GPT-2's, and that of BigScience's 1.3B baseline.

    Attributes:
      max_length: rows of the table; a longer window is an error.
    """

    max_length: int

    def __post_init__(self):
        if self.max_length < 1:
            raise BadInput(f"LearnedPositions.max_length must be at least 1, got {self.max_length}")

    @property
    def num_rows(self) -> int:
        return self.max_length

    def check_length(self, length: int) -> None:
        if length > self.max_length:
            raise BadInput(
                f"LearnedPositions.max_length={self.max_length} positions are learned, {length} tokens need more"
            )

    def embed(self, x_BLD: Any, places: Places, *, init_std: float, word_std: float) -> Any:
        del word_std
        if places.k_valid_BS is None:
            self.check_length(
                places.length
            )  # with a cache there are slots for padding, too: the caller checks
        names = ("positions", "embed")
        shape = (self.max_length, x_BLD.shape[-1])
        table_PD = Table(shape, names, init_std, name="positions")()
        table_PD = partitioning.constrain(table_PD, partitioning.gathered_spec(names))
        if places.documents_BL is None and places.start is None:
            rows_BLD = table_PD[None, : places.length]  # not looked up: its gradient is no scatter
        else:
            # What is beyond the table is padding: "fill" would be NaN, which no mask takes out of a sum.
            rows_BLD = jnp.take(table_PD, places.positions_BL(), axis=0, mode="clip")
        # In float32, and so is the gradient's sum over the batch.
        return (x_BLD.astype(jnp.float32) + rows_BLD).astype(x_BLD.dtype)


@dataclasses.dataclass(frozen=True)
class SinusoidalPositions(Positions):
    """Sines and cosines of the position, added to the embedding (Vaswani et al. 2017, arXiv 1706.03762, 3.5): dimension
    2i has sin(position / base^(2i / D)), dimension 2i + 1 its cosine.

    Attributes:
      amplitude: of the waves. None for the standard deviation of the embedding before step 1, which is the paper's
        ratio: it multiplies an embedding of deviation D^-0.5 by D^0.5, and adds waves of amplitude 1.
    """

    base: float = 10_000.0
    amplitude: float | None = None

    def embed(self, x_BLD: Any, places: Places, *, init_std: float, word_std: float) -> Any:
        del init_std
        D = x_BLD.shape[-1]
        rates_D = self.base ** (-(np.arange(D) // 2 * 2) / D)
        quarter_D = np.where(np.arange(D) % 2, np.pi / 2, 0.0)  # cos(a) = sin(a + pi / 2)
        positions_BL = places.positions_BL().astype(jnp.float32)
        angles_BLD = positions_BL[..., None] * jnp.asarray(rates_D, jnp.float32)[None, None]
        waves_BLD = jnp.sin(angles_BLD + jnp.asarray(quarter_D, jnp.float32)[None, None])
        amplitude = word_std if self.amplitude is None else self.amplitude
        return (x_BLD.astype(jnp.float32) + amplitude * waves_BLD).astype(x_BLD.dtype)
