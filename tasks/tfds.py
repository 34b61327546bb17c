"""Text of TensorFlow Datasets in the languages of BLOOM: the Mixtures 'mc4' and 'wiki40b'.

`register(folder)` takes the data_dir of TensorFlow Datasets, in which the data sets have been
prepared: c4/multilingual/3.1.0 (mC4) and wiki40b/<language>/1.3.0. Each language that is there
becomes a Task, such as 'mc4.sw', under BLOOM's code of it. Nothing is downloaded; preparing mC4
reads Common Crawl and needs a cluster. Tests read a data set of a few lines in the same format, not
the published ones.

mC4 tells Chinese scripts apart in Latin letters only, so its 'zh' stands for 'zhs'.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bloomjax.errors import BadInput
from bloomjax.tasks import text_files
from bloomjax.tasks.languages import ROOTS_WEIGHTS

MC4, WIKI40B = "mc4", "wiki40b"
MC4_NAME, MC4_VERSION = "c4/multilingual", "3.1.0"
WIKI40B_VERSION = "1.3.0"

# BLOOM's code: theirs.
MC4_LANGUAGES: dict[str, str] = {"zhs": "zh"} | {
    code: code
    for code in (
        "ar bn ca en es eu fr gu hi id ig kn ml mr ne ny pa pt sn st sw ta te ur vi xh yo zu"
    ).split()
}
WIKI40B_LANGUAGES: dict[str, str] = {"zhs": "zh-cn", "zht": "zh-tw"} | {
    code: code for code in "ar ca en es fr hi id pt vi".split()
}


def find_languages(text_dir: str | os.PathLike[str]) -> dict[str, dict[str, tuple[str, str]]]:
    """{Mixture: {language: (name of the data set, split)}} of what has been prepared in `text_dir`.

    Raises:
      BadInput: there is no language of BLOOM, or the description of a data set is damaged.
    """
    root = Path(text_dir)
    found: dict[str, dict[str, tuple[str, str]]] = {MC4: {}, WIKI40B: {}}
    splits = _splits(root / MC4_NAME / MC4_VERSION)
    for language, code in MC4_LANGUAGES.items():
        if code in splits:
            found[MC4][language] = (f"{MC4_NAME}:{MC4_VERSION}", code)
    for language, code in WIKI40B_LANGUAGES.items():
        if "train" in _splits(root / WIKI40B / code / WIKI40B_VERSION):
            found[WIKI40B][language] = (f"{WIKI40B}/{code}:{WIKI40B_VERSION}", "train")
    found = {mixture: dict(sorted(there.items())) for mixture, there in found.items() if there}
    if not found:
        raise BadInput(
            f"{root} has no prepared {MC4_NAME}/{MC4_VERSION} or {WIKI40B}/<language>/"
            f"{WIKI40B_VERSION} in a language of BLOOM"
        )
    return found


def register(text_dir: str | os.PathLike[str]) -> None:
    """Registers the Mixtures for which there is text, with BLOOM's rates, and their Tasks.

    Raises:
      BadInput: as `find_languages`.
    """
    found = find_languages(text_dir)

    import seqio

    clean: dict[str, Callable[[Any], Any]] = {MC4: lambda text: text, WIKI40B: without_markers}
    features = text_files.text_features()
    for mixture, languages in found.items():
        tasks: dict[str, str] = {}
        for language, (name, split) in languages.items():
            task = f"{mixture}.{language}"
            source: Any = seqio.TfdsDataSource(
                name, tfds_data_dir=os.fspath(text_dir), splits={"train": split}, read_only=True
            )
            seqio.TaskRegistry.remove(task)
            seqio.TaskRegistry.add(
                task,
                source=source,
                preprocessors=[_only_text(clean[mixture])],
                output_features=features,
            )
            tasks[task] = language
        text_files.add_mixture(mixture, tasks, ROOTS_WEIGHTS)


def without_markers(text: Any) -> Any:
    """A string tensor of Wiki40B's text as paragraphs, titles among them, with a blank line between two."""
    import tensorflow as tf

    text = tf.strings.regex_replace(text, r"\n*_START_(ARTICLE|SECTION|PARAGRAPH)_\n", "\n\n")
    text = tf.strings.regex_replace(text, "_NEWLINE_", "\n")
    return tf.strings.regex_replace(text, r"\A\n+", "")


def _only_text(clean: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def preprocess(dataset: Any) -> Any:
        return dataset.map(lambda example: {"text": clean(example["text"])})

    return preprocess


def _splits(folder: Path) -> set[str]:
    """The splits of a prepared data set, none if it is not there."""
    path = folder / "dataset_info.json"
    try:
        return {split["name"] for split in json.loads(path.read_bytes())["splits"]}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"{path} is damaged: it does not name its splits") from None
