"""Tasks over text files of your own: `register(folder)` makes the Mixture 'text_files'.

A folder holds one entry for each language; its name is the label (letters, digits, '_' and '-'):

    <language>.txt       a line of nothing but whitespace ends a document
    <language>.jsonl     each line is a JSON object, its field "text" is a document
    <language>.parquet   its column "text" is the documents
    <language>/          any number of such files, also below folders; of source code, where a file
                         is a document; and of folders that Hugging Face `datasets` saved to disk

.txt and .jsonl may be compressed (.gz, .zst); all kinds are in `documents`. Files are UTF-8. Lines
of a .txt end in LF or CRLF, and a document is its lines joined by LF, without a last one; all other
text is kept to the byte. A byte order mark at the beginning of a file is dropped. Files are read in
alphabetical order, those of a saved data set in its own.

The Tasks give raw text under the feature 'text'. There is no tokenizing preprocessor: TensorFlow's
SentencePiece segments some texts differently from the one everything else here uses.
"""

import dataclasses
import itertools
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bloomjax.errors import BadInput
from bloomjax.examples import FIELDS
from bloomjax.mixture_weights import check_weights, covering
from bloomjax.tasks.documents import TEXT_FIELD, OnBad, read_documents, text_suffix
from bloomjax.tasks.languages import CODE_EXTENSIONS

__all__ = [
    "MIXTURE",
    "TEXT_FIELD",
    "LanguageText",
    "add_mixture",
    "check_claims",
    "files_below",
    "find_languages",
    "read_documents",
    "register",
    "register_mixture",
    "register_tasks",
    "text_features",
]

MIXTURE = "text_files"

_DOCUMENTS_PER_BATCH = 256
_LABEL = re.compile(r"[A-Za-z0-9_-]+")
# Files about the text rather than of it.
_ABOUT = ("README", "LICENSE", "LICENCE", "NOTICE", "SOURCES")
_STATE, _DICT = "state.json", "dataset_dict.json"  # in folders that `datasets` saved
_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LanguageText:
    """The text of one language.

    Attributes:
      language: its label.
      files: where the text is, in the order it is read.
      text_field: field of JSON objects, column of tables.
    """

    language: str
    files: tuple[Path, ...]
    text_field: str = TEXT_FIELD

    def documents(self, on_bad: OnBad | None = None) -> Iterator[str]:
        """The documents of all files, blank ones (code files, JSON strings) included.

        `on_bad` is told of those that cannot be read, as in `documents.read_documents`.

        Raises:
          BadInput: a file is damaged, or there is no text at all.
        """
        has_text = False
        for path in self.files:
            for text in read_documents(path, self.text_field, on_bad):
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
        suffix = text_suffix(entry)
        if entry.is_dir():
            label, files = entry.name, files_below(entry)
            if not files:
                raise BadInput(
                    f"'{label}' has no text: no .txt, .jsonl, .parquet or code file in the folder "
                    f"{entry}"
                )
        elif suffix:
            label, files = entry.name.removesuffix(suffix), (entry,)
        else:
            _LOGGER.warning("%s is left out: neither .txt, .jsonl nor .parquet", entry)
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
        raise BadInput(
            f"{folder} has no text: no <language>.txt, <language>.jsonl, <language>.parquet or "
            f"<language>/"
        )
    return dict(sorted(languages.items()))


def files_below(folder: Path) -> tuple[Path, ...]:
    """All files of text in a folder and below it, in the order in which they are read.

    Raises:
      BadInput: a folder cannot be read, or a saved data set is not whole.
    """
    if (folder / _DICT).is_file():
        return files_below(folder / _train_split(folder))
    if (folder / _STATE).is_file():
        return _saved_files(folder)
    files: list[Path] = []
    for entry in _list(folder):
        if entry.is_dir():
            files += files_below(entry)
        elif text_suffix(entry) or entry.suffix in CODE_EXTENSIONS:
            files.append(entry)
        else:
            _LOGGER.warning("%s is left out: neither .txt, .jsonl, .parquet nor code", entry)
    return tuple(files)


def check_claims(languages: Mapping[str, tuple[Path, ...]]) -> None:
    """BadInput if two languages claim one file (or one does twice), also through links, with how many."""
    claims: dict[tuple[int, int], tuple[str, Path]] = {}
    twice: list[str] = []
    for language, files in languages.items():
        for path in files:
            try:
                status = os.stat(path)
            except OSError as error:
                raise BadInput(f"cannot read {path}: {error.strerror}") from None
            other, first = claims.setdefault((status.st_dev, status.st_ino), (language, path))
            if first is not path:
                who = f"'{other}' and '{language}'" if other != language else f"'{language}' twice"
                twice.append(f"{who}: {first} is {path}" if first != path else f"{who}: {path}")
    if twice:
        more = f" (and {len(twice) - 1} more files)" if len(twice) > 1 else ""
        raise BadInput(f"one file is claimed by {twice[0]}{more}")


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
    """`register_tasks` and `add_mixture` in one, with the name of the Mixture before those of the Tasks."""
    check_weights(covering(rates, languages, f"the Mixture '{mixture}'"), "rate")
    add_mixture(mixture, register_tasks(mixture, languages, text_field), rates)


