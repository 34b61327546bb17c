"""Tokens out of the shard files of a store on a local disk, without TensorStore, whose reads cost 40 microseconds each.

A file holds inner chunks of equal size in order, each followed by its crc32c, then one (offset, number of bytes) a
chunk, and the crc32c of that index (zarr3's sharding_indexed codec). No token is given away before the checksum of its
chunk was computed from this very copy of it: nothing is remembered of earlier reads, but that an index was right.

What is not as it should be is `Unreadable`. TensorStore then reads the same range, and says what is wrong.
Files are read, not mapped: one cut short, or a disk that fails, is an error instead of a signal, and there is no limit
of mappings to meet. Safe for threads, and for processes that fork: nothing has a position.
"""

import contextlib
import dataclasses
import functools
import os
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import google_crc32c
import numpy as np

# What crc32c gives for any bytes followed by their own crc32c, little-endian.
_CRC_OF_CHECKED = 0x48674BC7
_WORD_BYTES, _CRC_BYTES, _ENTRY_BYTES = 4, 4, 16
_CHECKED = [
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "crc32c"},
]
_BLOCK_CHUNKS = 512  # read at once
_MAX_BUFFERS = 1000  # of one read; the systems allow 1,024
_WINDOWS_AHEAD = 32  # a group
_MIN_WINDOWS_MEASURED, _GROUPS_ASKED_FOR = 8, 1024
_crc32c = google_crc32c.value


class Unreadable(Exception):
    """These tokens cannot be had here: a file is missing, cut short, damaged or laid out in another way."""


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unreadable(error.strerror) from None


@dataclasses.dataclass(frozen=True, eq=False)
class _Layout:
    """Where the chunks of an array lie; `in_order` are the numbers of the shards whose index was checked."""

    folder: str
    num_tokens: int
    chunk_tokens: int
    chunks_per_shard: int
    in_order: set[int] = dataclasses.field(default_factory=set)

    @property
    def stride_bytes(self) -> int:
        return self.chunk_tokens * _WORD_BYTES + _CRC_BYTES


class _Shard:
    """A shard file, open until nobody refers to it any more.

    So a thread can go on reading a file that another one has dropped from the open ones: were it closed, its number
    could come to mean another file, whose checksums are right, too.
    """

    fd = -1

    def __init__(self, layout: _Layout, number: int):
        with _os_errors():
            self.fd = os.open(f"{layout.folder}/c/{number}", os.O_RDONLY | os.O_CLOEXEC)
            if number not in layout.in_order:
                self._check_index(layout, number)
                layout.in_order.add(number)

    def _check_index(self, layout: _Layout, number: int) -> None:
        num_bytes = layout.chunks_per_shard * _ENTRY_BYTES + _CRC_BYTES
        position = os.fstat(self.fd).st_size - num_bytes
        data = os.pread(self.fd, num_bytes, position) if position >= 0 else b""
        if len(data) != num_bytes or _crc32c(data) != _CRC_OF_CHECKED:
            raise Unreadable("the index is damaged")
        stride = layout.stride_bytes
        num_chunks = -(-layout.num_tokens // layout.chunk_tokens)
        num_here = min(num_chunks - number * layout.chunks_per_shard, layout.chunks_per_shard)
        entries = np.frombuffer(data[:-_CRC_BYTES], "<u8").reshape(-1, 2)[:num_here]
        if (entries[:, 0] != np.arange(num_here) * stride).any() or (entries[:, 1] != stride).any():
            raise Unreadable("the chunks are not in order")

    def __del__(self, close=os.close):  # at the end of the program `os` may be gone
        if self.fd >= 0:
            close(self.fd)


class ShardFiles:
    """The files of a store, of which those used last are open.

    Attributes:
      open: layout and number -> shard.
      groups_asked_for: how many more groups of windows are asked of the kernel ahead, because others were waited for.
    """

    def __init__(self, max_open: int | None = None):
        """Keeps `max_open` open, by default an eighth of what the process may have open."""
        if max_open is None:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            max_open = min(limit, 1 << 15) // 8 if limit != resource.RLIM_INFINITY else 1 << 12
        self.open = functools.lru_cache(max_open)(_Shard)
        self.groups_asked_for = 0


def _num_waits() -> int:
    """How often this thread has given up its core, to wait for a disk say; being pushed off it does not count."""
    thread = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)  # the latter on macOS
    return resource.getrusage(thread).ru_nvcsw


