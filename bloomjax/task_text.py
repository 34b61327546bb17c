"""The text of seqio Tasks, language by language: what `prepare` and the vocabulary tools read.

TensorFlow and seqio are loaded here, in functions, and never by a training run. Text that lies in
files is read without them.
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
import traceback
import types
import warnings
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from bloomjax import token_store
from bloomjax.errors import BadInput
from bloomjax.examples import FIELDS, Example

_EXTRA_MODULES = {"seqio", "tensorflow", "tensorflow_text", "tensorflow_datasets"}
_DOCUMENTS_PER_BATCH = 256


@dataclasses.dataclass(frozen=True)
class Language:
    """A Task, seen as a language of the store. Numbers are 0 before `counted`.

    Attributes:
      label: name of the language in the store.
      task: the seqio Task.
      files: what the text is read from, in reading order; empty for Tasks without text files.
      text_field: field of the documents in files that have fields.
      through_seqio: whether the files alone do not give the documents: there are none, or the Task
        has preprocessors.
      has_targets: whether the documents are Examples, of inputs and targets.
      skip_bad: whether documents of files that cannot be read are left out rather than refused.
      num_documents, num_skipped_documents: with text, and blank.
    """

    label: str
    task: Any
    files: tuple[str, ...] = ()
    text_field: str = ""
    through_seqio: bool = True
    has_targets: bool = False
    skip_bad: bool = False
    num_documents: int = 0
    num_skipped_documents: int = 0

    @classmethod
    def of(cls, task: Any) -> "Language":
        """Finds the files of a Task of bloomjax.tasks; other Tasks have none."""
        text = getattr(task.source, "language_text", None)
        has_targets = "text" not in getattr(task, "output_features", ("text",))
        if text is None:
            return cls(task.name.rsplit(".", 1)[-1], task, has_targets=has_targets)
        files = tuple(map(str, text.files))
        return cls(
            text.language, task, files, text.text_field, bool(task.preprocessors), has_targets
        )

    def documents(self) -> Generator[str, None, None]:
        """The documents of the Task, in source order, read through seqio."""
        import tensorflow as tf

        split = "train" if "train" in self.task.splits else next(iter(self.task.splits))
        dataset = self.task.get_dataset(sequence_length=None, split=split, shuffle=False)
        names = FIELDS.split("+") if self.has_targets else ["text"]
        dataset = dataset.map(lambda example: tuple(example[name] for name in names))
        dataset = dataset.batch(_DOCUMENTS_PER_BATCH)
        # An iterator that is alive at exit, with Python code behind tf.data, makes the process hang.
        # It must be gone however this ends, also from the frames an exception holds.
        iterator = dataset.as_numpy_iterator()
        try:
            for batch in iterator:
                for parts in zip(*(part.tolist() for part in batch), strict=True):
                    texts = [part.decode() for part in parts]
                    yield Example(*texts) if self.has_targets else texts[0]
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
        if self.through_seqio:
            return self.documents()
        text = self.task.source.language_text
        return text.documents(lambda error: None) if self.skip_bad else text.documents()

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
      BadInput: there is no such module, Mixture or Task, it has no text, or two of its Tasks are
        one language or read one file.
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
        if "text" not in task.output_features and not {*FIELDS.split("+")} <= {
            *task.output_features
        }:
            features = ", ".join(task.output_features)
            raise BadInput(
                f"{task.name} has no feature 'text' of raw text; it has: {features} ('inputs' and 'targets' do, too)"
            )
    languages = [Language.of(task) for task in tasks]
    _check_separate(languages)
    return languages


def read_task(task_module: str, name: str, text_dir: str | None, label: str) -> Iterator[str]:
    """The documents of one language, read through seqio, for a process that has loaded nothing yet.

    Raises:
      BadInput: as `find_languages`, or the text is damaged.
    """
    languages = {each.label: each for each in find_languages(task_module, name, text_dir)}
    with contextlib.closing(languages[label].documents()) as documents:
        yield from documents


def count_documents(languages: Sequence[Language]) -> list[Language]:
    """The same with the numbers of their documents; all of the text is read and checked.

    Raises:
      BadInput: the text is damaged, or a language has fewer than 2 documents.
    """
    languages = [language.counted() for language in languages]
    check_enough({language.label: language.num_documents for language in languages})
    return languages


def check_enough(num_documents: dict[str, int]) -> None:
    """Raises BadInput unless each language has a document to train and one to validate."""
    few = [f"'{label}' has {number}" for label, number in num_documents.items() if number < 2]
    if few:
        raise BadInput(
            f"each language needs 2 documents, one to train and one to validate; {', '.join(few)} "
            f"(in a .txt file a blank line ends a document)"
        )


def training_texts(languages: Sequence[Language], holdout_fraction: float) -> Iterator[str]:
    """The documents with text that are not held out, of all languages, which are counted."""
    for language in languages:
        num_held_out = token_store.num_holdout_documents(language.num_documents, holdout_fraction)
        with contextlib.closing(language.documents_of_files()) as documents:
            texts = (text for text in documents if not token_store.is_blank(text))
            yield from itertools.islice(texts, language.num_documents - num_held_out)


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


def _check_separate(languages: Sequence[Language]) -> None:
    """Raises BadInput where text would be counted twice, or two languages become one."""
    labels: dict[str, str] = {}
    files: dict[str, str] = {}
    for language in languages:
        name = language.task.name
        first = labels.setdefault(language.label, name)
        if first != name:
            raise BadInput(f"two Tasks are the language '{language.label}': {first} and {name}")
        for path in language.files:
            first = files.setdefault(os.path.realpath(path), name)
            if first != name:
                raise BadInput(f"two Tasks read the file {path}: {first} and {name}")


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
