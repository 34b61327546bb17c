"""The reader of local shard files against TensorStore's own, and against damage, threads, forks and limits."""

import concurrent.futures
import gc
import os
import resource
import subprocess
import sys
import threading

import google_crc32c
import numpy as np
import pytest
import tensorstore
from tiny_run import REPOSITORY

from bloomjax import data as data_module
from bloomjax import local_shards, token_store
from bloomjax.data import TrainData
from bloomjax.errors import BadInput
from bloomjax.local_shards import LocalTokens, ShardFiles, Unreadable
from bloomjax.mixture import MAX_SAMPLES

CHUNK, SHARD, VOCAB_SIZE = 16, 80, 1000  # tokens
STRIDE = 4 * CHUNK + 4


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(num_tokens): folder of such an array, as token_store writes it, and what TensorStore reads from it."""
    monkeypatch.setattr(token_store, "_CHUNK_BYTES", 4 * CHUNK)
    monkeypatch.setattr(token_store, "_SHARD_BYTES", 4 * SHARD)

    def call(num_tokens):
        name = f"array{num_tokens}"
        writer = token_store._ArrayWriter(tmp_path, name, np.uint32)
        tokens = np.random.default_rng(num_tokens).integers(0, VOCAB_SIZE, num_tokens)
        for piece in np.array_split(tokens.astype(np.uint32), 3):
            writer.append(piece)
        writer.close()
        expected = with_tensorstore(tmp_path / name)[:].read().result()
        np.testing.assert_array_equal(expected, tokens)
        return tmp_path / name, expected

    return call


def with_tensorstore(folder):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}}
    return tensorstore.open(spec, open=True).result()


def opened(folder, files=None, vocab_size=VOCAB_SIZE):
    description = token_store._parse_json((folder / "zarr.json").read_bytes())
    array = LocalTokens.of(str(folder), description, vocab_size, files or ShardFiles())
    assert array is not None
    return array


def rows_of(array, starts, length):
    rows = np.full((len(starts), length), 77, np.uint32)
    array.read_into(starts, rows, list(range(len(starts))))
    return rows


# One token; less than a chunk; one; a few; less than a file; one; several files; ends with a whole file.
NUMS = [1, 5, 16, 33, 79, 80, 81, 96, 400, 401, 1000]


@pytest.mark.parametrize("num_tokens", NUMS)
def test_reads_what_tensorstore_reads(write, num_tokens):
    folder, expected = write(num_tokens)
    array = opened(folder)
    rng = np.random.default_rng(0)
    ranges = np.sort(rng.integers(0, num_tokens + 1, (200, 2)), axis=1).tolist()
    for start, stop in [(0, num_tokens), (num_tokens - 1, num_tokens), *ranges]:
        found = array.read(start, stop)
        assert found.dtype == np.uint32
        np.testing.assert_array_equal(found, expected[start:stop])


@pytest.mark.parametrize("num_tokens", NUMS)
def test_rows_are_what_tensorstore_reads(write, num_tokens):
    """Rows that begin with a chunk and others, of whole chunks, with a rest and without, over the ends of files."""
    folder, expected = write(num_tokens)
    array = opened(folder)
    windows = np.lib.stride_tricks.sliding_window_view
    for length in (1, 2, 15, 16, 17, 18, 32, 33, 49, 80, 81, 100, 161, 240):
        if length > num_tokens:
            continue
        starts = np.random.default_rng(length).permutation(num_tokens - length + 1)[:150].tolist()
        np.testing.assert_array_equal(
            rows_of(array, starts, length), windows(expected, length)[starts]
        )
        aligned = list(range(0, num_tokens - length + 1, CHUNK))
        np.testing.assert_array_equal(
            rows_of(array, aligned, length), windows(expected, length)[aligned]
        )


def test_more_chunks_than_a_read_may_have_buffers(write, monkeypatch):
    monkeypatch.setattr(token_store, "_SHARD_BYTES", 4 * CHUNK * 700)
    folder, expected = write(CHUNK * 650)
    assert os.sysconf("SC_IOV_MAX") < 2 * 600
    for num_chunks in (499, 500, 511, 512, 600):
        length = num_chunks * CHUNK + 1
        np.testing.assert_array_equal(
            rows_of(opened(folder), [0, CHUNK], length),
            [expected[:length], expected[CHUNK : CHUNK + length]],
        )
    np.testing.assert_array_equal(opened(folder).read(3, 10_399), expected[3:10_399])


def flip(path, position, bit):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def test_every_flipped_bit_is_noticed_where_it_is(write):
    """While the file is open and was read before, and when it is opened anew."""
    folder, expected = write(200)
    file = folder / "c" / "1"  # tokens 80 to 160
    before = opened(folder)
    before.read(0, 200)
    num_bytes = file.stat().st_size
    assert num_bytes == 5 * STRIDE + 5 * 16 + 4
    for position in range(num_bytes):
        flip(file, position, position % 8)
        after = opened(folder)
        if position < 5 * STRIDE:
            chunk = 80 + position // STRIDE * CHUNK
            for array in (before, after):
                for start, length in (
                    (chunk, 16),
                    (chunk, 1),
                    (chunk, 17),
                    (chunk + 3, 2),
                    (chunk - 16, 17),
                ):
                    with pytest.raises(Unreadable, match="checksum"):
                        array.read(start, start + length)
                    with pytest.raises(Unreadable, match="checksum"):
                        rows_of(array, [start], length)
                np.testing.assert_array_equal(array.read(0, chunk), expected[:chunk])
                np.testing.assert_array_equal(array.read(chunk + 16, 200), expected[chunk + 16 :])
                others = [start for start in (80, 96, 112, 128) if start + 16 != chunk != start]
                rows_of(array, others, 17)
        else:
            with pytest.raises(Unreadable, match="the index is damaged"):
                after.read(80, 81)
            np.testing.assert_array_equal(after.read(0, 80), expected[:80])
        flip(file, position, position % 8)
    np.testing.assert_array_equal(opened(folder).read(0, 200), expected)


@pytest.mark.parametrize("length", [0, 3, 4, 50, 5 * STRIDE, 5 * STRIDE + 83])
def test_cut_short_or_missing(write, length):
    folder, expected = write(200)
    file = folder / "c" / "1"
    before = opened(folder)
    before.read(0, 200)
    os.truncate(file, length)
    with pytest.raises(Unreadable, match="index is damaged"):
        opened(folder).read(80, 81)
    last_whole = length // STRIDE
    for chunk in range(5):
        start = 80 + chunk * CHUNK
        if chunk < last_whole:
            np.testing.assert_array_equal(before.read(start, start + 16), expected[start:][:16])
        else:
            with pytest.raises(Unreadable, match="cut short"):
                before.read(start, start + 16)
            with pytest.raises(Unreadable, match="cut short"):
                rows_of(before, [start], 16)
            with pytest.raises(Unreadable, match="cut short"):
                rows_of(before, [start], 3)
    file.unlink()
    with pytest.raises(Unreadable, match="No such file"):
        opened(folder).read(80, 81)
    file.mkdir()
    with pytest.raises(Unreadable):
        opened(folder).read(80, 81)


def test_chunks_in_another_order_are_left_to_tensorstore(write):
    """A sound file that nothing here writes: the first two chunks have changed places, and the index says so."""
    folder, expected = write(200)
    file = folder / "c" / "0"
    data = file.read_bytes()
    entries = np.frombuffer(data[5 * STRIDE : -4], "<u8").reshape(5, 2)[[1, 0, 2, 3, 4]].tobytes()
    file.write_bytes(
        data[STRIDE : 2 * STRIDE] + data[:STRIDE] + data[2 * STRIDE : 5 * STRIDE] + entries
        + google_crc32c.value(entries).to_bytes(4, "little")
    )  # fmt: skip
    np.testing.assert_array_equal(with_tensorstore(folder)[:].read().result(), expected)
    array = opened(folder)
    for _ in range(2):
        with pytest.raises(Unreadable, match="not in order"):
            array.read(0, 1)
    np.testing.assert_array_equal(array.read(80, 200), expected[80:])


def test_ids_outside_the_vocabulary(write):
    folder, expected = write(400)
    array = opened(folder, vocab_size=int(expected.max()))
    worst = int(expected.argmax()) // CHUNK * CHUNK
    with pytest.raises(Unreadable, match="not in the vocabulary"):
        rows_of(array, [worst], 16)
    with pytest.raises(Unreadable, match="not in the vocabulary"):
        rows_of(array, [worst + 1], 15)
    rows_of(opened(folder, vocab_size=int(expected.max()) + 1), [worst], 16)


def test_other_arrays_are_not_read_here(write, monkeypatch):
    folder, _ = write(200)
    description = token_store._parse_json((folder / "zarr.json").read_bytes())
    sharding = description["codecs"][0]["configuration"]
    big = [{"name": "bytes", "configuration": {"endian": "big"}}, {"name": "crc32c"}]
    for changes in (
        {"data_type": "uint64"},
        {"shape": [200, 1]},
        {"codecs": []},
        {"codecs": description["codecs"] * 2},
        {"codecs": [{"name": "sharding_indexed", "configuration": sharding | {"codecs": big}}]},
        {"codecs": [{"name": "sharding_indexed", "configuration": sharding | {"index_location": "start"}}]},
        {"codecs": [{"name": "bytes", "configuration": {"endian": "little"}}]},
        {"chunk_key_encoding": {"name": "v2"}},
        {"storage_transformers": [{"name": "new"}]},
    ):  # fmt: skip
        assert LocalTokens.of(str(folder), description | changes, VOCAB_SIZE, ShardFiles()) is None
    assert LocalTokens.of(str(folder), {}, VOCAB_SIZE, ShardFiles()) is None
    monkeypatch.setattr(google_crc32c, "implementation", "python")
    assert LocalTokens.of(str(folder), description, VOCAB_SIZE, ShardFiles()) is None


# ---- open files ----


def num_open(folder):
    paths = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return sum(os.readlink(path).startswith(str(folder)) for path in paths if os.path.islink(path))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_no_more_files_are_open_than_allowed(write):
    folder, expected = write(2000)  # 25 files
    files = ShardFiles(max_open=3)
    array = opened(folder, files)
    for start in np.random.default_rng(0).permutation(1900).tolist():
        np.testing.assert_array_equal(array.read(start, start + 100), expected[start:][:100])
        assert num_open(folder) <= 3
    files.groups_asked_for = 10
    starts = np.random.default_rng(1).permutation(1900).tolist()
    found = rows_of(array, starts, 17)
    assert num_open(folder) <= 3
    np.testing.assert_array_equal(found, [expected[start : start + 17] for start in starts])
    del array, files
    gc.collect()
    assert num_open(folder) == 0


def test_a_file_in_use_stays_open(write):
    folder, _ = write(400)
    files = ShardFiles(max_open=1)
    array = opened(folder, files)
    array.read(0, 1)
    shard = files.open(array._layout, 0)
    array.read(399, 400)
    assert os.fstat(shard.fd).st_ino == os.stat(folder / "c/0").st_ino
    fd = shard.fd
    del shard
    with pytest.raises(OSError):
        os.fstat(fd)
    # Opened again, its index of several KB is not: it was right.
    flip(folder / "c/0", 5 * STRIDE + 3, 0)
    array.read(0, 1)


def test_the_limit_of_open_files_is_not_met(monkeypatch):
    for limit, expected in (
        (256, 32), (1024, 128), (1 << 20, 4096), (resource.RLIM_INFINITY, 4096),
    ):  # fmt: skip
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert ShardFiles().open.cache_info().maxsize == expected


def test_threads_share_few_files(write):
    """Every one drops the files of the others all the time."""
    folder, expected = write(2000)
    array = opened(folder, ShardFiles(max_open=1))

    def read(seed):
        starts = np.random.default_rng(seed).permutation(1960)[:300].tolist()
        np.testing.assert_array_equal(
            rows_of(array, starts, 33), [expected[start : start + 33] for start in starts]
        )
        for start in starts[:100]:
            np.testing.assert_array_equal(array.read(start, start + 40), expected[start:][:40])

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(24)))


def test_processes_that_fork_share_a_store(write):
    """In a process of its own: the threads of this one must not be forked."""
    folder, _ = write(2000)
    program = """
