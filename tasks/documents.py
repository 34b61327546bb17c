"""One file to the documents in it, a bounded piece at a time. The ending of its name says what it is:

    .txt                          a line of nothing but whitespace ends a document
    .jsonl                        each line is a JSON object, one field of it is a document
    .txt.gz .txt.zst .jsonl.gz .jsonl.zst .json.gz .json.zst     the same, compressed
    .parquet                      one column is the documents
    .arrow                        the same; the files of `datasets.save_to_disk`
    anything else                 one document, as source code is

A document has at most MAX_DOCUMENT_BYTES bytes, a line of JSON too.
"""

import contextlib
import gzip
import io
import itertools
import json
import os
import types
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from bloomjax.errors import BadInput
from bloomjax.examples import FIELDS, Example

TEXT_FIELD = "text"
MAX_DOCUMENT_BYTES = 1 << 26

OnBad = Callable[[BadInput], None]

_PARAGRAPHS = (".txt", ".txt.gz", ".txt.zst")
# Compressed files called .json hold JSON lines (C4 is published so); plain ones are mostly about the text.
_JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
_PARQUET, _ARROW = ".parquet", ".arrow"
SUFFIXES = (*_PARAGRAPHS, *_JSON_LINES, _PARQUET, _ARROW)

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BUFFER_BYTES = 1 << 20
_ROWS_PER_BATCH = 256
_ARROW_FILE, _ARROW_END = b"ARROW1", b"\xff\xff\xff\xff\0\0\0\0"


def text_suffix(path: Path) -> str:
    """The part of SUFFIXES the name ends in, '' if none."""
    return max((end for end in SUFFIXES if path.name.endswith(end)), key=len, default="")


def read_documents(
    path: str | os.PathLike[str], text_field: str = TEXT_FIELD, on_bad: OnBad | None = None
) -> Iterator[str]:
    """The documents of one file in order, those without text included.

    Args:
      path: the file.
      text_field: field of JSON objects, or column of tables; `examples.FIELDS` for JSON objects that are Examples.
      on_bad: called with the BadInput of each document that cannot be read, which is left out; of a file that is cut
        short or damaged it is called once, and what can be read before the damage is kept. Without it they are raised.

    Raises:
      BadInput: unreadable, invalid UTF-8, too long, cut short, damaged, or without the field, with the place.
    """
    path = Path(path)
    suffix = text_suffix(path)
    report = _Report(on_bad)
    if text_field == FIELDS and suffix not in _JSON_LINES:
        raise BadInput(f"{path}: inputs and targets are read from JSON lines (.jsonl) only")
    try:
        if suffix in _PARAGRAPHS:
            yield from _read_paragraphs(path, report)
        elif suffix in _JSON_LINES:
            yield from _read_json_lines(path, text_field, report)
        elif suffix:
            yield from _read_table(path, text_field, report)
        else:
            yield from _read_whole(path, report)
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}") from None


class _Report:
    def __init__(self, on_bad: OnBad | None):
        self._on_bad = on_bad

    def __call__(self, message: str) -> None:
        error = BadInput(message)
        if self._on_bad is None:
            raise error from None
        self._on_bad(error)


# ---- lines ----


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    with open(path, "rb", buffering=_BUFFER_BYTES) as file:
        if path.suffix == ".gz":
            with gzip.open(file, "rb") as unpacked:
                yield cast(BinaryIO, unpacked)
        elif path.suffix == ".zst":
            stream = _pyarrow(path).CompressedInputStream(file, "zstd")
            with io.BufferedReader(stream, _BUFFER_BYTES) as unpacked:
                yield cast(BinaryIO, unpacked)
        else:
            yield file


