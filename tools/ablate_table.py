"""What the runs of an ablation show: means and deviations over seeds, and which differences are more than noise."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import scaling_collect
from scipy import stats

from bloomjax import config, flops, results_table
from bloomjax.errors import BadInput
from bloomjax.results_table import OF_MEAN

LEVEL = 0.05
_ROUNDING = 1e-9  # of losses in nats


@dataclasses.dataclass(frozen=True)
class Row:
    """One quantity of all overlays.

    Attributes:
      label: what it is.
      values: by overlay, one a seed; None where there is none.
      digits: behind the point.
      is_tested: whether its differences are judged; sizes and speeds are not.
      beside: by column of --beside, published values, which are not judged.
    """

    label: str
    values: dict[str, list[float] | None]
    digits: int = 3
    is_tested: bool = True
    beside: dict[str, float] = dataclasses.field(default_factory=dict)

    def cell(self, column: str) -> str:
        found = [self.beside[column]] if column in self.beside else self.values.get(column)
        if not found:
            return "-"
        text = f"{statistics.fmean(found):,.{self.digits}f}"
        same = len(found) < 2 or (not self.is_tested and len(set(found)) == 1)
        return text if same else f"{text} ± {statistics.stdev(found):,.{self.digits}f}"

    @property
    def groups(self) -> dict[str, list[float]]:
        return {name: values for name, values in self.values.items() if values}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Tukey's test of all pairs of overlays.

    Attributes:
      p: of each pair, the one with the lower mean first; empty where nothing can be tested.
      smallest: difference of two means that it would call more than noise; None if unknown.
      freedom: degrees of freedom of the pooled deviation.
      untested: overlays left out, of which there is one seed or a value that is no number.
    """

    p: dict[tuple[str, str], float]
    smallest: float | None
    freedom: int = 0
    untested: Sequence[str] = ()

    @property
    def differing(self) -> list[tuple[str, str]]:
        return [pair for pair, p in self.p.items() if p < LEVEL]

    def text(self) -> str:
        if self.smallest is None:
            return "not tested"
        if not self.differing:
            said = "within noise"
        elif len(self.differing) == len(self.p) and len(self.p) > 1:
            said = "all differ"
        else:
            said = ", ".join(f"{low} < {high}" for low, high in self.differing)
        return f"{said} (not tested: {', '.join(self.untested)})" if self.untested else said


def judge(groups: Mapping[str, Sequence[float]]) -> Verdict:
    """Tukey's honestly significant difference (Tukey-Kramer), two-sided, LEVEL for all pairs together.

    It takes the deviation over seeds as that of all overlays alike, and pools it: K overlays of n seeds each have
    K (n - 1) degrees of freedom. Not tested: one overlay, one seed, values that are no numbers.
    """
    untested = [n for n, v in groups.items() if len(v) < 2 or not all(map(math.isfinite, v))]
    groups = {name: values for name, values in groups.items() if name not in untested}
    names = list(groups)
    if len(names) < 2:
        return Verdict({}, None)
    means = {name: statistics.fmean(groups[name]) for name in names}
    pairs = [
        (a, b) if means[a] <= means[b] else (b, a) for a, b in itertools.combinations(names, 2)
    ]
    deviation, freedom = pooled_deviation(groups)
    if deviation < _ROUNDING:  # as where nothing is drawn from a seed
        p = {(a, b): float(means[b] - means[a] < _ROUNDING) for a, b in pairs}
        return Verdict(p, 0.0, freedom, untested)
    found = stats.tukey_hsd(*groups.values()).pvalue
    p = {(a, b): float(found[names.index(a), names.index(b)]) for a, b in pairs}
    limit = stats.studentized_range.ppf(1 - LEVEL, len(names), freedom)
    num = stats.hmean([len(values) for values in groups.values()])
    return Verdict(p, float(limit * deviation / math.sqrt(num)), freedom, untested)


def pooled_deviation(groups: Mapping[str, Sequence[float]]) -> tuple[float, int]:
    """Of single runs around the mean of their overlay; and its degrees of freedom."""
    squares = sum(statistics.variance(values) * (len(values) - 1) for values in groups.values())
    freedom = sum(len(values) - 1 for values in groups.values())
    return math.sqrt(squares / freedom), freedom


# ---- reading ----


class Task(NamedTuple):
    """What a row of zero-shot numbers is of."""

    name: str
    metric: str
    num_fewshot: int = 0

    @property
    def key(self) -> tuple[str, int]:
        return self.name, self.num_fewshot

    @property
    def shots(self) -> str:
        return f", {self.num_fewshot}-shot" if self.num_fewshot else ""


