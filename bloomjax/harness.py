"""Tasks of lm-evaluation-harness on a model in this process: what they need, and what came out.

The harness is an extra (`pip install 'bloomjax[eval]'`) and loaded only here and in lm_eval_model.
"""

import contextlib
import importlib.metadata
import importlib.util
import logging
import os
import random
import socket
import sys
import urllib.parse
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from bloomjax.errors import BadInput
from bloomjax.task_presets import SCRIPTS

_SEED = 1234  # of the solved examples, and of what tasks do at random: the harness's own
# For standard errors without a formula (f1, perplexity).
_BOOTSTRAP_DRAWS = 100
# Of modules whose errors mean that data could not be had.
_DATA_MODULES = ("datasets", "huggingface_hub", "requests", "httpx", "fsspec", "urllib3")


def check_installed() -> None:
    """BadInput with the line that installs it."""
    if importlib.util.find_spec("lm_eval") is None:
        raise BadInput(
            "--tasks needs lm-evaluation-harness: pip install 'bloomjax[eval]' (or 'lm-eval>=0.4.13,<0.5')"
        )


def load_tasks(
    names: Sequence[str], include_path: str | None = None, *, skip_missing: bool = False
) -> dict[str, Any]:
    """What the harness's TaskManager makes of names of tasks, groups and tags, with their data.

    Args:
      names: as in its list of tasks.
      include_path: folder with task files of the user's own.
      skip_missing: print which tasks are left out because their data is not there, instead of an error.

    Raises BadInput for a name it does not know, a task file it cannot read, and data that is neither on this disk nor
    to be had: one line that names all such tasks and how to get their data.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise BadInput(f"--include_path={include_path} is no folder")
    _go_offline_if_there_is_no_network()
    with _quiet():
        from lm_eval.tasks import TaskManager

        random.seed(0)
        np.random.seed(_SEED)
        manager: Any = None
        if include_path:
            manager = TaskManager(include_path=include_path, include_defaults=False)
        if manager is None or not set(names) <= set(manager.all_subtasks):
            manager = TaskManager(include_path=include_path)  # reads 14,000 files: seconds
        _check_names(names, manager.all_tasks, include_path)
        loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
        missing: dict[str, Exception] = {}
        for name in names:
            try:
                found = manager.load([name])
            except Exception as error:
                if not _is_about_data(error):
                    raise BadInput(f"task {name}: {_one_line(error)}") from error
                missing[name] = error
                continue
            for kind, content in found.items():
                loaded[kind].update(content)
    if missing:
        line = _how_to_get(missing)
        if not skip_missing or not loaded["tasks"]:
            raise BadInput(line)
        print(f"left out: {line}")
    return loaded


def run_tasks(
    model: Any, loaded: dict[str, Any], *, num_fewshot: int | None = None, limit: int | None = None
) -> dict[str, Any]:
    """Evaluates; by task its metrics, standard errors and number of documents, and what was asked for.

    Args:
      model: of lm_eval_model.language_model.
      loaded: of `load_tasks`.
      num_fewshot: solved examples before each question; None for what the tasks say, mostly none.
      limit: documents of each task, the first ones; None for all.
    """
    with _quiet():
        from lm_eval.evaluator import evaluate

        for task in loaded["tasks"].values():
            if num_fewshot is not None:
                task.set_config(key="num_fewshot", value=num_fewshot)
            elif task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_SEED)
        found = cast(
            dict[str, Any],  # on every process but the first None: evaluate is one process
            evaluate(
                lm=model,
                task_dict=loaded,
                limit=limit,
                log_samples=False,
                bootstrap_iters=_BOOTSTRAP_DRAWS,
            ),
        )
    results = {}
    for task, metrics in found["results"].items():
        row: dict[str, Any] = {}
        for key, value in metrics.items():
            name, comma, filtered = key.partition(",")
            if comma and isinstance(value, int | float):
                row.setdefault(name if filtered == "none" else _with(name, filtered), float(value))
        results[task] = row
    return {
        "results": results,
        "groups": sorted(found.get("groups", {})),
        "num_documents": {t: n["effective"] for t, n in found["n-samples"].items()},
        "num_fewshot": {t: found["n-shot"].get(t) for t in results},
        "task_versions": {t: found["versions"].get(t) for t in results},
        "lm_eval": importlib.metadata.version("lm_eval"),
        "limit": limit,
    }


def _with(name: str, filtered: str) -> str:
    """A metric after one of the harness's filters, `_stderr` still at the end; remove_whitespace is every task's."""
    if filtered == "remove_whitespace":
        return name
    stem = name.removesuffix("_stderr")
    return f"{stem}@{filtered}" + ("_stderr" if stem != name else "")


def _check_names(names: Sequence[str], known: Sequence[str], include_path: str | None) -> None:
    import difflib

    for name in names:
        if name in known:
            continue
        close = difflib.get_close_matches(name, known)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        where = f" and {include_path}" if include_path else "; --include_path=DIR adds your own"
        raise BadInput(
            f"no task {name!r} in lm-evaluation-harness {importlib.metadata.version('lm_eval')}{where}{hint}"
        )


def _is_about_data(error: Exception) -> bool:
    if isinstance(error, FileNotFoundError | ConnectionError | TimeoutError):
        return True
    # RuntimeError: datasets' word for a data set that is a script.
    modules = {kind.__module__.split(".")[0] for kind in type(error).__mro__}
    return bool(modules & set(_DATA_MODULES)) or "scripts are no longer supported" in str(error)


def _how_to_get(missing: dict[str, Exception]) -> str:
    from datasets import config

    cache = os.environ.get("HF_DATASETS_CACHE", config.HF_DATASETS_CACHE)
    line = f"the data of {', '.join(missing)} is not on this disk ({cache}) and cannot be fetched from here"
    if any(isinstance(error, FileNotFoundError) for error in missing.values()):
        line += (
            f" ({_one_line(next(e for e in missing.values() if isinstance(e, FileNotFoundError)))})"
        )
    if scripts := sorted(SCRIPTS & set(missing)):
        line += f" ({', '.join(scripts)}: a script, for which you need datasets<4)"
    return (
        f"{line}; where there is a network run: lm_eval --model dummy --limit 1 --tasks {','.join(missing)}; then "
        "copy that cache here (or set HF_HOME to it). --skip_missing evaluates the other tasks"
    )


def _go_offline_if_there_is_no_network() -> None:
    """Else each data set is asked for six times, 24 seconds long. Works before huggingface_hub is loaded."""
    if "HF_HUB_OFFLINE" in os.environ or any(
        name in os.environ for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    ):
        return
    host = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's log, its warnings, and its prints where results go."""
    # Its log is set up when it is imported; its bootstrap would start a process for each core.
    environment = {"LMEVAL_LOG_LEVEL": "ERROR", "DISABLE_MULTIPROC": "1"}
    kept = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
