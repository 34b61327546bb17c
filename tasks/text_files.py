"""Tasks over text files of your own: `register(folder)` makes the Mixture 'text_files'.

A folder holds one entry for each language; its name is the label (letters, digits, '_' and '-'):

    <language>.txt     a line of nothing but whitespace ends a document
    <language>.jsonl   each line is a JSON object, its field "text" is a document
    <language>/        any number of such files, and of source code: a code file is one document

Files are UTF-8. Lines of a .txt end in LF or CRLF, and a document is its lines joined by LF,
without a last one; JSON strings and code files are kept to the byte. A byte order mark at the
beginning of a file is dropped. Files are read in alphabetical order.

The Tasks give raw text under the feature 'text'. There is no tokenizing preprocessor: TensorFlow's
SentencePiece segments some texts differently from the one everything else here uses.
"""

import dataclasses
import itertools
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bloomjax.errors import BadInput
from bloomjax.tasks.languages import CODE_EXTENSIONS

MIXTURE = "text_files"
TEXT_FIELD = "text"

_DOCUMENTS_PER_BATCH = 256
_LABEL = re.compile(r"[A-Za-z0-9_-]+")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Files about the text rather than of it.
_ABOUT = ("README", "LICENSE", "LICENCE", "NOTICE", "SOURCES")
_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LanguageText:
    """The text of one language.

    Attributes:
      language: its label.
      files: where the text is, in the order it is read.
      text_field: field of the objects in .jsonl files.
    """

    language: str
    files: tuple[Path, ...]
    text_field: str = TEXT_FIELD

    def documents(self) -> Iterator[str]:
        """The documents of all files, blank ones (code files, JSON strings) included.

        Raises:
          BadInput: a file is damaged, or there is no text at all.
        """
        has_text = False
        for path in self.files:
            for text in read_documents(path, self.text_field):
                has_text = has_text or (text != "" and not text.isspace())
                yield text
        if not has_text:
            names = ", ".join(str(path) for path in self.files[:3])
            raise BadInput(f"'{self.language}' has no text: nothing but whitespace in {names}")


def find_languages(text_dir: str | os.PathLike[str]) -> dict[str, tuple[Path, ...]]:
    """The files of each language of a folder laid out as above, both in alphabetical order.

    Hidden files and README, LICENSE, NOTICE, SOURCES are left out; others that are no text are
    left out with a warning.

    Raises:
      BadInput: the folder is missing, unreadable or without text; a language is there twice or
        without files; a name is no label.
    """
    folder = Path(text_dir)
    languages: dict[str, tuple[Path, ...]] = {}
    entries: dict[str, Path] = {}
    for entry in _list(folder):
        if entry.is_dir():
            label, files = entry.name, _text_files_below(entry)
            if not files:
                raise BadInput(
                    f"'{label}' has no text: no .txt, .jsonl or code file in the folder {entry}"
                )
        elif entry.suffix in (".txt", ".jsonl"):
            label, files = entry.stem, (entry,)
        else:
            _LOGGER.warning("%s is left out: neither .txt nor .jsonl", entry)
            continue
        if not _LABEL.fullmatch(label):
            raise BadInput(
                f"{entry}: '{label}' is no language label; use letters, digits, '_' and '-'"
            )
        if label in entries:
            raise BadInput(
                f"'{label}' is there twice: {entries[label]} and {entry}; "
                f"put both files into a folder {folder / label}"
            )
        entries[label] = entry
        languages[label] = files
    if not languages:
        raise BadInput(f"{folder} has no text: no <language>.txt, <language>.jsonl or <language>/")
    return dict(sorted(languages.items()))


def read_documents(path: str | os.PathLike[str], text_field: str = TEXT_FIELD) -> Iterator[str]:
    """The documents of one file, by its ending: .txt, .jsonl, anything else is one document.

    Raises:
      BadInput: unreadable, invalid UTF-8, or a bad line of JSON, with the place.
    """
    path = Path(path)
    try:
        if path.suffix == ".txt":
            yield from _read_paragraphs(path)
        elif path.suffix == ".jsonl":
            yield from _read_json_lines(path, text_field)
        else:
            data = path.read_bytes().removeprefix(_BYTE_ORDER_MARK)
            yield _decode(data, path, 1, 0)
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None


def register(text_dir: str | os.PathLike[str], text_field: str = TEXT_FIELD) -> None:
    """Registers the Tasks 'text_files.<language>' and the Mixture 'text_files' of equal rates.

    Raises:
      BadInput: as `find_languages`.
    """
    languages = find_languages(text_dir)
    register_mixture(MIXTURE, languages, dict.fromkeys(languages, 1.0), text_field)