@dataclasses.dataclass(frozen=True)
class Result:
    """What one finished run says.

    Attributes:
      step: its last one.
      flops_per_token: in the mean over the tokens seen.
      tokens_per_second: median over its steps.
      curve: held-out loss by tokens.
      tasks: accuracy, or what stands for it.
      left_out: files with results of tasks that are not in `tasks`, and why.
      lengths: of ablate_lengths.measure.
    """

    overlay: str
    seed: int
    step: int
    params: int
    flops_per_token: float
    tokens: int
    tokens_per_second: float
    loss: float
    bits_per_byte: float | None  # not with every objective
    loss_by_language: dict[str, float]
    curve: list[tuple[int, float]]
    tasks: dict[Task, float]
    left_out: list[str]
    lengths: dict[str, Any] | None = None


def read_result(overlay: str, seed: int, model_dir: Path) -> Result | None:
    """None unless the run is finished, its last evaluation included."""
    try:
        run = scaling_collect.read_run(str(model_dir))
    except BadInput:  # it has not begun, or its last line is damaged: `train` mends that
        return None
    last = run.records[-1]
    if not run.is_finished or "loss_by_language" not in last:
        return None
    model = config.build("Bloom.config", model_dir / "config.gin")
    length = _mean_length(run.records)
    per_token = flops.flops_per_token(**model.shape, sequence_length_tokens=length)
    speeds = [r["tokens_per_second"] for r in run.records if "tokens_per_second" in r]
    tasks, left_out = read_tasks(model_dir, last["step"])
    return Result(
        overlay=overlay,
        seed=seed,
        step=last["step"],
        params=run.params,
        flops_per_token=per_token.causal,
        tokens=last["tokens"],
        tokens_per_second=statistics.median(speeds),
        loss=last["validation_loss"],
        bits_per_byte=last.get("validation_bits_per_byte"),
        loss_by_language=last["loss_by_language"],
        curve=[(r["tokens"], r["validation_loss"]) for r in run.records if "validation_loss" in r],
        tasks=tasks,
        left_out=left_out,
    )


def _mean_length(records: Sequence[Mapping[str, Any]]) -> float:
    """Of the sample that a token is in, the mean over the tokens seen: FLOPs a token are linear in it."""
    marks = [(0, 0), *((r["samples"], r["tokens"]) for r in records)]
    parts = [(s - s0, t - t0) for (s0, t0), (s, t) in itertools.pairwise(marks) if s > s0]
    return sum(t * t / s for s, t in parts) / sum(t for _, t in parts)


def read_tasks(model_dir: Path, step: int) -> tuple[dict[Task, float], list[str]]:
    """The tasks of all files of `evaluate --tasks` in the folder, the newer one where two have the same; and which
    files were left out: those of another step, and those of a few documents."""
    found: dict[Task, float] = {}
    left_out = []
    for path in sorted(model_dir.glob("*.json"), key=lambda path: path.stat().st_mtime):
        try:
            read = results_table.read_results(path)
        except BadInput:
            continue
        values = {task: main for task in read.metrics if (main := read.main(task))}
        if read.step != step and values:
            left_out.append(f"{path}: of step {read.step}, the run has {step}")
        elif read.limit is not None and values:
            left_out.append(f"{path}: of the first {read.limit} documents alone")
        else:
            found |= {
                Task(task, metric, read.num_fewshot.get(task, 0)): value
                for task, (metric, value, _) in values.items()
            }
    return found, left_out


# ---- table ----


def rows(
    results: Mapping[str, Sequence[Result]], beside: Sequence[results_table.Results] = ()
) -> list[Row]:
    """All quantities of the results by overlay: sizes, loss, lengths, tasks, languages. An overlay may have none."""

    def row(label: str, read: Any, **options: Any) -> Row:
        values = {name: [read(r) for r in found] for name, found in results.items()}
        return Row(label, {name: _whole(found) for name, found in values.items()}, **options)

    every = [r for found in results.values() for r in found]
    found = [
        row("parameters", lambda r: r.params, digits=0, is_tested=False),
        row("FLOPs a token", lambda r: r.flops_per_token, digits=0, is_tested=False),
        row("tokens/s", lambda r: r.tokens_per_second, digits=0, is_tested=False),
        row("held-out loss", lambda r: r.loss, digits=4),
        row("bits per byte", lambda r: r.bits_per_byte, digits=4),
    ]
    for tokens in list(every[0].lengths["lengths"]) if every[0].lengths else []:
        found.append(row(f"loss, windows of {tokens}", lambda r, t=tokens: loss_at(r, t), digits=4))
    for tokens in longer(every[0]):
        found.append(row(f"change at {tokens}", lambda r, t=tokens: change_at(r, t), digits=4))
    found += _task_rows(results, beside)
    languages = dict.fromkeys(name for r in every for name in r.loss_by_language)
    found += [row(f"loss in {n}", lambda r, n=n: r.loss_by_language.get(n)) for n in languages]
    return found


