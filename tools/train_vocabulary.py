"""Trains a vocabulary on the text of a configuration, and says how well it fits each language.

    python tools/train_vocabulary.py --gin_file=tiny.gin --kind=bpe --size=4096 --output=my.json
    python tools/train_vocabulary.py --gin_file=tiny.gin --vocabulary=my.json --compare=other.model

Reads the Tasks that the gin files name, without the documents held out for validation; neither a store nor a model need
be there. With --vocabulary nothing is trained and only the table is made.

Which text. A language of n bytes is taken in proportion to n^alpha. --alpha=1 takes all of it; BLOOM's vocabulary was
trained on a subset with alpha = 0.3, which gives small languages pieces of their own. No document is taken twice.
Without --max_bytes the subset is the largest one that keeps these proportions: all of the language that runs out first.
With --max_bytes it is as large as that allows; languages that run out give all they have and the others share the rest.
Whole documents are taken, by a rule of --seed, the language and the number of the document, so that the bytes taken of
a language stay within a document of their part all along; the same text gives the same vocabulary.

Kinds. `bpe` (*.json) is byte-level BPE as BLOOM's: a piece is part of one word with the one space before it, or of what
is between words (.,!? and their kin, round brackets, spaces, newlines); digits are letters like others, so that
frequent numbers become pieces. `sentencepiece` (*.model) is BPE over characters: each digit is a piece alone, a run of
spaces may be one piece, newlines and tabs are always byte tokens, and so are characters too rare for a piece. Both
change nothing in the text, and ids 0-3 are <unk>, <s>, </s>, <pad> in both.

The table is made of the text that the vocabulary was trained on. `tokens per word` is the fertility: a word is a run of
letters, marks and numbers, or one letter where a script sets no spaces between words (marked *; those figures compare
only with themselves). `unknown` is the share of characters that are cut into pieces smaller than a character: no id
<unk> is ever made.
"""

import hashlib
import inspect
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from bloomjax import config, prepare, token_store, vocabulary
from bloomjax.errors import BadInput
from bloomjax.vocabulary_report import Counts, Meter, measure

_SUFFIXES = {"bpe": ".json", "sentencepiece": ".model"}

FLAGS = flags.FlagValues()
_KIND = flags.DEFINE_enum("kind", None, list(_SUFFIXES), "Kind of vocabulary.", flag_values=FLAGS)
_SIZE = flags.DEFINE_integer(
    "size", None, "Number of tokens, special ones included.", flag_values=FLAGS
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "File to write, *.json or *.model; never overwritten.", flag_values=FLAGS
)
_VOCABULARY = flags.DEFINE_string(
    "vocabulary", None, "One that exists; nothing is trained.", flag_values=FLAGS
)
_COMPARE = flags.DEFINE_string(
    "compare", None, "Another vocabulary, for a table of both.", flag_values=FLAGS
)
_ALPHA = flags.DEFINE_float(
    "alpha", 1.0, "Languages in proportion to bytes^alpha; BLOOM: 0.3.", flag_values=FLAGS
)
_MAX_BYTES = flags.DEFINE_integer(
    "max_bytes", None, "Bytes of text to take, at most.", flag_values=FLAGS
)
_SEED = flags.DEFINE_integer("seed", 42, "Of the choice of documents.", flag_values=FLAGS)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.", flag_values=FLAGS)


# ---- which text ----


def quotas(num_bytes: dict[str, int], alpha: float, max_bytes: int | None) -> dict[str, int]:
    """Bytes to take of each language: min(n, c n^alpha), c as `max_bytes` allows or else as large as n >= c n^alpha."""
    powers = {name: n**alpha for name, n in num_bytes.items()}
    # Those that run out first come first.
    left = sorted(num_bytes, key=lambda name: num_bytes[name] / powers[name])
    scale, left_bytes = num_bytes[left[0]] / powers[left[0]], max_bytes
    while left:
        if left_bytes is not None:
            scale = left_bytes / math.fsum(powers[name] for name in left)
        if num_bytes[left[0]] / powers[left[0]] > scale:
            break
        name = left.pop(0)
        if left_bytes is not None:  # what it leaves is for the others
            left_bytes -= num_bytes[name]
    return {
        name: math.floor(scale * powers[name]) if name in left else n
        for name, n in num_bytes.items()
    }


def choose(texts: Iterable[str], label: str, quota: int, total: int, seed: int) -> Iterator[str]:
    """Of documents of `total` bytes together, some that have `quota` bytes at most, spread evenly.

    A document of b bytes is taken when more than t*b bytes are due, t in [0, 1) its number drawn from (seed, label,
    index); what is due grows with the text read and shrinks with the text taken. All of them where quota = total.
    """
    num_read = num_taken = 0
    for index, text in enumerate(texts):
        num_bytes = len(text.encode())
        num_read += num_bytes
        due = quota * num_read // total - num_taken
        digest = hashlib.blake2b(f"{seed}:{label}:{index}".encode(), digest_size=4).digest()
        if due << 32 > int.from_bytes(digest, "big") * num_bytes and num_taken + num_bytes <= quota:
            num_taken += num_bytes
            yield text