def _read_lines(path: Path, report: _Report) -> Iterator[tuple[int, int, bytes | None]]:
    """Number from 1, byte offset (after unpacking) and bytes of each line, without the byte order mark.

    None in place of one that is too long or damaged.
    """
    offset, line = 0, b""
    compressed = path.suffix in (".gz", ".zst")
    with _open(path) as file:
        if compressed and os.path.getsize(path) == 0:
            report(f"{path} is cut short: it has no bytes at all")
            return
        for number in itertools.count(1):
            size = 0
            try:
                line = file.readline(MAX_DOCUMENT_BYTES + 1)
                size = len(line)
                while size > MAX_DOCUMENT_BYTES and line and not line.endswith(b"\n"):
                    line = file.readline(_BUFFER_BYTES)
                    size += len(line)
            except (EOFError, OSError, zlib.error) as error:
                if not compressed or getattr(error, "errno", None):
                    raise
                reason = " ".join(str(error).split())
                cut = isinstance(error, EOFError) or "Truncated" in reason
                how = "is cut short" if cut else "is damaged"
                report(f"{path} {how} after line {number - 1}: {reason}")
                yield number, offset, None  # what stands before it may be half a document
                return
            if not size:
                return
            if size > MAX_DOCUMENT_BYTES:
                report(f"{path} line {number} has {size:,} bytes; {_at_most()}")
                yield number, offset, None
            else:
                text = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
                yield number, offset + len(line) - len(text), text
            offset += size


def _read_paragraphs(path: Path, report: _Report) -> Iterator[str]:
    lines: list[str] = []
    first = num_bytes = 0
    bad = False  # something of this document could not be read
    for number, offset, data in _read_lines(path, report):
        text = None if data is None else _decode(data, path, number, offset, report)
        if text is None or data is None:
            bad = True
            continue
        line = text.removesuffix("\n").removesuffix("\r")
        if line and not line.isspace():
            if not lines:
                first, num_bytes = number, 0
            num_bytes += len(data)
            if not bad and num_bytes > MAX_DOCUMENT_BYTES:
                report(
                    f"{path}: the document that begins at line {first} is too long: "
                    f"{_at_most()} (a blank line ends a document)"
                )
                bad = True
            if bad:
                lines.clear()
            else:
                lines.append(line)
        else:
            if lines and not bad:
                yield "\n".join(lines)
            lines, bad = [], False
    if lines and not bad:
        yield "\n".join(lines)


def _read_json_lines(path: Path, text_field: str, report: _Report) -> Iterator[str]:
    for number, offset, data in _read_lines(path, report):
        line = None if data is None else _decode(data, path, number, offset, report)
        if line is None or not line or line.isspace():
            continue
        where = f"{path} line {number}"
        try:
            parsed = json.loads(line)
        except (ValueError, RecursionError):
            if line.endswith("\n"):
                report(f"{where} is not JSON")
            else:
                report(f"{where} is cut in the middle: the file ends inside it")
            continue
        if text_field == FIELDS:
            text = _example_of(parsed, where, report)
        else:
            text = _text_of(parsed, text_field, where, report)
        if text is not None:
            yield text


def _example_of(parsed: Any, where: str, report: _Report) -> Example | None:
    parts = []
    for name in FIELDS.split("+"):
        part = _text_of(parsed, name, where, report)
        if part is None:
            return None
        parts.append(part)
    if not parts[1] or parts[1].isspace():
        report(f"{where}: the field 'targets' is blank, so there is nothing to learn")
        return None
    return Example(*parts)


def _text_of(parsed: Any, text_field: str, where: str, report: _Report) -> str | None:
    if not isinstance(parsed, dict):
        report(f"{where} is not a JSON object")
        return None
    if text_field not in parsed:
        fields = ", ".join(sorted(parsed)) or "none"
        report(f"{where} has no text field '{text_field}'; it has: {fields}")
        return None
    text = parsed[text_field]
    if not isinstance(text, str):
        kinds = {type(None): "null", bool: "true or false", dict: "an object", list: "a list"}
        kind = kinds.get(type(text), "a number")
        report(f"{where}: the field '{text_field}' is {kind}, not text")
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        report(f"{where}: half of a surrogate pair, {half}, is no text")
        return None
    return text


def _read_whole(path: Path, report: _Report) -> Iterator[str]:
    with open(path, "rb") as file:
        data = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        report(f"{path} has {path.stat().st_size:,} bytes; {_at_most()}")
        return
    text = _decode(data.removeprefix(_BYTE_ORDER_MARK), path, 1, 0, report)
    if text is not None:
        yield text