def _whole(values: list[float | None]) -> list[float] | None:
    """None where one is missing."""
    there = [x for x in values if x is not None]
    return there if len(there) == len(values) else None


def _task_rows(
    results: Mapping[str, Sequence[Result]], beside: Sequence[results_table.Results]
) -> list[Row]:
    """A row a task; and the mean over those of all runs, and over those that all columns of `beside` have, too."""
    every = [r for found in results.values() for r in found if r.tasks]
    # By name and number of solved examples; the metric may be another.
    published: dict[str, dict[tuple[str, int], tuple[str, float]]] = {
        column.name: {
            (name, column.num_fewshot.get(name, 0)): main[:2]
            for name in column.metrics
            if (main := column.main(name))
        }
        for column in beside
    }
    ours = {task.key: task for r in every for task in r.tasks}
    for column in published.values():
        for (name, shots), (metric, _) in column.items():
            ours.setdefault((name, shots), Task(name, metric, shots))

    def row(label: str, tasks: Sequence[Task], digits: int) -> Row:
        def mean(numbers: Sequence[float | None]) -> float | None:
            there = [x for x in numbers if x is not None]
            return statistics.fmean(there) if len(there) == len(numbers) else None

        values = {
            name: [mean([r.tasks.get(t) for t in tasks]) for r in found]
            for name, found in results.items()
        }
        columns = {}
        for name, column in published.items():
            columns[name] = mean([column[t.key][1] if t.key in column else None for t in tasks])
        return Row(
            label, {name: _whole(found) for name, found in values.items()}, digits,
            beside={name: x for name, x in columns.items() if x is not None},
        )  # fmt: skip

    found = []
    for task in ours.values():
        others = [column[task.key][0] for column in published.values() if task.key in column]
        metrics = " / ".join(dict.fromkeys([task.metric, *others]))
        found.append(row(f"{task.name} ({metrics}{task.shots})", [task], 3))
    for shots in sorted({task.num_fewshot for task in ours.values()}):
        of_runs = [
            task for task in ours.values()
            if every and task.metric in OF_MEAN and task.num_fewshot == shots and all(task in r.tasks for r in every)
        ]  # fmt: skip
        of_all = [
            task for task in of_runs
            if all(c.get(task.key, ("",))[0] in OF_MEAN for c in published.values())
        ]  # fmt: skip
        for tasks in [of_runs] if of_all == of_runs else [of_runs, of_all]:
            if len(tasks) > 1:
                found.append(row(f"mean of {len(tasks)} tasks{tasks[0].shots}", tasks, 4))
    return found


def longer(result: Result) -> list[str]:
    """Lengths of --lengths above that of training; none if that was not measured."""
    if not result.lengths:
        return []
    training = result.lengths["training_length"]
    there = str(training) in result.lengths["lengths"]
    return [t for t in result.lengths["lengths"] if there and int(t) > training]


def loss_at(result: Result, tokens: str) -> float | None:
    found = (result.lengths or {}).get("lengths", {}).get(tokens)
    return found if isinstance(found, float) else None


def change_at(result: Result, tokens: str) -> float | None:
    """Loss of windows of `tokens` above that of windows of the training length, of the same text."""
    assert result.lengths
    before = loss_at(result, str(result.lengths["training_length"]))
    after = loss_at(result, tokens)
    return None if before is None or after is None else after - before


def change_words(name: str, tokens: str, found: Sequence[Result]) -> str:
    """One line: whether an overlay gets worse at a length beyond training, by a t-test paired by seed."""
    lengths = found[0].lengths
    assert lengths
    said = lengths["lengths"][tokens]
    if isinstance(said, str):
        return f"{name}: no loss at {tokens} tokens: {said}"
    changes = [change for each in found if (change := change_at(each, tokens)) is not None]
    mean = statistics.fmean(changes)
    line = f"{name}: {mean:+.4f} nats at {int(tokens) / lengths['training_length']:g} times the training length"
    if len(changes) < 2:
        return f"{line} (one seed: no test)"
    error = max(statistics.stdev(changes), _ROUNDING) / math.sqrt(len(changes))
    p = float(2 * stats.t.sf(abs(mean) / error, len(changes) - 1))
    if p >= LEVEL:
        word = "within noise"
    else:
        word = "worse" if mean > 0 else "better"
    return f"{line}, {word} (paired by seed, p = {p:.2g})"