import json, multiprocessing, pathlib, sys
import numpy as np
from bloomjax.local_shards import LocalTokens, ShardFiles
folder = sys.argv[1]
description = json.loads(pathlib.Path(folder, "zarr.json").read_text())
array = LocalTokens.of(folder, description, 1000, ShardFiles())
whole = array.read(0, 2000)
def read(seed):
    starts = np.random.default_rng(seed).permutation(1960).tolist()
    rows = np.empty((len(starts), 40), np.uint32)
    array.read_into(starts, rows, range(len(starts)))
    return all((row == whole[start : start + 40]).all() for start, row in zip(starts, rows))
with multiprocessing.get_context("fork").Pool(4) as pool:
    print(pool.map(read, range(16)) == [True] * 16)
"""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(folder)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (result.stdout, result.stderr) == ("True\n", "")


# ---- asking ahead ----


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system has no such call")
def test_slow_files_are_asked_for_ahead(write, monkeypatch):
    folder, expected = write(800)
    files = ShardFiles()
    array = opened(folder, files)
    asked, waits = [], [0]
    real = os.posix_fadvise

    def advise(fd, offset, num_bytes, advice):
        asked.append((os.fstat(fd).st_ino, offset, num_bytes, advice))
        real(fd, offset, num_bytes, advice)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(local_shards, "_num_waits", lambda: waits[0])
    starts = list(range(0, 640, 32))
    rows_of(array, starts, 33)
    assert not asked  # nothing was waited for

    def waiting():
        waits[0] += 11  # more than half of 20
        return waits[0]

    monkeypatch.setattr(local_shards, "_num_waits", waiting)
    rows_of(array, starts, 33)
    assert not asked and files.groups_asked_for
    np.testing.assert_array_equal(
        rows_of(array, starts, 33), [expected[start : start + 33] for start in starts]
    )
    inodes = [os.stat(folder / "c" / str(number)).st_ino for number in range(10)]
    wanted = []
    for first in (start // CHUNK for start in starts):
        by_file = {}
        for chunk in range(first, first + 3):
            by_file.setdefault(chunk // 5, []).append(chunk % 5)
        wanted += [
            (inodes[number], inner[0] * STRIDE, len(inner) * STRIDE, os.POSIX_FADV_WILLNEED)
            for number, inner in by_file.items()
        ]
    assert asked == wanted
    files.groups_asked_for = 1
    rows_of(array, starts, 33)
    assert files.groups_asked_for == 0
    rows_of(array, starts[:7], 33)
    assert len(asked) == 2 * len(wanted)
    monkeypatch.delattr(os, "posix_fadvise")
    files.groups_asked_for = 1
    rows_of(array, starts, 33)


def test_waits_are_counted():
    reader, writer = os.pipe()
    before = local_shards._num_waits()
    timers = [threading.Timer(0.05 * n, os.write, (writer, b"x")) for n in (1, 2, 3)]
    for timer in timers:
        timer.start()
    for timer in timers:
        os.read(reader, 1)
        timer.join()
    os.close(reader)
    os.close(writer)
    assert local_shards._num_waits() >= before + 3


# ---- the rows of a run ----


def test_samples_are_located_as_by_the_mixture(tiny_text, monkeypatch):
    """Alone, within a block, over its ends, and in the last one."""
    monkeypatch.setattr(data_module, "_LOCATED_SAMPLES", 64)
    data = TrainData(store_dir=str(tiny_text.store_dir), sequence_length=16, seed=3).open()
    for samples in (
        np.arange(64), np.arange(10, 50), np.arange(64, 128), np.arange(100, 300), np.array([63]),
        np.array([70, 65, 120, 65]), np.array([5, 10**9, 6]), np.arange(MAX_SAMPLES - 64, MAX_SAMPLES),
        np.arange(MAX_SAMPLES - 1, MAX_SAMPLES), np.array([], np.int64),
    ):  # fmt: skip
        source, _, window = data.mixture.locate(samples)
        rows = data.rows(samples)
        assert rows.shape == (len(samples), 17) and rows.dtype == np.int32
        for row, s, w in zip(rows, source, window, strict=True):
            language = data.mixture.names[s]
            direct = tiny_text.store.read(language, "train", w * 16, w * 16 + 17)
            np.testing.assert_array_equal(row, direct)
    for wrong in ([MAX_SAMPLES], [-1], [3, -1], [MAX_SAMPLES - 1, MAX_SAMPLES]):
        with pytest.raises(BadInput, match="sample numbers must lie in"):
            data.rows(np.array(wrong))
    assert MAX_SAMPLES % (1 << 14) == 0
