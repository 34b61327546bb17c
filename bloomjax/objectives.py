"""What a row of tokens is trained on: which token each position sees, and which predictions count.

An objective makes of a row of tokens, on the host, the arrays that the step needs beside them. What is random in it
comes from a seed and the key of the row (its sample number) alone: a run that goes on after a stop, or on another
mesh, sees the same. `TrainData.objective` names it.

    tokens         int32 [L + 1]; position i sees tokens of [0, L) and predicts token i + 1
    token_weights  float32 [L]: of that prediction in the loss, which is the weighted mean over the batch
    last_key       int32 [L]: the last position that each position sees, at least its own
    documents      int32 [L]: growing; a position sees those of its own number only

Dimension key: L sequence_length.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

Row = dict[str, np.ndarray]
Key = Sequence[int]
_DTYPES = {"token_weights": np.float32, "last_key": np.int32, "documents": np.int32}


class Objective(Protocol):
    """Hashable and immutable; equal ones make equal rows.

    Attributes:
      arrays: names of what `row` returns beside "tokens".
    """

    arrays: tuple[str, ...]

    def row(self, tokens: np.ndarray, key: Key, /) -> Row:
        """The arrays of a window, int32 [L + 1]; `key` tells it from all others."""
        ...


@dataclasses.dataclass(frozen=True)
class CausalLM:
    """Each token from those before it, all of them: BLOOM's objective."""

    arrays = ()

    def row(self, tokens: np.ndarray, key: Key) -> Row:
        del key
        return {"tokens": tokens}


@dataclasses.dataclass(frozen=True)
class PrefixLM:
    """A random beginning is seen as a whole, by itself too, and the rest is predicted from it, token by token.

    BigScience's tr6 and tr6f (Megatron-DeepSpeed, pretrain_prefix_lm.py): the prefix has p tokens, p uniform in
    1..L. Its last token predicts the first target, token p; the p - 1 before it see the token they would predict.

    Attributes:
      seed: of the prefixes.
      document_end_id: gives each document of a row its own prefix, up to the token before its end at most; the first
        token of a document belongs to a prefix, so the end before it predicts nothing. A row in which no document has
        two tokens and an end is trained on as by CausalLM. None for one prefix a row. For documents that do not see
        each other, BloomConfig.document_end_id has to be set as well.
      targets_only: leave predictions of the prefix's own tokens out of the loss (--loss-on-targets-only). They are
        visible to where they are predicted: False is there to repeat what was done with it.
      reweight_by_position: position i of L weighs 2 (L - i) / (L + 1) (--reweight-loss-based-on-position-frequency):
        late positions are targets more often than early ones.
    """

    seed: int = 0
    document_end_id: int | None = None
    targets_only: bool = True
    reweight_by_position: bool = False

    arrays = ("token_weights", "last_key")

    def row(self, tokens: np.ndarray, key: Key) -> Row:
        rng, length = np.random.default_rng([self.seed, *key]), len(tokens) - 1
        weights, last_key = np.zeros(length, np.float32), np.arange(length, dtype=np.int32)
        for first, end in self._texts(tokens[:-1]):
            if first >= end:  # nothing but the token that ends it
                continue
            prefix_end = int(rng.integers(first + 1, end, endpoint=True))
            last_key[first:prefix_end] = prefix_end - 1
            weights[prefix_end - 1 : end] = 1.0
        if not weights.any() or not self.targets_only:
            weights[:] = 1.0
        if self.reweight_by_position:
            weights *= position_weights(length)
        return {"tokens": tokens, "token_weights": weights, "last_key": last_key}

    def _texts(self, inputs: np.ndarray) -> list[tuple[int, int]]:
        """Begin and end of what has a prefix of its own, without the token that ends it, which is predicted last."""
        if self.document_end_id is None:
            return [(0, len(inputs))]
        ends = np.flatnonzero(inputs == self.document_end_id).tolist()
        firsts = [0, *(e + 1 for e in ends)]
        return list(zip(firsts, [*ends, len(inputs)], strict=True))


def position_weights(length: int) -> np.ndarray:
    """2 (L - i) / (L + 1) for i = 0..L-1, float32 [L]; their mean is 1 (Megatron-DeepSpeed, pretrain_prefix_lm.py)."""
    return (np.arange(length, 0, -1) / (length + 1) * 2).astype(np.float32)


def filling(objective: Objective, length: int) -> Row:
    """A row of `length` tokens to predict that weighs nothing, as all rows of a batch are that only fill the mesh."""
    row = {name: np.zeros(length, _DTYPES[name]) for name in objective.arrays}
    if "last_key" in row:
        row["last_key"] = np.arange(length, dtype=np.int32)
    return {"tokens": np.zeros(length + 1, np.int32), **row}


def identity(objective: Objective) -> dict[str, Any]:
    """What of it decides what a run has been trained on, for JSON; empty for CausalLM, which needs no name."""
    if isinstance(objective, CausalLM):
        return {}
    return {"objective": repr(objective)}