def register_mixture(
    mixture: str,
    languages: Mapping[str, tuple[Path, ...]],
    rates: Mapping[str, float],
    text_field: str = TEXT_FIELD,
) -> None:
    """Registers a seqio Task for each language and one Mixture, in place of earlier ones.

    The rates are for readers of the seqio Mixture. A training run takes its shares from `TrainData.weights` (by default
    the share of tokens each language has in the store), since seqio's rates count examples, not tokens.

    seqio allows no '-' in names: the Task of 'code-c' is '<mixture>.code_c'. Its source carries
    the attribute `language_text`, a LanguageText.

    Args:
      mixture: name of the Mixture and first part of the names of the Tasks.
      languages: the files of each language.
      rates: the rate of each language in the Mixture.
      text_field: field of the objects in .jsonl files.

    Raises:
      BadInput: two languages would have the same name.
    """
    import seqio
    import tensorflow as tf

    feature = seqio.Feature(
        seqio.PassThroughVocabulary(size=0), add_eos=False, dtype=tf.string, rank=0
    )
    tasks: dict[str, str] = {}
    for language in languages:
        name = f"{mixture}.{language.replace('-', '_')}"
        if name in tasks:
            raise BadInput(f"'{tasks[name]}' and '{language}' are too alike: both are {name}")
        tasks[name] = language
    for name, language in tasks.items():
        text = LanguageText(language, tuple(languages[language]), text_field)
        seqio.TaskRegistry.remove(name)
        seqio.TaskRegistry.add(name, source=_source(text), output_features={"text": feature})
    seqio.MixtureRegistry.remove(mixture)
    seqio.MixtureRegistry.add(mixture, [(name, rates[tasks[name]]) for name in tasks])


def _source(text: LanguageText) -> Any:
    import seqio
    import tensorflow as tf

    def dataset_fn(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del split, shuffle_files, seed  # one split, in the order of the files
        return tf.data.Dataset.from_generator(
            lambda: _encoded_batches(text.documents()),
            output_signature={"text": tf.TensorSpec((None,), tf.string)},
        ).unbatch()

    source = seqio.FunctionDataSource(dataset_fn, splits=["train"])
    # For `prepare`, which records the files the text comes from.
    source.language_text = text  # pyright: ignore[reportAttributeAccessIssue]
    return source


def _encoded_batches(documents: Iterator[str]) -> Iterator[dict[str, list[bytes]]]:
    """Many documents at once: TensorFlow takes 150 microseconds for each call of a generator."""
    while batch := list(itertools.islice(documents, _DOCUMENTS_PER_BATCH)):
        yield {"text": [document.encode() for document in batch]}


def _list(folder: Path) -> list[Path]:
    try:
        entries = sorted(folder.iterdir())
    except FileNotFoundError:
        raise BadInput(f"there is no folder {folder}") from None
    except OSError as error:
        raise BadInput(f"cannot read the folder {folder}: {error.strerror}") from None
    return [entry for entry in entries if not entry.name.startswith((".", *_ABOUT))]


def _text_files_below(folder: Path) -> tuple[Path, ...]:
    files: list[Path] = []
    for entry in _list(folder):
        if entry.is_dir():
            files += _text_files_below(entry)
        elif entry.suffix in (".txt", ".jsonl") or entry.suffix in CODE_EXTENSIONS:
            files.append(entry)
        else:
            _LOGGER.warning("%s is left out: neither .txt, .jsonl nor code", entry)
    return tuple(files)


def _read_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number from 1, byte offset and bytes of each line, without the byte order mark."""
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            text = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
            yield number, offset + len(line) - len(text), text
            offset += len(line)


def _read_paragraphs(path: Path) -> Iterator[str]:
    lines: list[str] = []
    for number, offset, data in _read_lines(path):
        line = _decode(data, path, number, offset).removesuffix("\n").removesuffix("\r")
        if line and not line.isspace():
            lines.append(line)
        elif lines:
            yield "\n".join(lines)
            lines = []
    if lines:
        yield "\n".join(lines)


def _read_json_lines(path: Path, text_field: str) -> Iterator[str]:
    for number, offset, data in _read_lines(path):
        line = _decode(data, path, number, offset)
        if line.isspace() or not line:
            continue
        where = f"{path} line {number}"
        try:
            parsed = json.loads(line)
        except (ValueError, RecursionError):
            if not line.endswith("\n"):
                raise BadInput(f"{where} is cut in the middle: the file ends inside it") from None
            raise BadInput(f"{where} is not JSON") from None
        if not isinstance(parsed, dict):
            raise BadInput(f"{where} is not a JSON object")
        text = parsed.get(text_field)
        if not isinstance(text, str):
            fields = ", ".join(sorted(parsed)) or "none"
            raise BadInput(f"{where} has no text field '{text_field}'; it has: {fields}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadInput(
                f"{where}: half of a surrogate pair, \\u{ord(text[error.start]):04x}, is no text"
            ) from None
        yield text


def _decode(data: bytes, path: Path, first_line: int, offset: int) -> str:
    """UTF-8 to text; an error names the line and the byte offset in the file."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise BadInput(
            f"{path} is not UTF-8: line {line}, byte offset {offset + error.start}"
        ) from None
