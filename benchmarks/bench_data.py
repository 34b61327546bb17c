"""How fast samples are fetched: the token store against a numpy memory map of the same tokens, in CPU time.

    python benchmarks/bench_data.py [--json FILE]

46 languages in the shares of ROOTS, windows of 2,048 tokens, batches of 256 samples, everything in the page cache. Each
round takes the next samples. Ours finds the windows by number and checks the crc32c of every chunk at every read; the
map has a precomputed index, all its pages were touched before, and it copies to int32.
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
from bloomjax.data import OpenTrainData, TrainData
from bloomjax.tasks.languages import NATURAL_LANGUAGES

LENGTH, BATCH, NUM_BATCHES, ROUNDS = 2048, 256, 16, 16
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


def samples_of(round_number: int) -> list[np.ndarray]:
    """Sample numbers of the batches of a round."""
    first = round_number * NUM_BATCHES * BATCH
    return [np.arange(first + n * BATCH, first + (n + 1) * BATCH) for n in range(NUM_BATCHES)]


def fetch(data: OpenTrainData, samples: list[np.ndarray]) -> list[np.ndarray]:
    return [data.rows(batch) for batch in samples]


def fetch_from_maps(maps: dict, starts: list[list[tuple[str, int]]]) -> list[np.ndarray]:
    found = []
    for batch in starts:
        rows = np.empty((BATCH, LENGTH + 1), np.int32)
        for row, (language, start) in enumerate(batch):
            rows[row] = maps[language][start : start + LENGTH + 1]
        found.append(rows)
    return found


def measure_round(
    data: OpenTrainData, maps: dict, samples: list[np.ndarray]
) -> tuple[float, float]:
    """CPU-seconds of ours and of the maps, for the same rows."""
    starts = []
    for batch in samples:
        source, _, window = data.mixture.locate(batch)
        languages = [data.mixture.names[number] for number in source]
        starts.append(list(zip(languages, (window * LENGTH).tolist(), strict=True)))
    times = (
        seconds_of(lambda: fetch(data, samples)),
        seconds_of(lambda: fetch_from_maps(maps, starts)),
    )
    for a, b in zip(fetch(data, samples), fetch_from_maps(maps, starts), strict=True):
        np.testing.assert_array_equal(a, b)
    return times


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
        maps = {}
        for language in data.mixture.names:
            num = data.store.num_tokens(language, "train")
            np.save(Path(name) / f"{language}.npy", data.store.read(language, "train", 0, num))
            maps[language] = np.load(Path(name) / f"{language}.npy", mmap_mode="r")
            assert maps[language].max() < data.store.vocab_size  # touches every page
        first_pass_seconds = seconds_of(lambda: fetch(data, samples_of(0)))
        times = [measure_round(data, maps, samples_of(1 + number)) for number in range(ROUNDS)]
    num_tokens = NUM_BATCHES * BATCH * LENGTH
    ours_seconds, maps_seconds = (sum(column) for column in zip(*times, strict=True))
    rate = ROUNDS * num_tokens / ours_seconds
    ratios = sorted(maps / ours for ours, maps in times)
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: metadata.version(name) for name in ("numpy", "google-crc32c")}
        | {"python": platform.python_version()},
        "load_average": round(os.getloadavg()[0], 1),
        "tokens_per_cpu_second": round(rate),
        "first_pass_tokens_per_cpu_second": round(num_tokens / first_pass_seconds),
        "memory_map_tokens_per_cpu_second": round(ROUNDS * num_tokens / maps_seconds),
        "ratio": round(maps_seconds / ours_seconds, 3),
        "ratio_of_the_rounds": {
            "worst": round(ratios[0], 3),
            "median": round(statistics.median(ratios), 3),
            "best": round(ratios[-1], 3),
        },
        "times_one_h200_at_7b1": round(rate / H200_7B1_TOKENS_PER_SECOND),
    }
    text = json.dumps(record, indent=2)
    print(text)
    if arguments.json:
        Path(arguments.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
