"""Which samples are seen, and their tokens, whatever the number of processes, the mesh and the batch."""

import json
import random
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiny_run

from bloomjax import token_store
from bloomjax.data import TrainData
from bloomjax.schedules import BatchSchedule
from bloomjax.tasks.languages import NATURAL_LANGUAGES

LENGTH = 32
RAMP = dict(
    batch_size_samples=64, ramp_start_samples=16, ramp_increment_samples=8,
    ramp_length_samples=6_000,
)  # fmt: skip


@pytest.fixture(scope="module")
def options(tmp_path_factory, tiny_text):
    """Of TrainData: a store of 46 languages, between one and a few hundred windows each, in very unequal shares."""
    rng = random.Random(0)
    words = sorted({word for texts in tiny_text.documents.values() for t in texts for word in t.split()})  # fmt: skip
    codes = [language.code for language in NATURAL_LANGUAGES]
    documents = {
        code: [" ".join(rng.choices(words, k=rng.randint(20, 400))) for _ in range(3 + number % 5)]
        for number, code in enumerate(codes)
    }
    assert len(documents) == 46
    path = tmp_path_factory.mktemp("processes") / "tokens"
    token_store.write_store(path, documents, tiny_text.vocabulary)
    weights = {code: 1.5**-number for number, code in enumerate(codes)}
    return dict(store_dir=str(path), sequence_length=LENGTH, seed=11, weights=weights)


def fetch(options, num_processes, mesh, schedule, steps):
    """(sample, crc32) of all rows that the processes hold together."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    job = dict(
        address=address, num_processes=num_processes, mesh=mesh, schedule=schedule, steps=steps,
        data=options,
    )  # fmt: skip
    worker = Path(__file__).with_name("data_worker.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), json.dumps(job | {"process": number})],
            env=tiny_run.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(num_processes)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [p.returncode for p in processes] == [0] * num_processes, outputs
    lines = [line.split() for out, _ in outputs for line in out.splitlines()]
    return [(int(sample), int(crc)) for sample, crc in lines]


@pytest.mark.slow
def test_10_000_samples_in_1_2_and_4_processes(options):
    ramp = BatchSchedule(**RAMP)
    rng = random.Random(1)
    stops = sorted(rng.sample(range(30, 190), 2)) + [270]  # steps
    begin = 0
    runs = []
    for stop, num_processes, mesh in zip(stops, (1, 2, 4), ([8, 1, 1], [4, 2, 1], [2, 4, 1]), strict=True):  # fmt: skip
        runs.append((num_processes, mesh, RAMP, [begin + 1, stop]))
        begin = stop
    # Then with another batch: 8 divides the samples so far.
    consumed = ramp.samples_after(270)
    assert consumed % 8 == 0 and consumed >= 10_000
    runs.append((2, [2, 2, 2], dict(batch_size_samples=8), [consumed // 8 + 1, consumed // 8 + 20]))
    found = [pair for run in runs for pair in fetch(options, *run)]
    data = TrainData(**options).open()
    num = consumed + 160
    expected = [zlib.crc32(row.tobytes()) for row in data.rows(np.arange(num))]
    # Each sample once, in whichever process, with its own tokens. A row lies on several devices of a `tensor` axis.
    assert sorted(set(found)) == list(enumerate(expected))
    assert sorted(sample for sample, _ in found) == list(range(num))
    assert len(set(expected)) > 1000
    seen = data.mixture.counts(num)
    worst = max(abs(seen[name] - num * share) for name, share in data.mixture.shares.items())
    print(
        f"{num} samples of {len(seen)} languages: worst deviation from a share {worst:.3f} samples"
    )
    assert worst < 2
