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
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from bloomjax.errors import BadInput

Row = dict[str, np.ndarray]
Key = Sequence[int]
_DTYPES = {"token_weights": np.float32, "last_key": np.int32, "documents": np.int32}


class Objective:
    """Base of all; they are immutable, and equal ones make equal rows.

    Attributes:
      arrays: names of what `row` returns beside "tokens".
      takes_examples: whether it is for stores of inputs and targets, or for those of text.
      why_no_longer: why the loss in windows longer than those of training says nothing about length; "" where it does.
    """

    arrays: ClassVar[tuple[str, ...]] = ()
    takes_examples: ClassVar[bool] = False
    why_no_longer: ClassVar[str] = ""

    def row(self, tokens: np.ndarray, key: Key) -> Row:
        """The arrays of a window, int32 [L + 1]; `key` tells it from all others."""
        raise NotImplementedError

    def num_ids(self) -> int:
        """How many token ids the model must have for it; 0 for those of the vocabulary."""
        return 0

    def sees_whole_prompt(self) -> bool:
        """Whether tokens of a prompt that is to be continued see those after them."""
        return False

    def predicts_text(self) -> bool:
        """Whether the mean over targets is the loss of a token of the text: all targets are tokens of it, and not seen
        where they are predicted. Else there are no bits per byte."""
        return True


@dataclasses.dataclass(frozen=True)
class CausalLM(Objective):
    """Each token from those before it, all of them: BLOOM's objective."""

    def row(self, tokens: np.ndarray, key: Key) -> Row:
        del key
        return {"tokens": tokens}


@dataclasses.dataclass(frozen=True)
class PrefixLM(Objective):
    """A random beginning is seen as a whole, by itself too, and the rest is predicted from it, token by token.

    BigScience's tr6 (Megatron-DeepSpeed, pretrain_prefix_lm.py): the prefix has p tokens, p uniform in
    1..L. Its last token predicts the first target, token p; the p - 1 before it see the token they would predict.

    Attributes:
      seed: of the prefixes.
      document_end_id: gives each document of a row its own prefix, up to the token before its end at most; the first
        token of a document belongs to a prefix, so the end before it predicts nothing. A row in which no document has
        a token before its end is trained on as by CausalLM. None for one prefix a row. For documents that do not see
        each other, BloomConfig.document_end_id has to be set as well.
      targets_only: leave predictions of the prefix's own tokens out of the loss (--loss-on-targets-only). They are
        visible to where they are predicted: False is there to repeat tr6f.
      reweight_by_position: position i of L weighs 2 (L - i) / (L + 1) (--reweight-loss-based-on-position-frequency):
        late positions are targets more often than early ones.
    """

    seed: int = 0
    document_end_id: int | None = None
    targets_only: bool = True
    reweight_by_position: bool = False

    arrays: ClassVar[tuple[str, ...]] = ("token_weights", "last_key")

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

    def sees_whole_prompt(self) -> bool:
        return True

    def predicts_text(self) -> bool:
        return self.targets_only  # a random part of the text

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


@dataclasses.dataclass(frozen=True)
class SpanCorruption(Objective):
    """Random spans of a window are cut out and told afterwards, by a decoder: inputs and targets in one row.

    `a b c d e f g` becomes `a <0> d e <1> g <s> <0> b c <1> f </s>`, of which all after `<s>` are targets: T5's task
    (Raffel et al. 2020, arXiv 1910.10683, section 3.1.4) with the targets after the inputs, as in BigScience's
    comparison of architectures and objectives (arXiv 2204.05832). A row holds fewer tokens of text than the window; the
    rest of the window is not seen.

    Attributes:
      first_sentinel_id, num_sentinels: ids that no text has, `<0>`, `<1>`, ...: of BLOOM's embedding, the rows after
        the vocabulary, 250,680 and 200. The model needs a row for each.
      seed: of the spans.
      noise_density: share of the tokens that are cut out. mean_span_tokens: of a span.
      is_bidirectional: whether inputs are seen as a whole, as by a non-causal decoder, or only backwards.
      separator_id, end_id: of `<s>` and `</s>`.
    """

    first_sentinel_id: int
    num_sentinels: int
    seed: int = 0
    noise_density: float = 0.15
    mean_span_tokens: float = 3.0
    is_bidirectional: bool = True
    separator_id: int = 1
    end_id: int = 2

    arrays: ClassVar[tuple[str, ...]] = ("token_weights", "last_key", "documents")
    why_no_longer: ClassVar[str] = "SpanCorruption needs sentinels there that were not trained"

    def __post_init__(self):
        if not 0 < self.noise_density < 1 or self.mean_span_tokens < 1:
            raise BadInput(
                f"SpanCorruption needs 0 < noise_density < 1 and mean_span_tokens >= 1, got {self.noise_density} and "
                f"{self.mean_span_tokens}"
            )

    def num_ids(self) -> int:
        return self.first_sentinel_id + self.num_sentinels

    def row(self, tokens: np.ndarray, key: Key) -> Row:
        """As Objective.row. BadInput if the window needs more sentinels than there are, or is too short for any."""
        rng, length = np.random.default_rng([self.seed, *key]), len(tokens) - 1
        num_tokens = _num_tokens_of(self, length)
        num_noise, num_spans = self.noise(num_tokens)
        if num_spans > self.num_sentinels:
            raise BadInput(
                f"a window of {length} tokens has {num_spans} spans, SpanCorruption.num_sentinels is "
                f"{self.num_sentinels}"
            )
        kept = _segments(rng, num_tokens - num_noise, num_spans)
        cut = _segments(rng, num_noise, num_spans)
        inputs, targets, at = [], [], 0
        for span, (num_kept, num_cut) in enumerate(zip(kept, cut, strict=True)):
            sentinel = [self.first_sentinel_id + span]
            inputs += [tokens[at : at + num_kept], sentinel]
            at += num_kept
            targets += [sentinel, tokens[at : at + num_cut]]
            at += num_cut
        inputs = np.concatenate([*inputs, [self.separator_id]])
        row = np.concatenate([inputs, *targets, [self.end_id]])
        num_inputs, num_used = len(inputs), len(row)
        weights = np.zeros(length, np.float32)
        weights[num_inputs - 1 : num_used - 1] = 1.0  # the separator predicts the first target
        last_key = np.arange(length, dtype=np.int32)
        if self.is_bidirectional:
            last_key[:num_inputs] = num_inputs - 1
        row = np.concatenate([row, np.full(length + 1 - num_used, self.end_id)]).astype(np.int32)
        documents = np.zeros(length, np.int32)  # one, although there may be </s> in it
        return {
            "tokens": row, "token_weights": weights, "last_key": last_key, "documents": documents,
        }  # fmt: skip

    def sees_whole_prompt(self) -> bool:
        return self.is_bidirectional

    def predicts_text(self) -> bool:
        return False

    def noise(self, num_tokens: int) -> tuple[int, int]:
        """Tokens that are cut out, and spans they make, of a text."""
        num_noise = min(max(round(num_tokens * self.noise_density), 1), num_tokens - 1)
        num_spans = min(max(round(num_noise / self.mean_span_tokens), 1), num_tokens - num_noise)
        return num_noise, num_spans


