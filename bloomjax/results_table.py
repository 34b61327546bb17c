"""Results of evaluations beside each other: ours, and those that BigScience published.

Two kinds of files are read: what `evaluate --output` writes, and BigScience's `*_agg.json` (each metric of each task at
every checkpoint of a run; bigscience-workshop/bigscience, evaluation/results).
"""

import dataclasses
import json
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from bloomjax.errors import BadInput
from bloomjax.task_presets import CURRENT_NAMES, MAIN_METRICS

Metrics = Mapping[str, Mapping[str, float]]  # of each task, by name; with NAME_stderr
# Of the mean; mc_taco's em is in none of BigScience's.
OF_MEAN = ("acc", "acc_norm", "exact_match")


@dataclasses.dataclass(frozen=True)
class Results:
    """A column of the table.

    Attributes:
      name: of the column.
      metrics: by the harness's names of tasks and groups.
      groups: which of them are means of others.
      step, limit: of the checkpoint and of documents a task, as `evaluate` has written them; None where it has not.
      num_fewshot: solved examples before each question, by task, where there are any.
    """

    name: str
    metrics: Metrics
    groups: Collection[str] = ()
    step: int | None = None
    limit: int | None = None
    num_fewshot: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def main(self, task: str) -> tuple[str, float, float | None] | None:
        """Name, value and standard error of a task's metric; None where it was not measured."""
        found = self.metrics.get(task, {})
        for name in (*MAIN_METRICS, *found):
            if name in found and not name.endswith("_stderr"):
                return name, found[name], found.get(f"{name}_stderr")
        return None


def read_results(path: Path) -> Results:
    """A column of either kind of file; of `*_agg.json` the last checkpoint. BadInput if it is neither."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"there is no {path}") from None
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise BadInput(f"{path} is no JSON: {error}") from None
    try:
        if "tokens" in read:
            return _of_every_checkpoint(path, read)
        metrics = {task: _numbers(found) for task, found in read["results"].items()}
        shots = {task: num for task, num in read.get("num_fewshot", {}).items() if num}
        groups = list(read.get("groups", []))
        return Results(path.stem, metrics, groups, read.get("step"), read.get("limit"), shots)
    except (KeyError, IndexError, TypeError, AttributeError):
        raise BadInput(
            f"{path} holds no results: neither those of evaluate --output nor a *_agg.json of BigScience"
        ) from None


def _of_every_checkpoint(path: Path, read: Any) -> Results:
    """Its last checkpoint, the tasks under the names of today."""
    name = path.stem.removesuffix("_agg").removesuffix("-checkpoints")
    metrics: dict[str, dict[str, float]] = {
        CURRENT_NAMES.get(task) or task: _numbers({n: values[-1] for n, values in found.items()})
        for task, found in read["results"].items()
    }
    return Results(f"{name}, {read['tokens'][-1] / 1e9:.0f}B tokens", metrics)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not math.isnan(value)
    }


def markdown(columns: Sequence[Results]) -> str:
    """A row for each task of any column; values in percent where they are shares, with one standard error.

    The last row is the mean accuracy over the tasks that all columns have (or what stands for accuracy); a group is no
    task of its own.
    """
    groups = {group for column in columns for group in column.groups}
    tasks = list(dict.fromkeys(task for column in columns for task in column.metrics))
    cells = [["task", "metric", *(column.name for column in columns)]]
    shares: list[list[float]] = []
    for task in tasks:
        found = [column.main(task) for column in columns]
        names = list(dict.fromkeys(each[0] for each in found if each))
        if not names:
            continue
        cells.append([task, " / ".join(names), *map(_cell, found)])
        if task not in groups and all(each and each[0] in OF_MEAN for each in found):
            shares.append([each[1] for each in found if each])
    if len(shares) > 1:
        means = [f"{statistics.fmean(values):.2%}" for values in zip(*shares, strict=True)]
        cells.append([f"mean of {len(shares)} tasks", "", *means])
    return _aligned(cells)


def _is_share(metric: str) -> bool:
    return metric in (*OF_MEAN, "em")


def _cell(found: tuple[str, float, float | None] | None) -> str:
    if found is None:
        return "-"
    name, value, error = found
    form = "{:.2%}" if _is_share(name) else "{:.4f}"
    text = form.format(value)
    return f"{text} ± {form.format(error)}" if error else text


def _aligned(cells: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for number, row in enumerate(cells):
        padded = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(padded)} |")
        if number == 0:
            rules = [
                "-" * width if column < 2 else "-" * (width - 1) + ":"
                for column, width in enumerate(widths)
            ]
            lines.append(f"| {' | '.join(rules)} |")
    return "\n".join(lines)
