"""Text to token store: `python -m bloomjax.prepare --gin_file=tiny.gin`.

Reads every Task of a seqio Mixture, trains a vocabulary on the text if there is none yet, and
writes the token store that `train` reads. Nothing happens where the store is up to date; a store
made from something else is never touched.

TensorFlow and seqio are loaded here, in functions, and never by a training run.
"""

import contextlib
import dataclasses
import importlib
import inspect
import itertools
import os
import re
import sys
import tempfile
import time
import traceback
import types
import warnings
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from bloomjax import token_store, vocabulary
from bloomjax.errors import BadInput
from bloomjax.token_store import SourceFile, TokenStore
from bloomjax.vocabulary import Vocabulary

_EXTRA_MODULES = {"seqio", "tensorflow", "tensorflow_text", "tensorflow_datasets"}
_DOCUMENTS_PER_BATCH = 256
# A model may have more ids than its vocabulary, to divide evenly; BLOOM has 200 more.
_MAX_UNUSED_TOKENS = 1024
_SECONDS_BETWEEN_LINES = 30.0


def prepare(
    *,
    task_module: str,
    mixture_or_task_name: str,
    vocabulary_path: str,
    vocab_size: int,
    store_dir: str,
    text_dir: str | None = None,
    holdout_fraction: float = 0.05,
) -> None:
    """Makes the token store `store_dir` of a Mixture or Task.

    Args:
      task_module: module that registers it, such as 'bloomjax.tasks.demo'.
      mixture_or_task_name: its name; each Task is one language of the store.
      vocabulary_path: a SentencePiece .model or a tokenizer.json. Where there is none, it is
        trained on the text that is not held out: SentencePiece for a name that ends in .model,
        byte-level BPE as BLOOM's for one in .json.
      vocab_size: number of tokens of the vocabulary to train; one that exists may have up to
        1,023 fewer, for a model whose vocabulary was rounded up.
      store_dir: the store to make.
      text_dir: folder with the text, for task modules that have none of their own.
      holdout_fraction: share of the documents of each language, at the end, for validation.

    Raises:
      BadInput: the text, the vocabulary or an existing store cannot be used as asked.
    """
    start_seconds = time.monotonic()
    token_store.check_holdout_fraction(holdout_fraction)
    if text_dir is not None and _is_inside(store_dir, text_dir):
        raise BadInput(f"the store {store_dir} must lie outside the folder of the text {text_dir}")
    languages = find_languages(task_module, mixture_or_task_name, text_dir)
    if token_store.store_exists(store_dir):
        vocab = _open_vocabulary(vocabulary_path, vocab_size)
        store = TokenStore(store_dir)
        _check_up_to_date(store, languages, vocab, holdout_fraction)
        _say(f"{store_dir} is up to date, nothing to do: {_summary(store)}")
        return
    train_vocabulary = None
    if not os.path.exists(vocabulary_path):
        suffix = Path(vocabulary_path).suffix
        train_vocabulary = vocabulary.TRAINERS.get(suffix)
        if train_vocabulary is None:
            raise BadInput(
                f"there is no vocabulary {vocabulary_path}; to train one, give it a name that ends in "
                f".model (SentencePiece) or .json (byte-level BPE)"
            )
        vocabulary.check_new_vocabulary(Path(vocabulary_path), suffix, vocab_size)
    languages = count_documents(languages)
    if train_vocabulary is None:
        vocab = _open_vocabulary(vocabulary_path, vocab_size)
    else:
        _say(f"training a vocabulary of {vocab_size:,} tokens on {len(languages)} languages")
        texts = training_texts(languages, holdout_fraction)
        vocab = train_vocabulary(texts, vocabulary_path, vocab_size)
    _say(f"vocabulary {vocabulary_path}: {vocab.size:,} tokens")
    store = _write_store(store_dir, languages, vocab, holdout_fraction)
    seconds = time.monotonic() - start_seconds
    _say(f"{store_dir}: {_summary(store)}, {seconds:.1f} seconds")