class Selection:
    """The documents to train on; iterated anew for each use, never held in memory."""

    def __init__(
        self,
        languages: Sequence[prepare.Language],
        holdout_fraction: float,
        alpha: float,
        max_bytes: int | None,
        seed: int,
    ):
        """Reads all of the text once more to count its bytes, unless all of it is taken."""
        self.labels = [language.label for language in languages]
        self._languages = {language.label: language for language in languages}
        self._holdout_fraction = holdout_fraction
        self._seed = seed
        self._num_bytes: dict[str, int] | None = None
        if alpha != 1 or max_bytes is not None:
            self._num_bytes = {
                name: sum(len(text.encode()) for text in self._all(name)) for name in self.labels
            }
            self._quotas = quotas(self._num_bytes, alpha, max_bytes)

    def texts(self, label: str) -> Iterator[str]:
        """The documents of one language."""
        texts = self._all(label)
        if self._num_bytes is None:
            return texts
        return choose(texts, label, self._quotas[label], self._num_bytes[label], self._seed)

    def all_texts(self) -> Iterator[str]:
        """The documents of all languages."""
        for label in self.labels:
            yield from self.texts(label)

    def describe(self) -> str:
        """How much is taken of how much."""
        if self._num_bytes is None:
            return "all of the text"
        whole = [name for name in self.labels if self._quotas[name] == self._num_bytes[name]]
        return (
            f"at most {sum(self._quotas.values()):,} of {sum(self._num_bytes.values()):,} bytes; "
            f"all of: {', '.join(whole) or 'none'}"
        )

    def _all(self, label: str) -> Iterator[str]:
        return prepare.training_texts([self._languages[label]], self._holdout_fraction)


# ---- tables ----


def table(counts: dict[str, Counts]) -> Iterator[str]:
    """Lines with the counts of each language and their total."""
    width = max(len("language"), *map(len, counts))
    yield (
        f"{'language':{width}}  {'documents':>11}  {'bytes':>15}  {'words':>13}  {'tokens':>13}  "
        f"bytes per token  tokens per word  unknown"
    )
    for label, found in [*counts.items(), ("total", _sum(counts))]:
        yield (
            f"{label:{width}}  {found.num_documents:11,}  {found.num_bytes:15,}  "
            f"{found.num_words:13,}  {found.num_tokens:13,}  {_cell(found.bytes_per_token, 15)}  "
            f"{_fertility(found, 15)}  {_percent(found)}"
        )


def comparison(ours: dict[str, Counts], theirs: dict[str, Counts]) -> Iterator[str]:
    """Lines with both vocabularies, A and B, over the same text; the ratio is tokens of A for a token of B."""
    width = max(len("language"), *map(len, ours))
    yield (
        f"{'language':{width}}  {'tokens A':>13}  {'tokens B':>13}   A / B  "
        f"tokens per word A      B  bytes per token A      B  unknown A        B"
    )
    pairs = [(name, ours[name], theirs[name]) for name in ours]
    for label, a, b in [*pairs, ("total", _sum(ours), _sum(theirs))]:
        ratio = a.num_tokens / b.num_tokens if b.num_tokens else None
        yield (
            f"{label:{width}}  {a.num_tokens:13,}  {b.num_tokens:13,}  {_cell(ratio, 6, 3)}  "
            f"{_fertility(a, 17)} {_fertility(b, 6)}  {_cell(a.bytes_per_token, 17)} "
            f"{_cell(b.bytes_per_token, 6)}    {_percent(a)}  {_percent(b)}"
        )


def as_json(counts: Counts) -> dict[str, Any]:
    """The counts and their ratios."""
    return {
        "documents": counts.num_documents,
        "bytes": counts.num_bytes,
        "characters": counts.num_characters,
        "words": counts.num_words,
        "words_are_characters": counts.words_are_characters,
        "tokens": counts.num_tokens,
        "bytes_per_token": counts.bytes_per_token,
        "fertility": counts.tokens_per_word,
        "unknown_rate": counts.unknown_rate,
        "byte_token_rate": counts.byte_token_rate,
    }


def _sum(counts: dict[str, Counts]) -> Counts:
    return sum(counts.values(), Counts())


def _cell(value: float | None, width: int, digits: int = 2) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def _fertility(counts: Counts, width: int) -> str:
    """With a star behind it where words are characters."""
    mark = "*" if counts.words_are_characters else ""
    value = counts.tokens_per_word
    return f"{'-' if value is None else f'{value:.2f}{mark}':>{width}}"


def _percent(counts: Counts) -> str:
    return f"{'-' if counts.unknown_rate is None else f'{counts.unknown_rate:.2%}':>7}"


