"""Trains a vocabulary on the text of a configuration, before there is a store or a model.

    python tools/train_vocabulary.py --gin_file=tiny.gin --kind=bpe --size=4096 --output=my.json

Reads the Tasks that the gin files name, without the documents held out for validation, and prints
for each language how many bytes of text a token stands for. --kind is `sentencepiece` (a *.model)
or `bpe` (a *.json, byte-level BPE as BLOOM's).
"""

import inspect
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from absl import flags

from bloomjax import config, prepare, token_store, vocabulary
from bloomjax.errors import BadInput
from bloomjax.vocabulary import Vocabulary

_SUFFIXES = {"bpe": ".json", "sentencepiece": ".model"}
_DOCUMENTS_PER_BATCH = 256

_KIND = flags.DEFINE_enum("kind", None, list(_SUFFIXES), "Kind of vocabulary.")
_SIZE = flags.DEFINE_integer("size", None, "Number of tokens, special ones included.")
_OUTPUT = flags.DEFINE_string(
    "output", None, "File to write, *.json or *.model; never overwritten."
)


def count(texts: Iterable[str], vocab: Vocabulary) -> tuple[int, int, int]:
    """Numbers of documents, of bytes of UTF-8 and of tokens (no `</s>` among them) of `texts`."""
    num_documents = num_bytes = num_tokens = 0
    texts = iter(texts)
    while batch := list(itertools.islice(texts, _DOCUMENTS_PER_BATCH)):
        num_documents += len(batch)
        num_bytes += sum(len(text.encode()) for text in batch)
        num_tokens += sum(map(len, vocab.encode_batch(batch)))
    return num_documents, num_bytes, num_tokens


def table(counts: dict[str, tuple[int, int, int]]) -> Iterator[str]:
    """Lines with what `count` found for each language, and with the total."""
    total = tuple(map(sum, zip(*counts.values(), strict=True)))
    width = max(len("language"), *map(len, counts))
    yield f"{'language':{width}}  {'documents':>11}  {'bytes':>15}  {'tokens':>15}  bytes per token"
    for label, (num_documents, num_bytes, num_tokens) in [*counts.items(), ("total", total)]:
        yield (
            f"{label:{width}}  {num_documents:11,}  {num_bytes:15,}  {num_tokens:15,}  "
            f"{num_bytes / num_tokens:15.2f}"
        )


def main() -> None:
    kind, size, output = _KIND.value, _SIZE.value, _OUTPUT.value
    if kind is None or size is None or output is None:
        raise BadInput(
            "give all of --kind (bpe or sentencepiece), --size (tokens) and --output (a new file)"
        )
    suffix = _SUFFIXES[kind]
    vocabulary.check_new_vocabulary(Path(output), suffix, size)
    holdout_fraction = _bound("holdout_fraction")
    token_store.check_holdout_fraction(holdout_fraction)
    languages = prepare.find_languages(
        _bound("task_module"), _bound("mixture_or_task_name"), _bound("text_dir")
    )
    languages = prepare.count_documents(languages)
    print(f"training a vocabulary of {size:,} tokens on {len(languages)} languages", flush=True)
    texts = prepare.training_texts(languages, holdout_fraction)
    vocab = vocabulary.TRAINERS[suffix](texts, output, size)
    counts = {
        language.label: count(prepare.training_texts([language], holdout_fraction), vocab)
        for language in languages
    }
    print(*table(counts), sep="\n")
    print(f"{vocab.path}: {vocab.size:,} tokens, sha256 {vocab.fingerprint[:12]}")
    use = f"--gin.VOCABULARY=\"'{output}'\" --gin.VOCAB_SIZE={size}"
    # The large sizes give the model more ids than the vocabulary has.
    if config.build("prepare.vocab_size", bindings=[f"VOCAB_SIZE = {size}"]) != size:
        use += f" --gin.prepare.vocab_size={size}"
    print(f"use it with {use}")


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
    config.call(main)