def _decode(data: bytes, path: Path, first_line: int, offset: int, report: _Report) -> str | None:
    """UTF-8 to text; an error names the line and the byte offset in the file."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        report(f"{path} is not UTF-8: line {line}, byte offset {offset + error.start}")
        return None


def _at_most() -> str:
    return f"a document may have {MAX_DOCUMENT_BYTES:,} bytes"


# ---- tables ----


def _read_table(path: Path, text_field: str, report: _Report) -> Iterator[str]:
    pyarrow = _pyarrow(path)
    with open(path, "rb"):  # Python's errors are clearer
        pass
    open_table = _parquet_columns if path.suffix == _PARQUET else _arrow_columns
    row = 0
    try:
        with contextlib.closing(open_table(path, text_field, report)) as columns:
            for column in columns:
                yield from _column_texts(column, path, text_field, row, report)
                row += len(column)
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None):
            raise
        report(f"{path} is cut short or damaged after row {row}: {' '.join(str(error).split())}")


def _parquet_columns(path: Path, text_field: str, report: _Report) -> Generator[Any, None, None]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES) as file:
        if not _check_column(file.schema_arrow, path, text_field, report):
            return
        for batch in file.iter_batches(_ROWS_PER_BATCH, columns=[text_field], use_threads=False):
            yield batch.column(0)


def _arrow_columns(path: Path, text_field: str, report: _Report) -> Generator[Any, None, None]:
    import pyarrow
    import pyarrow.ipc

    with pyarrow.memory_map(str(path)) as file:
        is_file = file.size() >= len(_ARROW_FILE) and file.read(len(_ARROW_FILE)) == _ARROW_FILE
        file.seek(0)
        if is_file:
            reader = pyarrow.ipc.open_file(file)
            batches: Iterable[Any] = map(reader.get_batch, range(reader.num_record_batches))
        else:
            reader = pyarrow.ipc.open_stream(file)
            batches = iter(reader)
        if not _check_column(reader.schema, path, text_field, report):
            return
        for batch in batches:
            column = batch.column(text_field)
            for first in range(0, len(column), _ROWS_PER_BATCH):
                yield column.slice(first, _ROWS_PER_BATCH)
        # A stream cut between two batches reads like a whole one.
        if not is_file and path.stat().st_size:
            file.seek(max(0, file.size() - len(_ARROW_END)))
            if file.read() != _ARROW_END:
                raise pyarrow.ArrowInvalid("the stream has no end")


def _check_column(schema: Any, path: Path, text_field: str, report: _Report) -> bool:
    import pyarrow.types as types_of

    number = schema.get_field_index(text_field)
    if number < 0:
        times = schema.names.count(text_field)
        names = ", ".join(schema.names) or "none"
        have = f"{times} columns" if times else "no column"
        report(f"{path} has {have} '{text_field}'; it has: {names}")
        return False
    kind = schema.field(number).type
    value = kind.value_type if types_of.is_dictionary(kind) else kind
    is_text = (types_of.is_string, types_of.is_large_string, types_of.is_string_view)
    if not any(check(value) for check in is_text):
        report(f"{path}: the column '{text_field}' is {kind}, not text")
        return False
    return True


def _column_texts(
    column: Any, path: Path, text_field: str, first_row: int, report: _Report
) -> Iterator[str]:
    import pyarrow

    column = column.cast(pyarrow.large_string())
    for row, value in enumerate(column, first_row + 1):
        where = f"{path} row {row}"
        buffer = value.as_buffer()
        if buffer is None:
            report(f"{where}: the column '{text_field}' is null, not text")
        elif buffer.size > MAX_DOCUMENT_BYTES:
            report(f"{where} has {buffer.size:,} bytes; {_at_most()}")
        else:
            try:
                text = str(buffer, "utf-8")
            except UnicodeDecodeError as error:
                report(f"{where} is not UTF-8: byte {error.start} of its text")
                continue
            yield text


def _pyarrow(path: Path) -> types.ModuleType:
    try:
        import pyarrow
    except ModuleNotFoundError:
        raise BadInput(
            f"reading {path} needs pyarrow, of the extra `data`: pip install 'bloomjax[data]'"
        ) from None
    return pyarrow