# ---- the command ----


def main() -> None:
    suffix = _check_flags()
    given = _VOCABULARY.value
    compared = vocabulary.open_vocabulary(_COMPARE.value) if _COMPARE.value else None
    vocab = vocabulary.open_vocabulary(given) if given else None
    holdout_fraction = _bound("holdout_fraction")
    token_store.check_holdout_fraction(holdout_fraction)
    languages = prepare.find_languages(
        _bound("task_module"), _bound("mixture_or_task_name"), _bound("text_dir")
    )
    languages = prepare.count_documents(languages)
    selection = Selection(languages, holdout_fraction, _ALPHA.value, _MAX_BYTES.value, _SEED.value)
    what = f"{len(languages)} languages, {selection.describe()}"
    if vocab is None:
        _say(f"training a vocabulary of {_SIZE.value:,} tokens on {what}")
        train = vocabulary.TRAINERS[suffix]
        vocab = train(selection.all_texts(), _OUTPUT.value, _SIZE.value)
    else:
        _say(f"measuring on {what}")
    meters = [Meter(each) for each in (vocab, compared) if each is not None]
    counts = {name: measure(selection.texts(name), meters) for name in selection.labels}
    _print(vocab, compared, counts, selection)
    if not given and not _JSON.value:
        use = f"--gin.VOCABULARY=\"'{_OUTPUT.value}'\" --gin.VOCAB_SIZE={_SIZE.value}"
        # The large sizes give the model more ids than the vocabulary has.
        bindings = [f"VOCAB_SIZE = {_SIZE.value}"]
        if config.build("prepare.vocab_size", bindings=bindings) != _SIZE.value:
            use += f" --gin.prepare.vocab_size={_SIZE.value}"
        print(f"use it with {use}")


def _check_flags() -> str:
    """The ending of the vocabulary to train, '' for none."""
    kind, size, output = _KIND.value, _SIZE.value, _OUTPUT.value
    suffix = ""
    if _VOCABULARY.value:
        if (kind, size, output) != (None, None, None):
            raise BadInput("--vocabulary trains nothing: it goes without --kind, --size, --output")
    elif kind is None or size is None or output is None:
        raise BadInput(
            "give all of --kind (bpe or sentencepiece), --size (tokens) and --output (a new file), "
            "or --vocabulary (one that exists)"
        )
    else:
        suffix = _SUFFIXES[kind]
        vocabulary.check_new_vocabulary(Path(output), suffix, size)
    if not 0 <= _ALPHA.value <= 1:
        raise BadInput(f"--alpha={_ALPHA.value}: it lies between 0 (equal parts) and 1 (all text)")
    if _MAX_BYTES.value is not None and _MAX_BYTES.value < 1:
        raise BadInput(f"--max_bytes={_MAX_BYTES.value}: it must be at least 1")
    return suffix


def _print(
    vocab: vocabulary.Vocabulary,
    compared: vocabulary.Vocabulary | None,
    counts: dict[str, list[Counts]],
    selection: Selection,
) -> None:
    ours = {name: found[0] for name, found in counts.items()}
    theirs = {name: found[1] for name, found in counts.items()} if compared else None
    if _JSON.value:
        rows = [{"language": name, **as_json(found)} for name, found in ours.items()]
        report: dict[str, Any] = {
            "vocabulary": _named(vocab),
            "text": selection.describe(),
            "languages": rows,
            "total": as_json(_sum(ours)),
        }
        if compared and theirs:
            report["compared_with"] = _named(compared)
            for row in rows:
                row["compared"] = as_json(theirs[row["language"]])
                tokens = row["compared"]["tokens"]
                row["ratio"] = row["tokens"] / tokens if tokens else None
        print(json.dumps(report, ensure_ascii=False))
        return
    print(*table(ours), sep="\n")
    if compared and theirs:
        print(f"\nA = {vocab.path} ({vocab.size:,}), B = {compared.path} ({compared.size:,})")
        print(*comparison(ours, theirs), sep="\n")
        print()
    print(f"{vocab.path}: {vocab.size:,} tokens, sha256 {vocab.fingerprint[:12]}")


def _named(vocab: vocabulary.Vocabulary) -> dict[str, Any]:
    return {"path": os.fspath(vocab.path), "size": vocab.size, "fingerprint": vocab.fingerprint}


def _say(line: str) -> None:
    if not _JSON.value:
        print(line, flush=True)


def _bound(parameter: str) -> Any:
    """What the gin files give `prepare` for `parameter`, or its default."""
    default = inspect.signature(prepare.prepare).parameters[parameter].default
    try:
        return config.build(f"prepare.{parameter}")
    except BadInput as error:
        if default is inspect.Parameter.empty or "does not bind" not in str(error):
            raise
        return default


if __name__ == "__main__":
    config.call(main, own_flags=FLAGS)