@functools.lru_cache
def _num_tokens_of(objective: SpanCorruption, length: int) -> int:
    """Tokens of text in a row of `length` to predict: the most that fit beside a sentinel on either side for each span,
    `<s>` and `</s>`. BadInput if not even two do."""
    fitting = (n for n in range(2, length) if n + 2 * objective.noise(n)[1] + 2 <= length + 1)
    found = max(fitting, default=None)
    if found is None:
        raise BadInput(
            f"a window of {length} tokens is too short for SpanCorruption, which needs 5"
        )
    return found


def _segments(rng: np.random.Generator, num_items: int, num_segments: int) -> np.ndarray:
    """Sizes, none of them 0, of a random division into segments; all divisions are equally likely."""
    cuts = np.sort(rng.choice(num_items - 1, num_segments - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [num_items]]))


@dataclasses.dataclass(frozen=True)
class InputsTargets(Objective):
    """Examples of inputs and targets, several in a row, of which only targets and their </s> count: T0, xP3.

    For stores of examples (docs/objectives.md), where no example crosses a multiple of the store's pack_tokens. They do
    not see each other. The token between inputs and targets and the padding are taken out of the row; what is left over
    at its end weighs nothing.

    Attributes:
      is_bidirectional: whether inputs are seen as a whole, as by a non-causal decoder, or only backwards, as BLOOMZ.
      separator_id, end_id, pad_id: `<s>`, `</s>` and `<pad>`, as the store has them.
    """

    is_bidirectional: bool = False
    separator_id: int = 1
    end_id: int = 2
    pad_id: int = 3

    arrays: ClassVar[tuple[str, ...]] = ("token_weights", "last_key", "documents")
    takes_examples: ClassVar[bool] = True
    why_no_longer: ClassVar[str] = "an example of InputsTargets is no longer in a longer window"

    def row(self, tokens: np.ndarray, key: Key) -> Row:
        del key
        length = len(tokens) - 1
        block = tokens[:-1]  # the last token is the first of the next window's
        is_end = block == self.end_id
        document = np.cumsum(is_end) - is_end
        separators = np.concatenate([[0], np.cumsum(block == self.separator_id)])
        firsts = np.concatenate([[0], np.flatnonzero(is_end) + 1])
        is_target = separators[1:] > separators[firsts][document]
        kept = (block != self.separator_id) & (block != self.pad_id)
        document, is_target, num = document[kept], is_target[kept], int(kept.sum())
        made = np.full(length + 1, self.pad_id, np.int32)
        made[:num] = block[kept]
        weights = np.zeros(length, np.float32)
        if num > 1:  # a token is predicted by the one before it, if that is of the same example
            weights[: num - 1] = is_target[1:] & (document[1:] == document[:-1])
        last_key, position = np.arange(length, dtype=np.int32), np.arange(num)
        if self.is_bidirectional:
            last_input = np.full(len(firsts), -1, np.int64)
            np.maximum.at(last_input, document[~is_target], position[~is_target])
            seen = np.where(is_target, position, last_input[document])
            last_key[:num] = seen.astype(np.int32)
        documents = np.full(length, len(firsts), np.int32)
        documents[:num] = document
        return {
            "tokens": made, "token_weights": weights, "last_key": last_key, "documents": documents,
        }  # fmt: skip

    def sees_whole_prompt(self) -> bool:
        return self.is_bidirectional

    def predicts_text(self) -> bool:
        return False


def filling(objective: Objective, length: int) -> Row:
    """A row of `length` tokens to predict that weighs nothing, as all rows of a batch are that only fill the mesh."""
    row: Row = {name: np.zeros(length, _DTYPES[name]) for name in objective.arrays}
    if "last_key" in row:
        row["last_key"] = np.arange(length, dtype=np.int32)
    return {"tokens": np.zeros(length + 1, np.int32), **row}


def identity(objective: Objective) -> dict[str, Any]:
    """What of it decides what a run has been trained on, for JSON; empty for CausalLM, which needs no name."""
    if isinstance(objective, CausalLM):
        return {}
    return {"objective": repr(objective)}