def import_seqio() -> types.ModuleType:
    """seqio, with TensorFlow quiet and kept away from GPUs; BadInput where it is not installed."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        with _quiet_stderr(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import seqio
            import tensorflow as tf

            with contextlib.suppress(RuntimeError):  # TensorFlow has started already
                tf.config.set_visible_devices([], "GPU")
    except ModuleNotFoundError as error:
        raise _missing_extra(error) from None
    return seqio


@dataclasses.dataclass(frozen=True)
class Language:
    """A Task, seen as a language of the store. Numbers are 0 before `counted`."""

    label: str
    task: Any
    files: tuple[SourceFile, ...]
    num_documents: int = 0
    num_skipped_documents: int = 0

    @classmethod
    def of(cls, task: Any) -> "Language":
        """Reads the files of a Task of bloomjax.tasks; other Tasks have no files."""
        text = getattr(task.source, "language_text", None)
        if text is None:
            return cls(task.name.rsplit(".", 1)[-1], task, ())
        return cls(text.language, task, tuple(SourceFile.of(path) for path in text.files))

    def documents(self) -> Generator[str, None, None]:
        """The documents of the Task, in source order, read through seqio."""
        import tensorflow as tf

        split = "train" if "train" in self.task.splits else next(iter(self.task.splits))
        dataset = self.task.get_dataset(sequence_length=None, split=split, shuffle=False)
        dataset = dataset.map(lambda example: example["text"]).batch(_DOCUMENTS_PER_BATCH)
        # An iterator that is alive at exit, with Python code behind tf.data, makes the process hang.
        # It must be gone however this ends, also from the frames an exception holds.
        iterator = dataset.as_numpy_iterator()
        try:
            for batch in iterator:
                for text in batch.tolist():
                    yield text.decode()
        except tf.errors.OpError as error:
            bad_input = re.search(r"BadInput: (.*)", str(error))
            reason = bad_input.group(1) if bad_input else " ".join(str(error).split())
            traceback.clear_frames(error.__traceback__)
            raise BadInput(f"{self.task.name}: {reason}") from None
        except UnicodeDecodeError:
            raise BadInput(f"{self.task.name} has a document that is not UTF-8") from None
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)
            raise
        finally:
            del iterator, dataset

    def documents_of_files(self) -> Generator[str, None, None]:
        """The same documents, read without TensorFlow where they come from text files.

        Starting a tf.data pipeline takes a tenth of a second, and its errors are hard to read.
        """
        text = getattr(self.task.source, "language_text", None)
        return self.documents() if text is None else text.documents()

    def counted(self) -> "Language":
        """The same with the numbers of its documents; all of the text is read and checked."""
        num_documents = num_skipped = 0
        with contextlib.closing(self.documents_of_files()) as documents:
            for document in documents:
                if token_store.is_blank(document):
                    num_skipped += 1
                else:
                    num_documents += 1
        return dataclasses.replace(
            self, num_documents=num_documents, num_skipped_documents=num_skipped
        )


def find_languages(task_module: str, name: str, text_dir: str | None) -> list[Language]:
    """The Tasks of a Mixture, or the Task, called `name`; arguments as `prepare`.

    Raises:
      BadInput: there is no such module, Mixture or Task, or it has no text.
    """
    seqio = import_seqio()
    try:
        module = importlib.import_module(task_module)
    except ModuleNotFoundError as error:
        if error.name in _EXTRA_MODULES:
            raise _missing_extra(error) from None
        if error.name and (task_module + ".").startswith(error.name + "."):
            raise BadInput(f"there is no task module {task_module}") from None
        raise
    register = getattr(module, "register", None)
    if register is not None and "text_dir" in inspect.signature(register).parameters:
        if text_dir is None:
            raise BadInput(f"{task_module} needs the folder of your text: TEXT_DIR is not given")
        register(text_dir)
    elif text_dir is not None:
        raise BadInput(f"{task_module} has its own text and does not read TEXT_DIR {text_dir}")
    names = (*seqio.MixtureRegistry.names(), *seqio.TaskRegistry.names())
    if name not in names:
        there = ", ".join(sorted(names)[:20]) or "none"
        raise BadInput(f"{task_module} registers no Mixture or Task '{name}'; there are: {there}")
    tasks = seqio.get_subtasks(seqio.get_mixture_or_task(name))
    for task in tasks:
        if "text" not in task.output_features:
            features = ", ".join(task.output_features)
            raise BadInput(f"{task.name} has no feature 'text' of raw text; it has: {features}")
    return [Language.of(task) for task in tasks]


def count_documents(languages: Sequence[Language]) -> list[Language]:
    """The same with the numbers of their documents; all of the text is read and checked.

    Raises:
      BadInput: the text is damaged, or a language has fewer than 2 documents.
    """
    languages = [language.counted() for language in languages]
    few = [language for language in languages if language.num_documents < 2]
    if few:
        numbers = ", ".join(f"'{language.label}' has {language.num_documents}" for language in few)
        raise BadInput(
            f"each language needs 2 documents, one to train and one to validate; {numbers} "
            f"(in a .txt file a blank line ends a document)"
        )
    return languages


def training_texts(languages: Sequence[Language], holdout_fraction: float) -> Iterator[str]:
    """The documents with text that are not held out, of all languages, which are counted."""
    for language in languages:
        num_held_out = token_store.num_holdout_documents(language.num_documents, holdout_fraction)
        with contextlib.closing(language.documents_of_files()) as documents:
            texts = (text for text in documents if not token_store.is_blank(text))
            yield from itertools.islice(texts, language.num_documents - num_held_out)


def _write_store(
    store_dir: str, languages: Sequence[Language], vocab: Vocabulary, holdout_fraction: float
) -> TokenStore:
    for leftover in sorted(Path(store_dir).parent.glob(f"{Path(store_dir).name}.partial-*")):
        _say(f"{leftover} is of a run that was killed, or still works; nothing reads it")
    _say(f"writing {store_dir}: training + validation")
    width = max(len(language.label) for language in languages)
    entries = {}
    with token_store.build_store(store_dir) as root:
        for number, language in enumerate(languages, 1):
            place = f"{language.label:{width}}  {number:2}/{len(languages)}"
            with contextlib.closing(language.documents()) as documents:
                entries[language.label] = entry = token_store.write_language(
                    root,
                    language.label,
                    documents,
                    vocab,
                    num_documents=language.num_documents,
                    holdout_fraction=holdout_fraction,
                    sources=language.files,
                    progress=_Progress(place),
                )
            _say(f"{place}  {_numbers(entry)}")
        token_store.write_manifest(root, entries, vocab, holdout_fraction=holdout_fraction)
    return TokenStore(store_dir)


def _check_up_to_date(
    store: TokenStore, languages: Sequence[Language], vocab: Vocabulary, holdout_fraction: float
) -> None:
    """Raises BadInput that says in what an existing store differs from what is asked for."""
    differences = []
    if store.vocabulary_fingerprint != vocab.fingerprint:
        differences.append(
            f"the vocabulary ({store.vocabulary_fingerprint[:12]}, now {vocab.fingerprint[:12]})"
        )
    if store.manifest["holdout_fraction"] != holdout_fraction:
        differences.append(
            f"the held-out fraction ({store.manifest['holdout_fraction']}, now {holdout_fraction})"
        )
    asked = {language.label: language for language in languages}
    if gone := [label for label in store.languages if label not in asked]:
        differences.append(f"no longer there: {', '.join(gone)}")
    if new := [label for label in asked if label not in store.languages]:
        differences.append(f"new: {', '.join(new)}")
    changed = [
        label for label in store.languages if label in asked and not _same_text(store, asked[label])
    ]
    if changed:
        differences.append(f"the text of {', '.join(changed)}")
    if differences:
        raise BadInput(
            f"the store {store.path} was made from something else: {'; '.join(differences)}. "
            f"Delete it or choose another STORE_DIR"
        )


def _same_text(store: TokenStore, language: Language) -> bool:
    entry = store.manifest["languages"][language.label]
    if language.files:
        then = [(source["num_bytes"], source["sha256"]) for source in entry["sources"]]
        return then == [(file.num_bytes, file.sha256) for file in language.files]
    # A Task without files: the numbers of its documents are all there is to compare.
    now = language.counted()
    num_documents = sum(store.num_documents(now.label, split) for split in token_store.SPLITS)
    return (num_documents, entry["num_skipped_documents"]) == (
        now.num_documents,
        now.num_skipped_documents,
    )


def _open_vocabulary(path: str, vocab_size: int) -> Vocabulary:
    vocab = vocabulary.open_vocabulary(path)
    if not 0 <= vocab_size - vocab.size < _MAX_UNUSED_TOKENS:
        raise BadInput(f"the vocabulary {path} has {vocab.size} tokens, VOCAB_SIZE is {vocab_size}")
    return vocab


class _Progress:
    """Says from time to time how far a long language is."""

    def __init__(self, place: str):
        self._place = place
        self._last_seconds = time.monotonic()

    def __call__(self, num_documents: int, num_tokens: int) -> None:
        now_seconds = time.monotonic()
        if now_seconds - self._last_seconds >= _SECONDS_BETWEEN_LINES:
            self._last_seconds = now_seconds
            _say(f"{self._place}  {num_documents:,} documents, {num_tokens:,} tokens so far")


def _numbers(entry: dict[str, Any]) -> str:
    train, validation = (entry["splits"][split] for split in token_store.SPLITS)
    return (
        f"{train['num_documents']:9,} +{validation['num_documents']:7,} documents "
        f"{train['num_tokens']:13,} +{validation['num_tokens']:10,} tokens"
    )


def _summary(store: TokenStore) -> str:
    num_documents = sum(
        store.num_documents(name, split) for name in store.languages for split in token_store.SPLITS
    )
    num_train, num_validation = (
        sum(store.num_tokens(name, split) for name in store.languages)
        for split in token_store.SPLITS
    )
    return (
        f"{len(store.languages)} languages, {num_documents:,} documents, "
        f"{num_train:,} tokens to train and {num_validation:,} to validate"
    )


def _say(line: str) -> None:
    """A whole line at once: it reads the same on a terminal and in a log."""
    print(line, flush=True)


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Holds back what libraries write to file descriptor 2; an exception lets it out.

    TensorFlow 2.21 logs while it is loaded, whatever TF_CPP_MIN_LOG_LEVEL says.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held_back:
        os.dup2(held_back.fileno(), 2)
        try:
            yield
        except BaseException:
            held_back.seek(0)
            os.write(stderr, held_back.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)


def _missing_extra(error: ModuleNotFoundError) -> BadInput:
    return BadInput(
        f"preparing text needs the extra `data` ({error.name} is not installed): "
        f"pip install 'bloomjax[data]'"
    )


def _is_inside(path: str, folder: str) -> bool:
    return "://" not in path and Path(path).resolve().is_relative_to(Path(folder).resolve())


if __name__ == "__main__":
    from bloomjax import config

    config.run("prepare")
