"""A run seen language by language: shares, tokens, epochs, bits per byte, and what to be warned of. Numbers only.

Bits per byte compare what losses per token cannot: languages that a vocabulary cuts into longer and shorter tokens, and
runs with different vocabularies.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from bloomjax.objectives import Objective
from bloomjax.phases import PhasedMixture
from bloomjax.skips import KeptSamples
from bloomjax.token_store import TRAIN, VALIDATION, TokenStore
from bloomjax.vocabulary import Vocabulary
from bloomjax.vocabulary_report import count_words

# Up to four epochs repeated tokens are worth about as much as new ones (Muennighoff et al. 2023, arXiv:2305.16264).
MAX_EPOCHS = 4.0
# Below a thousandth of the tokens in a script, summed over its languages, hardly anything is learnt of it.
MIN_SCRIPT_SHARE = 1e-3
MAX_FERTILITY = 2.0  # times the median
_SAMPLE_TOKENS = 1 << 15

Mixture = PhasedMixture | KeptSamples
Sources = Mapping[str, tuple[TokenStore, str]]  # store and language behind each source of a mixture


@dataclasses.dataclass(frozen=True)
class LanguageRow:
    """One language of a mixture; None for what is not known.

    Attributes:
      language: label.
      name, script: in English, ISO 15924.
      share_declared: of the tokens to train on.
      share_in_store, tokens: of and among the training tokens of the store, `</s>` included.
      bytes_per_token: of its training text, `</s>` included.
      fertility: tokens per word of a sample of its training text; words as in vocabulary_report.
      words_are_characters: whether a word is mostly a single letter there, so that fertility is tokens per character.
      epochs: how often its training windows are seen by the end of the run.
      warnings: a few words each.
    """

    language: str
    name: str | None
    script: str | None
    share_declared: float
    share_in_store: float | None = None
    tokens: int | None = None
    bytes_per_token: float | None = None
    fertility: float | None = None
    words_are_characters: bool = False
    epochs: float | None = None
    warnings: tuple[str, ...] = ()


def bits_per_byte(loss: float, num_tokens: int, num_bytes: int) -> float:
    """Bits for each byte of text that `num_tokens` tokens stand for, of a `loss` in nats a token."""
    return loss * num_tokens / num_bytes / math.log(2)


def held_out_bits_per_byte(losses: Mapping[str, float], sources: Sources) -> dict[str, float]:
    """Bits per byte by source of held-out losses in nats a token.

    Tokens (`</s>` included: it costs bits, too) and bytes are those of the whole held-out part in the store's manifest,
    whichever of its windows were evaluated. So the factor is a constant of the store, and no vocabulary is needed. A
    count over the evaluated windows alone would have to cut characters, and would move with the number of windows.
    """
    found = {}
    for name, loss in losses.items():
        store, language = sources[name]
        num_bytes = num_text_bytes(store, language, VALIDATION)
        found[name] = bits_per_byte(loss, store.num_tokens(language, VALIDATION), num_bytes)
    return found


def num_text_bytes(store: TokenStore, language: str, split: str) -> int:
    """UTF-8 bytes of the documents of a split."""
    return store.manifest["languages"][language]["splits"][split]["num_bytes"]


def declared_shares(mixture: Mixture, num_samples: int) -> dict[str, float]:
    """Token share of each source as declared; with several phases the mean over the tokens of `num_samples` samples."""
    num_samples = max(num_samples, 1)
    firsts = [min(stretch.first_sample, num_samples) for stretch in mixture.stretches]
    ends = [mixture.tokens_after(num) for num in (*firsts[1:], num_samples)]
    parts = [b - a for a, b in itertools.pairwise([0, *ends])]
    return {
        name: math.fsum(
            tokens / ends[-1] * stretch.shares.get(name, 0.0)
            for stretch, tokens in zip(mixture.stretches, parts, strict=True)
        )
        for name in mixture.names
    }


def epochs_seen(mixture: Mixture, sources: Sources, num_samples: int) -> dict[str, float]:
    """How often the training text of each source was seen after `num_samples` samples."""
    found = {}
    for name, tokens in mixture.tokens_by_source(num_samples).items():
        store, language = sources[name]
        block = mixture.block_tokens
        found[name] = tokens / (store.num_windows(language, TRAIN, block) * block)
    return found


def bits_of(losses: Mapping[str, float], sources: Sources, objective: Objective) -> dict[str, Any]:
    """`bits_per_byte_by_language`, and `validation_bits_per_byte`, the mean over languages, each counting the same;
    nothing where the losses of the objective are not those of a token of the text (Objective.predicts_text)."""
    if not objective.predicts_text():
        return {}
    bits = held_out_bits_per_byte(losses, sources)
    return {
        "bits_per_byte_by_language": bits,
        "validation_bits_per_byte": statistics.fmean(bits.values()),
    }


def at_evaluation(
    losses: Mapping[str, float],
    mixture: Mixture,
    sources: Sources,
    num_samples: int,
    objective: Objective,
) -> dict[str, Any]:
    """What an evaluation records beside `losses` (by source, nats a token): `bits_of` and `epochs_by_language`."""
    epochs = epochs_seen(mixture, sources, num_samples)
    return {
        **bits_of(losses, sources, objective),
        "epochs_by_language": {name: round(epochs[name], 6) for name in sorted(epochs)},
    }


def markdown_table(record: Mapping[str, Any], shares: Mapping[str, float]) -> str:
    """The record of an evaluation as a table, worst bits per byte first, for TensorBoard's page of texts; without bits
    per byte worst loss first."""
    losses, epochs = record["loss_by_language"], record["epochs_by_language"]
    bits = record.get("bits_per_byte_by_language")
    lines = ["| language | share | epochs | loss, nats a token |", "|---|---:|---:|---:|"]
    if bits:
        lines = [f"{lines[0]} bits per byte |", f"{lines[1]}---:|"]
    for name in sorted(losses, key=lambda name: -(bits or losses)[name]):
        share = "" if name not in shares else f"{shares[name]:.4%}"
        line = f"| {name} | {share} | {epochs.get(name, 0.0):.3f} | {losses[name]:.3f} |"
        lines.append(f"{line} {bits[name]:.3f} |" if bits else line)
    return "\n".join(lines)


def sample_fertility(
    store: TokenStore, vocabulary: Vocabulary, language: str, max_tokens: int = _SAMPLE_TOKENS
) -> tuple[float | None, bool]:
    """Tokens per word of the first `max_tokens` training tokens, and whether words are characters there.

    None for text without words.
    """
    num_tokens = min(store.num_tokens(language, TRAIN), max_tokens)
    tokens = store.read(language, TRAIN, 0, num_tokens)
    documents = np.split(tokens, np.flatnonzero(tokens == vocabulary.eos_id) + 1)
    words = [count_words(vocabulary.decode(document.tolist())) for document in documents]
    num_words, num_unspaced_words = (sum(column) for column in zip(*words, strict=True))
    num_text_tokens = int((tokens != vocabulary.eos_id).sum())
    if not num_words:
        return None, False
    return num_text_tokens / num_words, 2 * num_unspaced_words > num_words


def rows(
    shares: Mapping[str, float],
    described: Mapping[str, tuple[str, str | None]],
    *,
    sources: Sources | None = None,
    vocabulary: Vocabulary | None = None,
    epochs: Mapping[str, float] | None = None,
) -> list[LanguageRow]:
    """A row for each language with a share or a source, largest declared share first, with warnings.

    Args:
      shares: declared; they sum to 1.
      described: name in English and script of the languages for which they are known.
      sources: for tokens and bytes; also languages that are in a store only.
      vocabulary: the one of the stores, for fertility.
      epochs: by the end of the run.
    """
    sources = sources or {}
    total = sum(store.num_tokens(language, TRAIN) for store, language in sources.values())
    found = []
    for label in dict.fromkeys([*shares, *sources]):
        name, script = described.get(label.split("@")[0], (None, None))
        row = LanguageRow(label, name, script, shares.get(label, 0.0))
        if label in sources:
            store, language = sources[label]
            tokens = store.num_tokens(language, TRAIN)
            fertility, words_are_characters = None, False
            if vocabulary:
                fertility, words_are_characters = sample_fertility(store, vocabulary, language)
            row = dataclasses.replace(
                row,
                share_in_store=tokens / total,
                tokens=tokens,
                bytes_per_token=num_text_bytes(store, language, TRAIN) / tokens,
                fertility=fertility,
                words_are_characters=words_are_characters,
                epochs=None if epochs is None else epochs.get(label, 0.0),
            )
        found.append(row)
    found.sort(key=lambda row: (-row.share_declared, row.language))
    return with_warnings(found)


def with_warnings(found: Iterable[LanguageRow]) -> list[LanguageRow]:
    """The rows with what one should look at before a long run."""
    found = list(found)
    script_share: dict[str, float] = {}
    for row in found:
        if row.script:
            script_share[row.script] = script_share.get(row.script, 0.0) + row.share_declared
    median = median_fertility(found)
    warned = []
    for row in found:
        warnings = []
        if row.share_declared == 0:
            warnings.append("in the store, not in the mixture")
        if row.epochs is not None and row.epochs > MAX_EPOCHS:
            warnings.append(f"{row.epochs:.1f} epochs")
        if row.script and row.share_declared and script_share[row.script] < MIN_SCRIPT_SHARE:
            warnings.append(f"script {row.script} has {script_share[row.script]:.3%} of the tokens")
        fertility = _comparable_fertility(row)
        if median and fertility and fertility > MAX_FERTILITY * median:
            warnings.append(f"fertility {fertility / median:.1f}x the median")
        warned.append(dataclasses.replace(row, warnings=tuple(warnings)))
    return warned


def median_fertility(found: Iterable[LanguageRow]) -> float | None:
    """Over the languages whose words are set apart."""
    values = [value for value in map(_comparable_fertility, found) if value is not None]
    return statistics.median(values) if values else None


def _comparable_fertility(row: LanguageRow) -> float | None:
    return None if row.words_are_characters else row.fertility
