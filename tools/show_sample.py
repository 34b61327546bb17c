"""Prints the text of training samples: what the model saw at a loss spike.

    python tools/show_sample.py --gin_file=runs/tiny/config.gin --sample=1234
    python tools/show_sample.py --gin_file=runs/tiny/config.gin --step=40

With --step a line for each sample of that step; with --sample the whole text of one, cut where documents end.
`document` counts the documents of the language that are trained on, from 0, and `tokens` its tokens.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from bloomjax import config
from bloomjax.curriculum import CutMixture
from bloomjax.data import OpenTrainData
from bloomjax.errors import BadInput
from bloomjax.position import read_skipped
from bloomjax.skips import Skips
from bloomjax.vocabulary import Vocabulary, open_vocabulary

_FLAGS = flags.FlagValues()
_SAMPLE = flags.DEFINE_integer("sample", None, "Number of a sample, from 0.", flag_values=_FLAGS)
_STEP = flags.DEFINE_integer("step", None, "All samples of this step.", flag_values=_FLAGS)
_JSON = flags.DEFINE_bool("json", False, "One JSON object a line.", flag_values=_FLAGS)


def describe(data: OpenTrainData, vocabulary: Vocabulary, sample: int) -> dict[str, Any]:
    """Where a sample comes from, and its text by document."""
    source, epoch, window = (int(column[0]) for column in data.mixture.locate(np.array([sample])))
    name = data.mixture.names[source]
    store, language = data.sources[name]
    ids = data.cut_rows(np.array([sample]))[0]
    length = len(ids) - 1
    start = window if isinstance(data.mixture, CutMixture) else window * length
    ends = store.read_document_ends(language, "train").astype(np.int64)
    first = int(np.searchsorted(ends, start, side="right"))
    inside = ends[(ends > start) & (ends < start + length + 1)] - start
    parts = np.split(ids, inside)
    return {
        "sample": sample,
        "language": name,
        "store": str(store.path),
        "epoch": epoch,
        "tokens": [start, start + length + 1],
        "documents": [
            {"document": first + number, "text": vocabulary.decode(part.tolist())}
            for number, part in enumerate(parts)
        ],
    }


def samples_asked_for(data: OpenTrainData) -> Sequence[int]:
    """Sample numbers. BadInput unless exactly one of --sample and --step is given, and it exists."""
    sample, step = _SAMPLE.value, _STEP.value
    if sample is not None and step is None:
        if sample < 0:
            raise BadInput(f"--sample={sample}: samples are numbered from 0")
        return [sample]
    if step is None or sample is not None:
        raise BadInput("give one of --sample=K (from 0) and --step=N (from 1)")
    if step < 1:
        raise BadInput(f"--step={step}: steps are numbered from 1")
    # What the run has rolled back is no longer in its sequence.
    skipped = read_skipped(Path(config.build("train.model_dir")))
    data.skip(Skips.of([*data.kept.skips.ranges, *skipped]))
    return data.samples_of(step, config.build("train.batch_schedule")).tolist()


def lines(found: dict[str, Any], whole: bool) -> Iterator[str]:
    """For a person: a line, or a headline and the text."""
    start, stop = found["tokens"]
    head = (
        f"sample {found['sample']}  {found['language']}  epoch {found['epoch']}  tokens {start}..{stop - 1}  "
        f"document {found['documents'][0]['document']}"
    )
    if not whole:
        text = " ".join("".join(each["text"] for each in found["documents"]).split())
        yield f"{head}  {text[:60]}"
        return
    yield f"{head}  of {found['store']}"
    for each in found["documents"]:
        yield f"--- document {each['document']}"
        yield each["text"]


def show_sample() -> None:
    """Prints what the flags ask for."""
    data = config.build("train.train_data").open()
    samples = samples_asked_for(data)
    vocabulary = open_vocabulary(config.build("train.vocabulary_path"))
    if vocabulary.fingerprint != data.store.vocabulary_fingerprint:
        raise BadInput(f"{vocabulary.path} did not make the store {data.store.path}")
    for sample in samples:
        found = describe(data, vocabulary, sample)
        if _JSON.value:
            print(json.dumps(found, ensure_ascii=False))
        else:
            print("\n".join(lines(found, whole=_SAMPLE.value is not None)))


def main(argv: list[str] | None = None) -> None:
    """The command, also with the arguments of a test."""
    config.call(show_sample, argv, _FLAGS)


if __name__ == "__main__":
    main()