class LocalTokens:
    """Reads a one-dimensional uint32 array that `token_store` wrote."""

    def __init__(self, layout: _Layout, vocab_size: int, files: ShardFiles):
        self._layout = layout
        self._vocab_size = vocab_size
        self._files = files

    @classmethod
    def of(
        cls, folder: str, description: Mapping[str, Any], vocab_size: int, files: ShardFiles
    ) -> "LocalTokens | None":
        """The array in `folder`, whose zarr.json is `description`; None for a kind that is not read here."""
        try:
            (num_tokens,), (codec,) = description["shape"], description["codecs"]
            (shard,) = description["chunk_grid"]["configuration"]["chunk_shape"]
            (chunk,) = codec["configuration"]["chunk_shape"]
        except (KeyError, TypeError, ValueError):
            return None
        sharding = {"chunk_shape": [chunk], "codecs": _CHECKED, "index_codecs": _CHECKED}
        expected = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [num_tokens],
            "data_type": "uint32",
            "fill_value": description.get("fill_value"),
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard]}},
            "chunk_key_encoding": {"name": "default"},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        }
        # Without its C extension google_crc32c is slower than TensorStore by far.
        if description != expected or google_crc32c.implementation != "c":
            return None
        return cls(_Layout(folder, num_tokens, chunk, shard // chunk), vocab_size, files)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the array, uint32 [stop - start]; Unreadable if that fails. Ids are not looked at."""
        tokens = np.empty(stop - start, np.uint32)
        block = _BLOCK_CHUNKS * self._layout.chunk_tokens
        scratch = self._scratch(min(block, stop - start))
        with _os_errors():
            for first in range(start, stop, block):
                self._copy(first, tokens[first - start :][:block], scratch)
        return tokens

    def read_into(self, starts: Sequence[int], rows: np.ndarray, at: Sequence[int]) -> None:
        """Fills row at[i] of `rows` with the tokens from starts[i] on.

        Args:
          starts: first token of each row.
          rows: uint32 [n, length].
          at: numbers of rows, as many as starts.

        Raises:
          Unreadable: a row cannot be read, or holds an id that is not in the vocabulary.
        """
        fill, files = self._filler(rows), self._files
        for first in range(0, len(starts), _WINDOWS_AHEAD):
            group = starts[first : first + _WINDOWS_AHEAD]
            numbers = at[first : first + _WINDOWS_AHEAD]
            try:
                if files.groups_asked_for > 0 and len(group) > 1:
                    files.groups_asked_for -= 1
                    held_open = [self._ask_for(start, rows.shape[1]) for start in group]
                    fill(group, numbers)
                    del held_open
                elif len(group) < _MIN_WINDOWS_MEASURED:
                    fill(group, numbers)
                else:
                    num_waits = _num_waits()
                    fill(group, numbers)
                    # Else a disk, or what is behind a network, is waited for once a window.
                    if _num_waits() - num_waits > len(group) // 2:
                        files.groups_asked_for = _GROUPS_ASKED_FOR
            except OSError as error:
                raise Unreadable(error.strerror) from None

    def _ask_for(self, start: int, length: int) -> list[_Shard]:
        """Makes the kernel read these tokens ahead, where it can."""
        stride, shards = self._layout.stride_bytes, []
        for number, inner, num in self._runs(start, start + length):
            shards.append(self._files.open(self._layout, number))
            if hasattr(os, "posix_fadvise"):  # not on macOS
                what = os.POSIX_FADV_WILLNEED
                os.posix_fadvise(shards[-1].fd, inner * stride, num * stride, what)
        return shards

    def _filler(self, rows: np.ndarray) -> Callable[[Sequence[int], Sequence[int]], None]:
        """`read_into` of a group, (starts, at). Much of what a window costs is Python, so there is little of it."""
        layout, vocab_size, open_shard = self._layout, self._vocab_size, self._files.open
        chunk, per_shard, stride = layout.chunk_tokens, layout.chunks_per_shard, layout.stride_bytes
        length = rows.shape[1]
        scratch = self._scratch(length)
        # A window that begins with a chunk is read straight into its row, but for the checksums and for the rest, of
        # which the whole chunk is read.
        num_whole, num_rest = divmod(length, chunk)
        cut, num_bytes = num_whole * chunk, (num_whole + 1) * stride
        is_direct = num_rest > 0 and 2 * num_whole < _MAX_BUFFERS
        last_inner = per_shard - num_whole - 1 if is_direct else -1  # where it ends with its file
        whole = rows[:, :cut].reshape(len(rows), num_whole, chunk)
        sums, last = np.empty(num_whole, "<u4"), np.empty(chunk + 1, "<u4")
        rest = last[:num_rest]
        buffers = [last, *(part for k in range(num_whole) for part in (sums[k : k + 1], last))]
        places = [(k, 2 * k) for k in range(num_whole)]

        def fill(starts: Sequence[int], at: Sequence[int]) -> None:
            for start, number in zip(starts, at, strict=True):
                which, inner = divmod(start // chunk, per_shard)
                row = rows[number]
                if inner <= last_inner and start % chunk == 0:
                    for k, place in places:
                        buffers[place] = whole[number, k]
                    shard = open_shard(layout, which)
                    if os.preadv(shard.fd, buffers, inner * stride) != num_bytes:
                        raise Unreadable("a file is cut short")
                    expected = sums.tolist()
                    for k, place in places:
                        if _crc32c(buffers[place]) != expected[k]:
                            raise Unreadable("a checksum is wrong")
                    if _crc32c(last) != _CRC_OF_CHECKED:
                        raise Unreadable("a checksum is wrong")
                    row[cut:] = rest
                else:
                    self._copy(start, row, scratch)
                # argmax takes a third of the time of max.
                if row[row.argmax()] >= vocab_size:
                    raise Unreadable("an id is not in the vocabulary")

        return fill

    def _scratch(self, num_tokens: int) -> np.ndarray:
        """Room for the chunks that a range of so many tokens can touch, each with its crc32c."""
        chunk = self._layout.chunk_tokens
        return np.empty(((num_tokens + chunk - 2) // chunk + 1, chunk + 1), "<u4")

    def _copy(self, start: int, tokens: np.ndarray, scratch: np.ndarray) -> None:
        """Fills `tokens` from number `start` on, by way of `scratch`."""
        chunk, num_tokens = self._layout.chunk_tokens, len(tokens)
        stride = self._layout.stride_bytes
        done, skip = 0, start % chunk
        for number, inner, num in self._runs(start, start + num_tokens):
            shard = self._files.open(self._layout, number)
            if os.preadv(shard.fd, [scratch[:num].data], inner * stride) != num * stride:
                raise Unreadable("a file is cut short")
            for words in scratch[:num]:
                if _crc32c(words) != _CRC_OF_CHECKED:
                    raise Unreadable("a checksum is wrong")
                part = words[skip : min(chunk, skip + num_tokens - done)]
                tokens[done : done + len(part)] = part
                done += len(part)
                skip = 0

    def _runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard, first chunk in it, number of chunks) of each file that a range touches."""
        layout = self._layout
        first, end = start // layout.chunk_tokens, -(-stop // layout.chunk_tokens)
        while first < end:
            number, inner = divmod(first, layout.chunks_per_shard)
            num = min(end - first, layout.chunks_per_shard - inner)
            yield number, inner, num
            first += num
