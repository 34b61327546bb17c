"""The store of tokens a run trains from: TensorStore zarr3 arrays, one set per language and split.

    <store>/manifest.json                         what is in it, with a checksum of itself
    <store>/<language>/<split>/tokens/            uint32 [num_tokens]
    <store>/<language>/<split>/document_ends/     uint64 [num_documents], first token after each

A document is its token ids and one `</s>`; documents lie end to end in source order. The last
documents of each language are the split 'validation', the others 'train' (BLOOM held out the last
5 % by document index). Every inner chunk and every shard index carries a crc32c, the manifest the
SHA-256 of each array description and of the tokens.

A store is a local folder or a URL that TensorStore has a driver for: file://, gs://, s3://. Tokens
in a local folder are read by local_shards.py, a tenth of the price.
It is immutable: `build_store` makes it under another name and renames it at the end.
"""

import array
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore

from bloomjax import kvstores
from bloomjax.errors import BadInput
from bloomjax.examples import Example
from bloomjax.local_shards import LocalTokens, ShardFiles, Unreadable
from bloomjax.vocabulary import BOS_ID, EOS_ID, PAD_ID, Vocabulary

TRAIN, VALIDATION = "train", "validation"
SPLITS = (TRAIN, VALIDATION)

_FORMAT = "bloomjax token store"
_VERSION = 1
_MANIFEST = "manifest.json"
_LABEL = re.compile(r"[A-Za-z0-9_-]+")
# Read and checked at once: 1,024 tokens, since the last token of a window needs the whole chunk it is in.
_CHUNK_BYTES = 1 << 12
_SHARD_BYTES = 1 << 26  # one file: 16,777,216 tokens
_MISSING = (1 << 32) - 1  # fill value: no vocabulary reaches it, so a hole cannot pass for text
_DOCUMENTS_PER_BATCH = 256
_WINDOWS_IN_FLIGHT = 256
_VERIFY_BLOCK_TOKENS = 1 << 20


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file that text was read from: its path, size and SHA-256 (hexadecimal)."""

    path: str
    num_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> "SourceFile":
        """Reads the file at `path` once; BadInput if it cannot be read."""
        try:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256")
                return cls(str(path), file.tell(), digest.hexdigest())
        except OSError as error:
            raise BadInput(f"cannot read {path}: {error.strerror}") from None


def num_holdout_documents(num_documents: int, holdout_fraction: float) -> int:
    """Number of documents at the end of a language that become its validation split, at least 1."""
    return min(max(1, round(num_documents * holdout_fraction)), num_documents - 1)


def check_holdout_fraction(holdout_fraction: float) -> None:
    """Raises BadInput unless 0 <= holdout_fraction < 1."""
    if not 0 <= holdout_fraction < 1:
        raise BadInput(f"the held-out fraction must be at least 0 and below 1: {holdout_fraction}")


class Documents(NamedTuple):
    """Tokenised documents, each with its `</s>`, end to end.

    Attributes:
      tokens: uint32 [num_tokens].
      lengths: tokens of each document, uint64 [num_documents].
      num_bytes: bytes of UTF-8 of each document, uint64 [num_documents].
    """

    tokens: np.ndarray
    lengths: np.ndarray
    num_bytes: np.ndarray


def tokenise(texts: Sequence[str], vocabulary: Vocabulary, *, threads: bool = True) -> Documents:
    """The documents `texts` as tokens; without `threads` nothing beyond the caller's core is used.

    An Example is its inputs, `<s>`, which no text has, and its targets.
    """
    parts = [
        part for text in texts
        for part in ((text.inputs, text.targets) if isinstance(text, Example) else (text,))
    ]  # fmt: skip
    encoded = iter(vocabulary.encode_batch(parts) if threads else map(vocabulary.encode, parts))
    ids = (
        [*next(encoded), BOS_ID, *next(encoded)] if isinstance(text, Example) else next(encoded)
        for text in texts
    )  # fmt: skip
    tokens = array.array("I")  # fills twice as fast as a numpy array does
    lengths = np.empty(len(texts), np.uint64)
    for number, document in enumerate(ids):
        tokens.fromlist(document)
        tokens.append(vocabulary.eos_id)
        lengths[number] = len(document) + 1
    num_bytes = np.array([len(text.encode()) for text in texts], np.uint64)
    return Documents(np.array(tokens, np.uint32), lengths, num_bytes)


# --- Writing -------------------------------------------------------------------------------------


@contextlib.contextmanager
def build_store(
    path: str | os.PathLike[str], *, partial: str | os.PathLike[str] | None = None
) -> Iterator[str]:
    """Gives a folder to write a store into; it becomes `path` when the block ends without an error.

    The block calls `write_language` or `write_tokens` for each language and `write_manifest` last.
    A local folder is built beside `path` and renamed; on object storage, where nothing can be
    renamed, the manifest makes the store.

    Args:
      path: the store to make.
      partial: the folder to build a local store in, on the same disk; what a killed process left
        there is deleted. By default a new one with a name of its own.

    Raises:
      BadInput: `path` exists already, or its parent cannot be written.
    """
    local = kvstores.local_path(path)
    if local is None:
        if kvstores.read_value(kvstores.kvstore(path), _MANIFEST, path) is not None:
            raise BadInput(f"{path} exists already and is not overwritten")
        yield str(path)
        return
    if local.exists() and not (local.is_dir() and not any(local.iterdir())):
        raise BadInput(f"{local} exists already and is not overwritten")
    try:
        local.parent.mkdir(parents=True, exist_ok=True)
        if partial is None:
            folder = Path(tempfile.mkdtemp(prefix=f"{local.name}.partial-", dir=local.parent))
            folder.chmod(0o755)
        else:
            folder = Path(partial)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
    except OSError as error:
        raise BadInput(f"cannot write beside {local}: {error.strerror}") from None
    try:
        yield str(folder)
        if not (folder / _MANIFEST).is_file():
            raise RuntimeError("write_manifest was not called")
        try:
            os.rename(folder, local)
        except OSError as error:
            raise BadInput(f"cannot name the store {local}: {error.strerror}") from None
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def write_language(
    root: str | os.PathLike[str],
    language: str,
    documents: Iterable[str],
    vocabulary: Vocabulary,
    *,
    num_documents: int | None = None,
    holdout_fraction: float = 0.05,
    sources: Sequence[SourceFile] = (),
    pack_tokens: int | None = None,
) -> dict[str, Any]:
    """Tokenises the documents of one language into its arrays below `root`.

    Documents of nothing but whitespace are skipped and counted.

    Args:
      root: the folder from `build_store`.
      language: label of letters, digits, '_' and '-'.
      documents: the text of each document, in source order.
      vocabulary: turns text into ids; `</s>` is added here.
      num_documents: number of documents with text; without it all of them are held in memory.
      holdout_fraction: share of the documents, at the end, that become the validation split.
      sources: the files the documents come from, for the manifest.
      pack_tokens: as for `write_tokens`.

    Returns:
      The entry of the language for `write_manifest`.

    Raises:
      BadInput: as `write_tokens`.
    """
    if num_documents is None:
        documents = list(documents)
        num_documents = sum(not is_blank(text) for text in documents)
    num_skipped = 0

    def pieces() -> Iterator[Documents]:
        nonlocal num_skipped
        for batch in _batched(documents, _DOCUMENTS_PER_BATCH):
            texts = [text for text in batch if not is_blank(text)]
            num_skipped += len(batch) - len(texts)
            yield tokenise(texts, vocabulary)

    entry = write_tokens(
        root, language, pieces(), num_documents=num_documents,
        holdout_fraction=holdout_fraction, sources=sources, pack_tokens=pack_tokens,
    )  # fmt: skip
    return entry | {"num_skipped_documents": num_skipped}


def write_tokens(
    root: str | os.PathLike[str],
    language: str,
    pieces: Iterable[Documents],
    *,
    num_documents: int,
    num_skipped_documents: int = 0,
    num_bad_documents: int = 0,
    holdout_fraction: float = 0.05,
    sources: Sequence[SourceFile] = (),
    pack_tokens: int | None = None,
) -> dict[str, Any]:
    """Writes the tokenised documents of one language into its arrays below `root`.

    Independent of every other language, so that languages can be written by different processes.
    How the documents are cut into pieces makes no difference to what is written.

    Args:
      root: the folder from `build_store`.
      language: label of letters, digits, '_' and '-'.
      pieces: the documents in source order.
      num_documents: number of documents in all pieces.
      num_skipped_documents, num_bad_documents: number of blank documents, and of those that could
        not be read, which are not among them; for the manifest.
      holdout_fraction: share of the documents, at the end, that become the validation split.
      sources: the files the documents come from, for the manifest.
      pack_tokens: fill up with `<pad>` so that no document crosses a multiple of it (see `_Packed`).

    Returns:
      The entry of the language for `write_manifest`.

    Raises:
      BadInput: bad label, fewer than 2 documents, another number of them than announced, or
        nothing can be written.
    """
    if not _LABEL.fullmatch(language):
        raise BadInput(f"'{language}' is no language label: use letters, digits, '_' and '-'")
    check_holdout_fraction(holdout_fraction)
    if num_documents < 2:
        raise BadInput(
            f"'{language}' has {num_documents} documents; it needs 2, to train and to validate"
        )
    num_train = num_documents - num_holdout_documents(num_documents, holdout_fraction)
    writer = _SplitWriter if pack_tokens is None else functools.partial(_Packed, pack_tokens)
    writers: dict[str, _SplitWriter] = {split: writer(root, language, split) for split in SPLITS}
    num_written = 0
    for tokens, lengths, num_bytes in pieces:
        num_to_train = min(max(num_train - num_written, 0), len(lengths))
        cut = int(lengths[:num_to_train].sum())
        writers[TRAIN].append(
            Documents(tokens[:cut], lengths[:num_to_train], num_bytes[:num_to_train])
        )
        writers[VALIDATION].append(
            Documents(tokens[cut:], lengths[num_to_train:], num_bytes[num_to_train:])
        )
        num_written += len(lengths)
    if num_written != num_documents:
        raise BadInput(
            f"'{language}' gave {num_written} documents, not the {num_documents} counted before: "
            f"its text changed meanwhile"
        )
    return {
        "num_skipped_documents": num_skipped_documents,
        "num_bad_documents": num_bad_documents,
        "sources": [dataclasses.asdict(source) for source in sources],
        "splits": {split: writer.close() for split, writer in writers.items()},
    } | ({"pack_tokens": pack_tokens} if pack_tokens else {})


def write_manifest(
    root: str | os.PathLike[str],
    languages: Mapping[str, Mapping[str, Any]],
    vocabulary: Vocabulary,
    *,
    holdout_fraction: float = 0.05,
) -> str:
    """Writes manifest.json, the last file of a store.

    Args:
      root: the folder from `build_store`.
      languages: what `write_language` returned, by language.
      vocabulary: the one that was used.
      holdout_fraction: the one that was used.

    Returns:
      The fingerprint of the store: SHA-256 of what is in it, whatever the paths.
    """
    manifest: dict[str, Any] = {
        "format": _FORMAT,
        "version": _VERSION,
        "holdout_fraction": holdout_fraction,
        "vocabulary": {"fingerprint": vocabulary.fingerprint, "size": vocabulary.size},
        "languages": {name: dict(entry) for name, entry in languages.items()},
    }
    manifest["fingerprint"] = _fingerprint(manifest)
    manifest["checksum"] = _sha256(_serialise(manifest))
    kvstores.write_value(root, _MANIFEST, _serialise(manifest))
    return manifest["fingerprint"]


def write_store(
    path: str | os.PathLike[str],
    documents: Mapping[str, Iterable[str]],
    vocabulary: Vocabulary,
    *,
    holdout_fraction: float = 0.05,
) -> "TokenStore":
    """Builds a whole store from documents in memory, `{language: documents}`, and opens it."""
    with build_store(path) as root:
        entries = {
            language: write_language(
                root, language, texts, vocabulary, holdout_fraction=holdout_fraction
            )
            for language, texts in documents.items()
        }
        write_manifest(root, entries, vocabulary, holdout_fraction=holdout_fraction)
    return TokenStore(path)


def is_blank(text: str) -> bool:
    """Whether a document has nothing but whitespace; such documents are skipped."""
    return not text or text.isspace()


class _SplitWriter:
    """Appends the documents of one split to its two arrays."""

    def __init__(self, root: str | os.PathLike[str], language: str, split: str):
        self._tokens = _ArrayWriter(root, _array_name(language, split, "tokens"), np.uint32)
        self._ends = _ArrayWriter(root, _array_name(language, split, "document_ends"), np.uint64)
        self._num_bytes = 0

    def append(self, documents: Documents) -> None:
        ends = np.cumsum(documents.lengths, dtype=np.uint64)
        self._ends.append(np.uint64(self._tokens.length) + ends)
        self._tokens.append(documents.tokens)
        self._num_bytes += int(documents.num_bytes.sum())

    def close(self) -> dict[str, Any]:
        tokens, ends = self._tokens.close(), self._ends.close()
        return {
            "num_documents": self._ends.length,
            "num_tokens": self._tokens.length,
            "num_bytes": self._num_bytes,
            "tokens": tokens,
            "document_ends": ends,
        }


class _Packed(_SplitWriter):
    """Examples in blocks of `pack_tokens`, none in two of them, for windows of as many tokens.

    `<pad>` before an example that would cross the end of a block fills it up. One that is longer than a block loses the
    beginning of its inputs, then the end of its targets. At the end stands an example of nothing but padding, up to the
    first token of a block: else the last window would lack the token that windows share.
    """

    def __init__(self, pack_tokens: int, *arguments: Any):
        super().__init__(*arguments)
        self._block, self._used, self._num_cut = pack_tokens, 0, 0

    def append(self, documents: Documents) -> None:
        if not len(documents.lengths):
            return
        pieces, lengths = [], []
        for example in np.split(documents.tokens, np.cumsum(documents.lengths)[:-1].astype(int)):
            if len(example) > self._block:
                example = self._cut(example)
            missing = self._block - self._used
            padding = missing if len(example) > missing else 0
            pieces += [np.full(padding, PAD_ID, np.uint32), example]
            lengths.append(padding + len(example))
            self._used = (self._used + lengths[-1]) % self._block
        sizes = np.array(lengths, np.uint64)
        super().append(Documents(np.concatenate(pieces), sizes, documents.num_bytes))

    def _cut(self, example: np.ndarray) -> np.ndarray:
        self._num_cut += 1
        num_inputs = int(np.argmax(example == BOS_ID))
        example = example[min(num_inputs, len(example) - self._block) :]
        return np.append(example[: self._block - 1], np.uint32(EOS_ID))

    def close(self) -> dict[str, Any]:
        tokens = np.full(-self._used % self._block + 1, PAD_ID, np.uint32)
        tokens[-1] = EOS_ID
        super().append(
            Documents(tokens, np.array([len(tokens)], np.uint64), np.zeros(1, np.uint64))
        )
        return super().close() | {"num_cut_documents": self._num_cut}


class _ArrayWriter:
    """Appends to a one-dimensional array, a whole shard file at a time."""

    def __init__(self, root: str | os.PathLike[str], name: str, dtype: type[np.unsignedinteger]):
        self.length = 0
        self._root, self._name = root, name
        self._dtype = np.dtype(dtype)
        self._chunk = _CHUNK_BYTES // self._dtype.itemsize
        self._shard = _SHARD_BYTES // self._dtype.itemsize
        self._pending: list[np.ndarray] = []
        self._num_pending = self._num_written = 0
        self._sha256 = hashlib.sha256()
        self._array: tensorstore.TensorStore | None = None

    def append(self, values: np.ndarray) -> None:
        self._pending.append(values)
        self._num_pending += len(values)
        self.length += len(values)
        if self._num_pending >= self._shard:
            pending = np.concatenate(self._pending)
            num_whole = len(pending) // self._shard * self._shard
            for start in range(0, num_whole, self._shard):
                self._write(pending[start : start + self._shard])
            self._pending = [pending[num_whole:]]
            self._num_pending = len(pending) - num_whole

    def close(self) -> dict[str, str]:
        """Writes the rest; returns the SHA-256 of the values and of the array's description."""
        if self._num_pending:
            self._write(np.concatenate(self._pending))
        description = kvstores.read_value(
            kvstores.kvstore(self._root), f"{self._name}/zarr.json", self._root
        )
        assert description is not None, "close() of an array without values"
        return {"sha256": self._sha256.hexdigest(), "zarr_sha256": _sha256(description)}

    def _write(self, values: np.ndarray) -> None:
        start, stop = self._num_written, self._num_written + len(values)
        self._sha256.update(values.astype(self._dtype.newbyteorder("<"), copy=False).tobytes())
        try:
            if self._array is None:
                self._array = self._create(stop)
            else:
                # Growing, never shrinking: chunks beyond the end would be read, and checked, by
                # nobody.
                self._array = self._array.resize(exclusive_max=[stop]).result()
            self._array[start:stop].write(values).result()
        except Exception as error:
            raise BadInput(
                f"cannot write {self._name} in {self._root}: {kvstores.reason(error)}"
            ) from None
        self._num_written = stop

    def _create(self, length: int) -> tensorstore.TensorStore:
        """Creates the array; one that fits into a single shard is not padded to a whole one."""
        chunk, shard = self._chunk, self._shard
        if length < shard:
            chunk = min(chunk, length)
            shard = -(-length // chunk) * chunk
        checked: list[dict[str, Any]] = [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "crc32c"},
        ]
        sharding = {"chunk_shape": [chunk], "codecs": checked, "index_codecs": checked}
        metadata = {
            "shape": [length],
            "data_type": self._dtype.name,
            "fill_value": _MISSING,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        }
        spec = {
            "driver": "zarr3",
            "kvstore": kvstores.kvstore(self._root, self._name),
            "metadata": metadata,
            "store_data_equal_to_fill_value": True,
        }
        return tensorstore.open(spec, create=True, context=kvstores.context_of(0)).result()