def remarks(results: Mapping[str, Sequence[Result]], found: Sequence[Row]) -> list[str]:
    """What the table is, what its test can tell, and what the lengths show."""
    every = [r for group in results.values() for r in group]
    seeds = sorted({r.seed for r in every})
    tokens = " to ".join(
        f"{num:,}" for num in sorted({min(r.tokens for r in every), max(r.tokens for r in every)})
    )
    lines = [
        f"{len(results)} overlays x {len(seeds)} seeds, {tokens} tokens each, on the same data in the same "
        "order: seeds change initial weights and dropout alone. ± is the deviation over seeds; tokens/s is the median "
        "over steps.",
    ]
    loss = next(row for row in found if row.label == "held-out loss")
    verdict = judge(loss.groups)
    lines += [f"Left out: {line}." for r in every for line in r.left_out]
    if verdict.smallest is None:
        lines.append(
            "Noise: not tested; that takes two overlays and two seeds. A difference of single runs tells nothing."
        )
    else:
        tested = sum(row.is_tested for row in found)
        lines.append(
            f"Noise: Tukey's test of all pairs, two-sided, {LEVEL:.0%} for the pairs of a row together, the deviation "
            f"pooled over the overlays ({verdict.freedom} degrees of freedom). With these seeds it sees differences of "
            f"the held-out loss from {verdict.smallest:.4f} nats on; a smaller one may be real. Each of {tested} rows "
            f"is tested by itself, so about {LEVEL * tested:.0f} differ by chance. Other text and another order would "
            "add noise that no row shows."
        )
        pairs = ", ".join(f"{low} < {high} (p = {p:.2g})" for (low, high), p in verdict.p.items())
        lines.append(f"Held-out loss: {verdict.text()}: {pairs}.")
    return lines + _length_remarks(results)


def _length_remarks(results: Mapping[str, Sequence[Result]]) -> list[str]:
    first = next(r for group in results.values() for r in group)
    if not first.lengths:
        return []
    left_out = first.lengths["left_out"]
    line = (
        f"Lengths: the same {first.lengths['num_tokens']:,} held-out tokens of {len(first.lengths['languages'])} "
        "languages, cut into windows of each length"
    )
    lines = [f"{line}; without {', '.join(left_out)}, too short." if left_out else f"{line}."]
    return lines + [
        f"  {change_words(name, tokens, found)}"
        for tokens in longer(first)
        for name, found in results.items()
        if found
    ]


def markdown(names: Sequence[str], found: Sequence[Row]) -> str:
    """The table: a row a quantity, a column an overlay or what stands beside them."""
    cells = [["", *names, "difference"], ["---", *["---:"] * len(names), "---"]]
    for row in found:
        verdict = judge(row.groups).text() if row.is_tested else ""
        cells.append([row.label, *map(row.cell, names), verdict])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for number, line in enumerate(cells):
        padded = [
            text.ljust(width) if column in (0, len(line) - 1) else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        if number == 1:
            padded = [
                "-" * (w - 1) + (":" if 0 < c < len(line) - 1 else "-")
                for c, w in enumerate(widths)
            ]
        lines.append(f"| {' | '.join(padded)} |")
    return "\n".join(lines)


def _plain(result: Result) -> dict[str, Any]:
    tasks = {f"{t.name} ({t.metric}{t.shots})": value for t, value in result.tasks.items()}
    return dataclasses.asdict(dataclasses.replace(result, tasks={})) | {"tasks": tasks}


def record(results: Mapping[str, Sequence[Result]], found: Sequence[Row]) -> dict[str, Any]:
    """All numbers, for other programs."""
    return {
        "runs": [_plain(r) for group in results.values() for r in group],
        "rows": [
            {
                "label": row.label,
                "values": row.values,
                "beside": row.beside,
                "p": {f"{a} < {b}": p for (a, b), p in judge(row.groups).p.items()}
                if row.is_tested
                else {},
            }
            for row in found
        ],
        "remarks": remarks(results, found),
    }