def register_tasks(
    prefix: str, languages: Mapping[str, tuple[Path, ...]], text_field: str = TEXT_FIELD
) -> dict[str, str]:
    """Registers a seqio Task for each language, in place of earlier ones, and returns {name: language}.

    seqio allows no '-' in names: the Task of 'code-c' is '<prefix>.code_c'. Its source carries the
    attribute `language_text`, a LanguageText.

    Args:
      prefix: first part of the names.
      languages: the files of each language.
      text_field: field of JSON objects, column of tables.

    Raises:
      BadInput: two languages would have the same name, or claim one file.
    """
    tasks: dict[str, str] = {}
    for language in languages:
        name = f"{prefix}.{language.replace('-', '_')}"
        if name in tasks:
            raise BadInput(f"'{tasks[name]}' and '{language}' are too alike: both are {name}")
        tasks[name] = language
    check_claims(languages)

    import seqio

    features = text_features(*(FIELDS.split("+") if text_field == FIELDS else ()))
    for name, language in tasks.items():
        text = LanguageText(language, tuple(languages[language]), text_field)
        seqio.TaskRegistry.remove(name)
        seqio.TaskRegistry.add(name, source=_source(text), output_features=features)
    return tasks


def text_features(*names: str) -> dict[str, Any]:
    """seqio's output features of Tasks of raw text: strings of these names, without any one, 'text'."""
    import seqio
    import tensorflow as tf

    vocabulary = seqio.PassThroughVocabulary(size=0)
    feature = seqio.Feature(vocabulary, add_eos=False, dtype=tf.string, rank=0)
    return dict.fromkeys(names or ("text",), feature)


def add_mixture(mixture: str, tasks: Mapping[str, str], rates: Mapping[str, float]) -> None:
    """Registers a seqio Mixture, in place of an earlier one.

    The rates are for readers of the seqio Mixture. A training run takes its shares from `TrainData.weights` (by default
    the share of tokens each language has in the store), since seqio's rates count examples, not tokens.

    Args:
      mixture: its name.
      tasks: {name of the Task: language}.
      rates: the rate of each language, of which those that have a Task are taken.

    Raises:
      BadInput: a language has no rate, or a rate is not positive.
    """
    import seqio

    rates = covering(rates, list(tasks.values()), f"the Mixture '{mixture}'")
    check_weights(rates, "rate")
    seqio.MixtureRegistry.remove(mixture)
    seqio.MixtureRegistry.add(mixture, [(name, rates[tasks[name]]) for name in tasks])


def _source(text: LanguageText) -> Any:
    import seqio
    import tensorflow as tf

    def dataset_fn(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del split, shuffle_files, seed  # one split, in the order of the files
        names = FIELDS.split("+") if text.text_field == FIELDS else ["text"]
        return tf.data.Dataset.from_generator(
            lambda: _encoded_batches(text.documents(), names),
            output_signature=dict.fromkeys(names, tf.TensorSpec((None,), tf.string)),
        ).unbatch()

    source = seqio.FunctionDataSource(dataset_fn, splits=["train"])
    # For `prepare`, which records the files the text comes from.
    source.language_text = text  # pyright: ignore[reportAttributeAccessIssue]
    return source


def _encoded_batches(
    documents: Iterator[str], names: Sequence[str]
) -> Iterator[dict[str, list[bytes]]]:
    """Many documents at once: TensorFlow takes 150 microseconds for each call of a generator."""
    while batch := list(itertools.islice(documents, _DOCUMENTS_PER_BATCH)):
        if names == ["text"]:
            yield {"text": [document.encode() for document in batch]}
        else:
            yield {name: [getattr(example, name).encode() for example in batch] for name in names}


def _list(folder: Path) -> list[Path]:
    try:
        entries = sorted(folder.iterdir())
    except FileNotFoundError:
        raise BadInput(f"there is no folder {folder}") from None
    except OSError as error:
        raise BadInput(f"cannot read the folder {folder}: {error.strerror}") from None
    return [entry for entry in entries if not entry.name.startswith((".", *_ABOUT))]


def _train_split(folder: Path) -> str:
    """The split to read of a saved DatasetDict: 'train', or the only one."""
    splits = _read_json(folder / _DICT).get("splits")
    if not isinstance(splits, list) or not all(map(_is_name, splits)):
        raise BadInput(f"{folder / _DICT} is damaged: it has no list of splits")
    if "train" not in splits and len(splits) != 1:
        raise BadInput(f"{folder} has no split 'train'; it has: {', '.join(splits) or 'none'}")
    split = "train" if "train" in splits else splits[0]
    if len(splits) > 1:
        others = ", ".join(name for name in splits if name != split)
        _LOGGER.warning("%s: the splits %s are left out", folder, others)
    return split


def _saved_files(folder: Path) -> tuple[Path, ...]:
    """The files of a saved Dataset, in the order of its rows."""
    state = _read_json(folder / _STATE)
    if state.get("_indices_data_files"):
        raise BadInput(
            f"{folder} is a selection of rows that only `datasets` can read: "
            f"save it again after flatten_indices()"
        )
    entries = state.get("_data_files")
    names = [entry.get("filename") for entry in entries] if isinstance(entries, list) else []
    if not names or not all(map(_is_name, names)):
        raise BadInput(f"{folder / _STATE} is damaged: it has no list of data files")
    files = tuple(folder / name for name in names)
    if missing := [str(path) for path in files if not path.is_file()]:
        raise BadInput(
            f"{folder} is not whole: {len(missing)} of {len(files)} files are missing, "
            f"the first is {missing[0]}"
        )
    return files


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name


def _read_json(path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(path.read_bytes())
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise BadInput(f"{path} is damaged: it is no JSON object")
    return parsed