# --- Reading -------------------------------------------------------------------------------------


class TokenStore:
    """A finished store, open for reading. Thread safe.

    Opening reads the manifest and the description of every array; arrays are opened when read.

    Args:
      path: local folder, or a file://, gs:// or s3:// URL.
      cache_bytes: memory for chunks that TensorStore read, for all arrays together.

    Attributes:
      manifest: the parsed manifest.json.
      languages: labels in alphabetical order.
      fingerprint: SHA-256 of the content (hexadecimal).
      vocabulary_fingerprint, vocab_size: of the vocabulary that made it.

    Raises:
      BadInput: there is no store, its manifest is damaged, or an array is missing or differs.
    """

    def __init__(self, path: str | os.PathLike[str], *, cache_bytes: int = 64 << 20):
        self.path = str(path)
        self.manifest = _read_manifest(self.path)
        self.languages = tuple(sorted(self.manifest["languages"]))
        self.fingerprint: str = self.manifest["fingerprint"]
        self.vocabulary_fingerprint: str = self.manifest["vocabulary"]["fingerprint"]
        self.vocab_size: int = self.manifest["vocabulary"]["size"]
        self._context = kvstores.context_of(cache_bytes)
        self._descriptions = self._read_descriptions()
        self._arrays: dict[str, tensorstore.TensorStore] = {}
        self._local = self._local_tokens()

    def num_tokens(self, language: str, split: str) -> int:
        """Number of tokens, `</s>` included."""
        return self._split(language, split)["num_tokens"]

    def num_documents(self, language: str, split: str) -> int:
        """Number of documents."""
        return self._split(language, split)["num_documents"]

    def num_windows(self, language: str, split: str, sequence_length: int) -> int:
        """Number of windows of sequence_length + 1 tokens that overlap by one token."""
        return (self.num_tokens(language, split) - 1) // sequence_length

    def pack_tokens(self, language: str) -> int | None:
        """Of a language of Examples: no document crosses a multiple of it. None for one of text."""
        return self.manifest["languages"][language].get("pack_tokens")

    def read(self, language: str, split: str, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a split, uint32 [stop - start].

        Raises:
          BadInput: they are damaged or cannot be read.
          IndexError: the range is not inside the split.
        """
        num_tokens = self.num_tokens(language, split)
        if not 0 <= start <= stop <= num_tokens:
            raise IndexError(f"tokens {start} to {stop} of {num_tokens} of {language} {split}")
        tokens = None
        if (local := self._local.get((language, split))) is not None:
            with contextlib.suppress(Unreadable):  # then TensorStore says what is wrong
                tokens = local.read(start, stop)
        if tokens is None:
            future = self._array(language, split, "tokens")[start:stop].read()
            tokens = self._result(future, language, split, start, stop)
        self._check_ids(tokens, language, split, start)
        return tokens

    def read_windows(
        self, language: str, split: str, windows: np.ndarray, sequence_length: int
    ) -> np.ndarray:
        """Windows of a split: window w is the tokens [w*L, w*L + L], L = sequence_length.

        Args:
          language: label.
          split: 'train' or 'validation'.
          windows: int [n], each in [0, num_windows).
          sequence_length: L.

        Returns:
          int32 [n, L + 1].

        Raises:
          BadInput: a window is damaged or cannot be read.
          IndexError: a window is not inside the split.
        """
        rows = np.empty((len(windows), sequence_length + 1), np.int32)
        self.read_windows_into(rows, np.arange(len(windows)), language, split, windows)
        return rows

    def read_windows_into(
        self, rows: np.ndarray, at: np.ndarray, language: str, split: str, windows: np.ndarray
    ) -> None:
        """`read_windows` that fills row at[i] of `rows`, int32 [m, L + 1], with window windows[i]."""
        length = rows.shape[1]
        numbers, wanted = at.tolist(), windows.tolist()
        num_windows = self.num_windows(language, split, length - 1)
        if wanted and not 0 <= min(wanted) <= max(wanted) < num_windows:
            raise IndexError(
                f"{language} {split} has {num_windows} windows of {length - 1} tokens, "
                f"asked for {min(wanted)} to {max(wanted)}"
            )
        starts = [window * (length - 1) for window in wanted]
        tokens = rows.view(np.uint32)
        if (local := self._local.get((language, split))) is not None:
            with contextlib.suppress(Unreadable):  # then TensorStore says what is wrong
                local.read_into(starts, tokens, numbers)
                return
        self._read_with_tensorstore(tokens, numbers, language, split, starts)

    def _read_with_tensorstore(
        self, rows: np.ndarray, at: list[int], language: str, split: str, starts: list[int]
    ) -> None:
        array = self._array(language, split, "tokens")
        length = rows.shape[1]
        for first in range(0, len(starts), _WINDOWS_IN_FLIGHT):
            group = starts[first : first + _WINDOWS_IN_FLIGHT]
            futures = [array[start : start + length].read() for start in group]
            for i, (start, future) in enumerate(zip(group, futures, strict=True), first):
                window = self._result(future, language, split, start, start + length)
                self._check_ids(window, language, split, start)
                rows[at[i]] = window

    def read_document_ends(self, language: str, split: str) -> np.ndarray:
        """Number of the first token after each document, uint64 [num_documents], increasing."""
        future = self._array(language, split, "document_ends").read()
        return self._result(future, language, split, 0, self.num_tokens(language, split))

    def document_of(self, language: str, split: str, token: int) -> tuple[int, int]:
        """The document that token number `token` of a split belongs to.

        Reads some chunks of the index, however many documents there are.

        Returns:
          The number of the document in its split, from 0, and the number of its first token. In the
          order of the source, without blank documents, validation goes on where train ends.

        Raises:
          BadInput: the index is damaged or cannot be read.
          IndexError: there is no such token.
        """
        if not 0 <= token < self.num_tokens(language, split):
            raise IndexError(
                f"token {token} of {self.num_tokens(language, split)} of {language} {split}"
            )
        ends = self._array(language, split, "document_ends")

        def end_of(document: int) -> int:
            return int(self._result(ends[document].read(), language, split, token, token + 1))

        low, high = 0, self.num_documents(language, split) - 1
        while low < high:  # the first document that ends behind the token
            middle = (low + high) // 2
            low, high = (low, middle) if end_of(middle) > token else (middle + 1, high)
        return low, end_of(low - 1) if low else 0

    def verify(self) -> None:
        """Reads every byte of the store from the disk and checks it.

        Raises:
          BadInput: on the first damage, with the language, the split and the range of tokens.
        """
        fresh = TokenStore(self.path, cache_bytes=0)
        if fresh.manifest != self.manifest:
            raise BadInput(f"{self.path} was replaced by another store since it was opened")
        for language in fresh.languages:
            for split in SPLITS:
                fresh.verify_split(language, split)

    def verify_split(self, language: str, split: str) -> None:
        """`verify` of one split; what is in the cache is not read again, so open with cache_bytes=0."""
        expected = self._split(language, split)
        where = f"{self.path}: {language} {split}"
        digest = hashlib.sha256()
        eos_positions = []
        num_tokens = expected["num_tokens"]
        ends = self.read_document_ends(language, split)
        chunk = self._chunk_tokens(language, split)
        last_chunk = self.read(language, split, (num_tokens - 1) // chunk * chunk, num_tokens)
        eos_id = last_chunk[-1]
        for start in range(0, num_tokens, _VERIFY_BLOCK_TOKENS):
            stop = min(start + _VERIFY_BLOCK_TOKENS, num_tokens)
            tokens = self._read_block(language, split, start, stop)
            digest.update(tokens.astype("<u4", copy=False).tobytes())
            eos_positions.append(np.flatnonzero(tokens == eos_id) + start)
        if digest.hexdigest() != expected["tokens"]["sha256"]:
            raise BadInput(f"{where} tokens 0 to {num_tokens} are not the ones that were written")
        ends_digest = _sha256(ends.astype("<u8", copy=False).tobytes())
        if ends_digest != expected["document_ends"]["sha256"] or not np.array_equal(
            np.concatenate(eos_positions) + 1, ends
        ):
            raise BadInput(f"{where} document ends do not fit tokens 0 to {num_tokens}")

    def _read_block(self, language: str, split: str, start: int, stop: int) -> np.ndarray:
        """`read`, but an error names the damaged chunk rather than the whole block."""
        try:
            return self.read(language, split, start, stop)
        except BadInput:
            chunk = self._chunk_tokens(language, split)
            for chunk_start in range(start, stop, chunk):
                self.read(language, split, chunk_start, min(chunk_start + chunk, stop))
            raise

    def _chunk_tokens(self, language: str, split: str) -> int:
        """Of the array as it is: once it was 16,384."""
        codec = self._descriptions[_array_name(language, split, "tokens")]["codecs"][0]
        return codec["configuration"]["chunk_shape"][0]

    def _split(self, language: str, split: str) -> dict[str, Any]:
        if language not in self.manifest["languages"]:
            there = ", ".join(self.languages)
            raise BadInput(f"{self.path} has no language '{language}'; it has: {there}")
        if split not in SPLITS:
            raise BadInput(f"there is no split '{split}'; there are: {', '.join(SPLITS)}")
        return self.manifest["languages"][language]["splits"][split]

    def _array(self, language: str, split: str, kind: str) -> tensorstore.TensorStore:
        name = _array_name(language, split, kind)
        if name not in self._arrays:
            self._split(language, split)
            spec = {
                "driver": "zarr3",
                "kvstore": kvstores.kvstore(self.path, name),
                "metadata": self._descriptions[name],
                # By default a missing file reads as fill values, without an error.
                "fill_missing_data_reads": False,
                "recheck_cached_metadata": False,
                "recheck_cached_data": False,
            }
            self._arrays[name] = tensorstore.open(
                spec, read=True, open=True, assume_metadata=True, context=self._context
            ).result()
        return self._arrays[name]

    def _local_tokens(self) -> dict[tuple[str, str], LocalTokens]:
        """The arrays of tokens that need no TensorStore, by language and split."""
        root = kvstores.local_path(self.path)
        if root is None:
            return {}
        files, found = ShardFiles(), {}
        for language, split in itertools.product(self.languages, SPLITS):
            name = _array_name(language, split, "tokens")
            folder = os.path.join(os.path.abspath(root), name)
            array = LocalTokens.of(folder, self._descriptions[name], self.vocab_size, files)
            if array is not None:
                found[language, split] = array
        return found

    def _read_descriptions(self) -> dict[str, Any]:
        """The zarr.json of every array, checked against the manifest. All are read at once."""
        expected = {}
        for language, entry in self.manifest["languages"].items():
            for split in SPLITS:
                lengths = entry["splits"][split]
                for kind, count in (("tokens", "num_tokens"), ("document_ends", "num_documents")):
                    name = _array_name(language, split, kind)
                    expected[name] = (lengths[count], lengths[kind]["zarr_sha256"])
        kvstore = kvstores.open_kvstore(kvstores.kvstore(self.path), self.path)
        futures = {name: kvstore.read(f"{name}/zarr.json") for name in expected}
        descriptions = {}
        for name, (length, digest) in expected.items():
            data = kvstores.value_of(futures[name], f"{self.path}/{name}/zarr.json")
            if data is None:
                raise BadInput(f"{self.path} is not whole: the array {name} is missing")
            descriptions[name] = _parse_json(data)
            shape = descriptions[name].get("shape")
            if shape != [length]:
                raise BadInput(
                    f"{self.path} is damaged: the array {name} has the shape {shape}, "
                    f"the manifest says [{length}]"
                )
            if _sha256(data) != digest:
                raise BadInput(f"{self.path} is damaged: {name}/zarr.json is not as written")
        return descriptions

    def _check_ids(self, tokens: np.ndarray, language: str, split: str, start: int) -> None:
        if tokens.size and (largest := tokens.max()) >= self.vocab_size:
            raise BadInput(
                f"{self.path}: {language} {split} tokens {start} to {start + len(tokens)} are "
                f"damaged: id {largest} in a vocabulary of {self.vocab_size}"
            )

    def _result(self, future: Any, language: str, split: str, start: int, stop: int) -> np.ndarray:
        try:
            return future.result()
        except Exception as error:
            raise BadInput(
                f"{self.path}: {language} {split} tokens {start} to {stop} cannot be read: "
                f"{kvstores.reason(error)}"
            ) from None


# --- The manifest --------------------------------------------------------------------------------


def store_exists(path: str | os.PathLike[str]) -> bool:
    """Whether there is a finished store at `path` (its manifest may still be damaged)."""
    local = kvstores.local_path(path)
    if local is not None and not local.is_dir():
        return False
    return kvstores.read_value(kvstores.kvstore(path), _MANIFEST, path) is not None


def _read_manifest(path: str) -> dict[str, Any]:
    local = kvstores.local_path(path)
    if local is not None and not local.is_dir():
        raise BadInput(f"there is no token store {path}; make it with python -m bloomjax.prepare")
    data = kvstores.read_value(kvstores.kvstore(path), _MANIFEST, path)
    if data is None:
        raise BadInput(
            f"{path} is no token store: it has no {_MANIFEST}; make one with "
            f"python -m bloomjax.prepare"
        )
    manifest = _parse_json(data)
    if manifest.get("format") == _FORMAT and manifest.get("version") != _VERSION:
        raise BadInput(
            f"{path} is a token store of version {manifest.get('version')}; "
            f"this program reads version {_VERSION}"
        )
    claimed = {key: value for key, value in manifest.items() if key != "checksum"}
    # Written back, it must be the same bytes: then nothing in the file escapes the checksum.
    if (
        manifest.get("format") != _FORMAT
        or manifest.get("checksum") != _sha256(_serialise(claimed))
        or _serialise(manifest) != data
    ):
        raise BadInput(f"{path}/{_MANIFEST} is damaged: it does not match its own checksum")
    return manifest


def _fingerprint(manifest: Mapping[str, Any]) -> str:
    content = json.loads(json.dumps(manifest))
    for entry in content["languages"].values():
        for source in entry["sources"]:
            del source["path"]
    return _sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def _serialise(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True, indent=1).encode() + b"\n"


def _parse_json(data: bytes) -> dict[str, Any]:
    """The object in `data`; an empty one if it is damaged."""
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _batched(items: Iterable[str], size: int) -> Iterator[tuple[str, ...]]:
    iterator = iter(items)
    while batch := tuple(itertools.islice(iterator, size)):
        yield batch


def _array_name(language: str, split: str, kind: str) -> str:
    return f"{language}/{split}/{kind}"
