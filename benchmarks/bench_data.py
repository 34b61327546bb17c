"""How fast samples are fetched: the token store against a numpy memory map of the same tokens, in CPU time.

    python benchmarks/bench_data.py [--json FILE]

46 languages in the shares of ROOTS, windows of 2,048 tokens, batches of 256 samples, everything in the page cache. Ours
finds the windows by number and checks a crc32c of every chunk; the map has a precomputed index and copies to int32.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from importlib import metadata
from pathlib import Path

import numpy as np

from bloomjax import token_store, vocabulary
from bloomjax.data import TrainData
from bloomjax.tasks.languages import NATURAL_LANGUAGES

LENGTH, BATCH, NUM_BATCHES, ROUNDS = 2048, 256, 16, 5
NUM_TOKENS = 40_000_000
# 7.07e9 parameters, 6 FLOPs a parameter and token, half of 989e12 FLOP/s dense bf16.
H200_7B1_TOKENS_PER_SECOND = 0.5 * 989e12 / (6 * 7.07e9)


class _Ids:
    """Stands in for a vocabulary: a document is already a line of ids."""

    def __init__(self, vocab: vocabulary.Vocabulary):
        self._vocab = vocab

    def __getattr__(self, name):
        return getattr(self._vocab, name)

    def encode(self, text):
        return [int(word) for word in text.split()]

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]


def make_store(folder: Path) -> Path:
    """Random tokens, as many of each language as ROOTS has in proportion, at least two windows."""
    texts = ["ba ke li mo nu ra se ti"] * 50
    vocab = vocabulary.train_sentencepiece(texts, folder / "v.model", 280)
    rng = np.random.default_rng(0)
    total = sum(language.weight for language in NATURAL_LANGUAGES)
    documents = {}
    for language in NATURAL_LANGUAGES:
        num = max(3 * LENGTH, int(NUM_TOKENS * language.weight / total))
        ids = rng.integers(4, vocab.size, num).astype(str)
        step = 1000
        documents[language.code] = [" ".join(ids[i : i + step]) for i in range(0, num, step)]
    path = folder / "tokens"
    token_store.write_store(path, documents, _Ids(vocab))
    return path


def seconds_of(function) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        store_dir = make_store(Path(name))
        weights = {language.code: language.weight for language in NATURAL_LANGUAGES}
        data = TrainData(
            store_dir=str(store_dir), sequence_length=LENGTH, seed=1, weights=weights
        ).open()
        samples = [np.arange(n * BATCH, (n + 1) * BATCH) for n in range(NUM_BATCHES)]
        maps, starts = {}, []
        for language in data.mixture.names:
            num = data.store.num_tokens(language, "train")
            np.save(Path(name) / f"{language}.npy", data.store.read(language, "train", 0, num))
            maps[language] = np.load(Path(name) / f"{language}.npy", mmap_mode="r")
        for batch in samples:
            source, _, window = data.mixture.locate(batch)
            languages = [data.mixture.names[number] for number in source]
            starts.append(list(zip(languages, (window * LENGTH).tolist(), strict=True)))

        def ours():
            return [data.rows(batch) for batch in samples]

        def memory_map():
            found = []
            for batch in starts:
                rows = np.empty((BATCH, LENGTH + 1), np.int32)
                for row, (language, start) in enumerate(batch):
                    rows[row] = maps[language][start : start + LENGTH + 1]
                found.append(rows)
            return found

        for a, b in zip(ours(), memory_map(), strict=True):
            np.testing.assert_array_equal(a, b)
        times = [(seconds_of(ours), seconds_of(memory_map)) for _ in range(ROUNDS)]
    num_tokens = NUM_BATCHES * BATCH * LENGTH
    rates = [num_tokens / statistics.median(column) for column in zip(*times, strict=True)]
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: metadata.version(name) for name in ("numpy", "tensorstore")}
        | {"python": platform.python_version()},
        "tokens_per_cpu_second": round(rates[0]),
        "memory_map_tokens_per_cpu_second": round(rates[1]),
        "ratio": round(statistics.median(b / a for a, b in times), 3),
        "times_one_h200_at_7b1": round(rates[0] / H200_7B1_TOKENS_PER_SECOND),
    }
    text = json.dumps(record, indent=2)
    print(text)
    if arguments.json:
        Path(arguments.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
