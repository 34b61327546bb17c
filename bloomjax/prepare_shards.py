"""Shards: the unit of work of `prepare`, a piece of the text of one language, tokenised at once.

`plan` cuts the text into shards, `tokenise_shard` makes a file of tokens of one of them, and
`merge_language` writes the tokens of all shards of a language into a store. The files stand in one
folder, so any process that sees it can do any shard, in any order, alone or again: a process pool,
a Slurm array and an Apache Beam pipeline all call `tokenise_shard`. A file is there whole or not at
all, and says which text and which vocabulary it was made from. The store holds the same bytes
however the text was cut.

    <language>-<number>-of-<shards>.tokens
        uint32 tokens, uint64 document lengths in tokens, uint64 document lengths in bytes of UTF-8,
        a header in JSON, and 16 bytes: length and CRC-32 of the header, and "BLOOMTOK"
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import itertools
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from bloomjax import token_store, vocabulary
from bloomjax.errors import BadInput
from bloomjax.token_store import Documents, SourceFile
from bloomjax.vocabulary import Vocabulary

# Called with the documents, the tokens and the bytes of text since the last call.
Report = Callable[[int, int, int], None]

SHARD_BYTES = 64 << 20  # of source files; larger files are cut where that is possible
SUFFIX = ".tokens"
UNFINISHED = ".partial-"  # part of the names of files that no one reads
_VERSION = 1
_TRAILER = struct.Struct("<II8s")
_MAGIC = b"BLOOMTOK"
_DOCUMENTS_PER_BATCH = 256
_READ_BYTES = 1 << 20
_BAD_KEPT = 3  # of the reasons why documents could not be read
_TOKENS_PER_READ = 1 << 22
# The lines after which these files can be cut into parts that read as files; None: after every line.
_ENDS_OF_DOCUMENTS = {".txt": (b"\n", b"\r\n"), ".jsonl": None}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class Shard:
    """A piece of the text of one language.

    Attributes:
      language: label.
      number, num_shards: its place among the shards of the language, from 0.
      files: what it is read from, in reading order; empty if there are no files.
      text_field: field of the documents in files that have fields.
      part: of a large file, the bytes [start, stop) it is cut at, moved on to where a document ends.
      num_bytes: bytes of the files, or of the part.
      read: gives the documents in place of the files; it must be possible to pickle it.
      skip_bad: whether documents of files that cannot be read are left out and counted, not refused.
    """

    language: str
    number: int
    num_shards: int
    files: tuple[str, ...] = ()
    text_field: str = ""
    part: tuple[int, int] | None = None
    num_bytes: int = 0
    read: Callable[[], Iterator[str]] | None = None
    skip_bad: bool = False

    @property
    def name(self) -> str:
        """Such as 'en-00003-of-00012'."""
        return f"{self.language}-{self.number:05}-of-{self.num_shards:05}"


def plan(
    language: str,
    files: Sequence[str],
    text_field: str,
    shard_bytes: int = SHARD_BYTES,
    skip_bad: bool = False,
) -> list[Shard]:
    """The shards of a language that is read from `files`: groups of small files, parts of large ones.

    Depends on the names and sizes of the files alone. Raises BadInput if there is no such file.
    """
    pieces: list[dict[str, Any]] = []
    group: list[str] = []
    group_bytes = 0
    for path in files:
        num_bytes = _size(path)
        num_parts = -(-num_bytes // shard_bytes)
        if Path(path).suffix not in _ENDS_OF_DOCUMENTS:
            num_parts = 1
        if group and (group_bytes + num_bytes > shard_bytes or num_parts > 1):
            pieces.append({"files": tuple(group), "num_bytes": group_bytes})
            group, group_bytes = [], 0
        if num_parts > 1:
            cuts = [num_bytes * k // num_parts for k in range(num_parts + 1)]
            for part in itertools.pairwise(cuts):
                pieces.append({"files": (path,), "part": part, "num_bytes": part[1] - part[0]})
        else:
            group.append(path)
            group_bytes += num_bytes
    if group:
        pieces.append({"files": tuple(group), "num_bytes": group_bytes})
    return [
        Shard(language, number, len(pieces), text_field=text_field, skip_bad=skip_bad, **piece)
        for number, piece in enumerate(pieces)
    ]


# --- Tokenising ----------------------------------------------------------------------------------


def tokenise_shard(
    shard: Shard,
    report: Report | None = None,
    *,
    folder: str,
    vocabulary_path: str,
    fingerprint: str,
    threads: bool = False,
) -> bool:
    """Makes the file of a shard in `folder`, unless a finished one is there of the same text and vocabulary.

    Args:
      shard: what to tokenise.
      report: told from time to time how far it is.
      folder: of the files of all shards.
      vocabulary_path: a vocabulary file.
      fingerprint: of the vocabulary.
      threads: whether other cores may help.

    Returns:
      Whether the file was made now.

    Raises:
      BadInput: the text is damaged, it changes meanwhile, or the file cannot be written.
    """
    vocab = _open_vocabulary(vocabulary_path, fingerprint)
    path = Path(folder) / (shard.name + SUFFIX)
    identity = _identity(shard, fingerprint)
    finished = read_header(folder, shard)
    if (
        finished is not None
        and {key: finished.get(key) for key in identity} == identity
        and _data_crc32(path, finished) == finished["crc32"]
        and _inputs(shard, folder) == finished["inputs"]
    ):
        return False
    with _partial(path) as file:
        before = _state_of(shard)
        digest = _DocumentDigest()
        bad: list[str] = []
        with contextlib.closing(_documents(shard, folder, bad)) as documents:
            texts = documents if shard.files else digest.of(documents)
            header = _write_documents(file, texts, vocab, report, threads)
        inputs = _inputs(shard, folder) if shard.files else [digest.source(shard.language)]
        if _state_of(shard) != before:
            raise BadInput(f"the text of '{shard.language}' changed while it was read")
        header |= {"inputs": inputs, "num_bad_documents": len(bad), "bad": bad[:_BAD_KEPT]}
        data = json.dumps(identity | header, sort_keys=True).encode()
        file.write(data + _TRAILER.pack(len(data), zlib.crc32(data), _MAGIC))
    return True


def read_header(folder: str, shard: Shard) -> dict[str, Any] | None:
    """What the file of a shard says of itself; None if it is missing or not whole."""
    path = Path(folder) / (shard.name + SUFFIX)
    try:
        with open(path, "rb") as file:
            file.seek(-_TRAILER.size, os.SEEK_END)
            num_bytes, crc32, magic = _TRAILER.unpack(file.read())
            file.seek(-_TRAILER.size - num_bytes, os.SEEK_END)
            data_bytes = file.tell()
            data = file.read(num_bytes)
    except (OSError, ValueError):
        return None
    if magic != _MAGIC or zlib.crc32(data) != crc32:
        return None
    header = json.loads(data)
    expected = 4 * header["num_tokens"] + 16 * header["num_documents"]
    return header if data_bytes == expected else None


def is_finished(folder: str, shard: Shard, fingerprint: str) -> bool:
    """Whether the file of a shard is there, of this vocabulary and of files of these sizes.

    Hashes are not compared: that takes `tokenise_shard`, or `prepare` when the store is made.
    """
    header = read_header(folder, shard)
    identity = _identity(shard, fingerprint)
    if header is None or {key: header.get(key) for key in identity} != identity:
        return False
    then = [(source["path"], source["num_bytes"]) for source in header["inputs"]]
    if not shard.files or (shard.part and shard.part[0]):
        return True
    now = [(path, _size(path)) for path in shard.files]
    return then[: len(now)] == now


def _identity(shard: Shard, fingerprint: str) -> dict[str, Any]:
    """What the header of a shard must say besides the hashes of its text."""
    return {
        "version": _VERSION,
        "vocabulary": fingerprint,
        "language": shard.language,
        "shard": [shard.number, shard.num_shards],
        "part": list(shard.part) if shard.part else None,
        "text_field": shard.text_field,
        "skip_bad": shard.skip_bad,
    }


@functools.lru_cache(maxsize=1)
def _open_vocabulary(path: str, fingerprint: str) -> Vocabulary:
    vocab = vocabulary.open_vocabulary(path)
    if vocab.fingerprint != fingerprint:
        raise BadInput(f"the vocabulary {path} changed meanwhile")
    return vocab


def _write_documents(
    file: BinaryIO,
    documents: Iterator[str],
    vocab: Vocabulary,
    report: Report | None,
    threads: bool,
) -> dict[str, Any]:
    """Writes all but the header, and returns what it says of the documents."""
    lengths, num_bytes = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
    num_tokens = num_skipped = crc32 = 0
    while batch := list(itertools.islice(documents, _DOCUMENTS_PER_BATCH)):
        texts = [text for text in batch if not token_store.is_blank(text)]
        num_skipped += len(batch) - len(texts)
        piece = token_store.tokenise(texts, vocab, threads=threads)
        data = piece.tokens.astype("<u4", copy=False).tobytes()
        crc32 = zlib.crc32(data, crc32)
        file.write(data)
        num_tokens += len(piece.tokens)
        lengths.append(piece.lengths)
        num_bytes.append(piece.num_bytes)
        if report is not None:
            report(len(texts), len(piece.tokens), int(piece.num_bytes.sum()))
    for numbers in (np.concatenate(lengths), np.concatenate(num_bytes)):
        data = numbers.astype("<u8", copy=False).tobytes()
        crc32 = zlib.crc32(data, crc32)
        file.write(data)
    return {
        "num_documents": sum(map(len, lengths)),
        "num_tokens": num_tokens,
        "num_bytes": sum(int(each.sum()) for each in num_bytes),
        "num_skipped_documents": num_skipped,
        "crc32": crc32,
    }


@contextlib.contextmanager
def _partial(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path` that takes its name when the block ends well, else it is deleted."""
    beside = path.with_name(f"{path.name}{UNFINISHED}{os.uname().nodename}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            yield file
        os.replace(beside, path)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


# --- The text of a shard -------------------------------------------------------------------------


def _documents(
    shard: Shard, folder: str, bad: list[str] | None = None
) -> Generator[str, None, None]:
    """The documents; with `skip_bad`, why some of them cannot be read goes to `bad`."""
    if shard.read is not None:
        yield from shard.read()
        return
    # What is read here stands under a name of text_files' own kind, which the Tasks found.
    read_documents = importlib.import_module("bloomjax.tasks.text_files").read_documents
    reasons = [] if bad is None else bad
    if shard.skip_bad:
        read_documents = functools.partial(
            read_documents, on_bad=lambda error: reasons.append(str(error))
        )
    if shard.part is None:
        for path in shard.files:
            yield from read_documents(path, shard.text_field)
        return
    [path] = shard.files
    with _copy_of_part(path, shard.part, folder) as copy:
        try:
            yield from read_documents(copy, shard.text_field)
        except BadInput:
            # The same again in the file itself, for an error with its name and its line numbers.
            for _ in read_documents(path, shard.text_field):
                pass
            raise
        here = f"{path} (lines from byte {shard.part[0]} on)"
        reasons[:] = [reason.replace(copy, here) for reason in reasons]


@contextlib.contextmanager
def _copy_of_part(path: str, part: tuple[int, int], folder: str) -> Iterator[str]:
    """A part of a file under a name of the same ending, which is all that a reader goes by."""
    prefix = f"{Path(path).name}{UNFINISHED}"
    try:
        with tempfile.NamedTemporaryFile(
            dir=folder, prefix=prefix, suffix=Path(path).suffix
        ) as copy:
            for data in _read_part(path, part):
                copy.write(data)
            copy.flush()
            yield copy.name
    except OSError as error:
        raise BadInput(f"cannot write into {folder}: {error.strerror or error}") from None


def _read_part(path: str, part: tuple[int, int]) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            start, stop = (_next_document(file, cut, Path(path).suffix) for cut in part)
            file.seek(start)
            while start < stop and (data := file.read(min(_READ_BYTES, stop - start))):
                start += len(data)
                yield data
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None


def _next_document(file: BinaryIO, cut: int, suffix: str) -> int:
    """The first byte at `cut` or behind it where a part may begin: there a document does, on a line of its own."""
    if cut == 0:
        return 0
    file.seek(cut - 1)
    _read_line(file)  # what is left of it
    ends, line_before = _ENDS_OF_DOCUMENTS[suffix], b""
    while True:
        position = file.tell()
        line = _read_line(file)
        begins = ends is None or line_before in ends
        # A byte order mark is text here; at the beginning of a file it would be dropped.
        if not line or (begins and not line.startswith(_BYTE_ORDER_MARK)):
            return position
        line_before = line


def _read_line(file: BinaryIO) -> bytes:
    """The beginning of the next line; all of it is skipped, even if it is too long for the memory."""
    line = more = file.readline(_READ_BYTES)
    while len(more) == _READ_BYTES and not more.endswith(b"\n"):
        more = file.readline(_READ_BYTES)
    return line


def _inputs(shard: Shard, folder: str) -> list[dict[str, Any]]:
    """Size and SHA-256 of what a shard is read from; of a file in parts, the first has the whole of it too."""
    if not shard.files:
        digest = _DocumentDigest()
        with contextlib.closing(_documents(shard, folder)) as documents:
            for _ in digest.of(documents):
                pass
        return [digest.source(shard.language)]
    whole = shard.part is None or shard.part[0] == 0
    inputs = [SourceFile.of(path) for path in shard.files] if whole else []
    if shard.part is not None:
        digest, num_bytes = hashlib.sha256(), 0
        for data in _read_part(shard.files[0], shard.part):
            digest.update(data)
            num_bytes += len(data)
        inputs.append(SourceFile("", num_bytes, digest.hexdigest()))
    return [dataclasses.asdict(source) for source in inputs]


class _DocumentDigest:
    """In place of the hash of a file: that of the documents, of a Task that has no files."""

    def __init__(self) -> None:
        self._sha256, self._num_bytes = hashlib.sha256(), 0

    def of(self, documents: Iterator[str]) -> Iterator[str]:
        """Passes the documents on."""
        for text in documents:
            data = text.encode()
            self._sha256.update(len(data).to_bytes(8, "little") + data)
            self._num_bytes += len(data)
            yield text

    def source(self, language: str) -> dict[str, Any]:
        source = SourceFile(f"Task {language}", self._num_bytes, self._sha256.hexdigest())
        return dataclasses.asdict(source)


def source_of_task(language: str, documents: Generator[str, None, None]) -> SourceFile:
    """What stands in the manifest as the source of a language without files."""
    shard = Shard(language, 0, 1, read=lambda: documents)
    return SourceFile(**_inputs(shard, "")[0])


def _state_of(shard: Shard) -> list[tuple[int, int]]:
    """Changes when a file is written to."""
    try:
        states = [os.stat(path) for path in shard.files]
    except OSError as error:
        raise BadInput(f"cannot read {error.filename}: {error.strerror}") from None
    return [(state.st_size, state.st_mtime_ns) for state in states]


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None


# --- Merging -------------------------------------------------------------------------------------


class LanguageShards(NamedTuple):
    """All shards of a language, in order."""

    name: str
    shards: tuple[Shard, ...]


def merge_language(
    language: LanguageShards,
    report: Report | None = None,
    *,
    folder: str,
    root: str,
    holdout_fraction: float,
    pack_tokens: int | None = None,
) -> dict[str, Any]:
    """Writes the tokens of all shards of a language, which are finished, into a store.

    Args:
      language: its label and shards.
      report: as for `tokenise_shard`.
      folder: of the files of the shards.
      root: the folder of the store, from `token_store.build_store`.
      holdout_fraction: share of the documents, at the end, that become the validation split.
      pack_tokens: as for `token_store.write_tokens`.

    Returns:
      The entry of the language for `token_store.write_manifest`.

    Raises:
      BadInput: the file of a shard is damaged, or the store cannot be written.
    """
    shards = language.shards
    headers = [read_header(folder, shard) for shard in shards]
    if None in headers:
        raise BadInput(f"{shards[headers.index(None)].name} in {folder} is gone")
    found = [header for header in headers if header is not None]
    sources = [SourceFile(**each) for header in found for each in header["inputs"]]

    def pieces() -> Iterator[Documents]:
        for shard, header in zip(shards, found, strict=True):
            path = Path(folder) / (shard.name + SUFFIX)
            if _data_crc32(path, header) != header["crc32"]:
                raise BadInput(f"{path} is damaged; delete it and run the same command again")
            for piece in _read_documents(path, header):
                if report is not None:
                    report(len(piece.lengths), len(piece.tokens), int(piece.num_bytes.sum()))
                yield piece

    return token_store.write_tokens(
        root,
        language.name,
        pieces(),
        num_documents=sum(header["num_documents"] for header in found),
        num_skipped_documents=sum(header["num_skipped_documents"] for header in found),
        num_bad_documents=sum(header["num_bad_documents"] for header in found),
        holdout_fraction=holdout_fraction,
        sources=[source for source in sources if source.path],
        pack_tokens=pack_tokens,
    )


def _read_documents(path: Path, header: dict[str, Any]) -> Iterator[Documents]:
    """The documents of a finished shard, some at a time."""
    num_tokens, num_documents = header["num_tokens"], header["num_documents"]
    if num_documents == 0:
        return
    tokens = np.memmap(path, "<u4", "r", 0, (num_tokens,))
    numbers = np.memmap(path, "<u8", "r", 4 * num_tokens, (2, num_documents))
    ends = np.cumsum(numbers[0], dtype=np.int64)
    first = first_token = 0
    while first < num_documents:
        last = int(np.searchsorted(ends, first_token + _TOKENS_PER_READ, "right"))
        last = max(last, first + 1)  # a document longer than that comes alone
        end_token = int(ends[last - 1])
        yield Documents(
            np.array(tokens[first_token:end_token], np.uint32),
            np.array(numbers[0, first:last], np.uint64),
            np.array(numbers[1, first:last], np.uint64),
        )
        first, first_token = last, end_token


def _data_crc32(path: Path, header: dict[str, Any]) -> int:
    left = 4 * header["num_tokens"] + 16 * header["num_documents"]
    crc32 = 0
    try:
        with open(path, "rb") as file:
            while left and (data := file.read(min(left, _READ_BYTES))):
                crc32 = zlib.crc32(data, crc32)
                left -= len(data)
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None
    return crc32
