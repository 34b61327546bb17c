"""What the runs of an ablation show: means and deviations over seeds, and which differences are more than noise."""

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import scaling_collect
from scipy import stats

from bloomjax import config, flops
from bloomjax.errors import BadInput

LEVEL = 0.05
_ROUNDING = 1e-9  # of losses in nats
# Of a task of the language-model evaluation harness, the first that it has.
_METRICS = ("acc", "acc_norm", "exact_match", "em", "f1")


@dataclasses.dataclass(frozen=True)
class Row:
    """One quantity of all overlays.

    Attributes:
      label: what it is.
      values: by overlay, one a seed; None where there is none.
      digits: behind the point.
      is_tested: whether its differences are judged; sizes and speeds are not.
    """

    label: str
    values: dict[str, list[float] | None]
    digits: int = 3
    is_tested: bool = True

    def cell(self, overlay: str) -> str:
        found = self.values[overlay]
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
    """

    p: dict[tuple[str, str], float]
    smallest: float | None

    @property
    def differing(self) -> list[tuple[str, str]]:
        return [pair for pair, p in self.p.items() if p < LEVEL]

    def text(self) -> str:
        if self.smallest is None:
            return "not tested"
        if not self.differing:
            return "within noise"
        if len(self.differing) == len(self.p) and len(self.p) > 1:
            return "all differ"
        return ", ".join(f"{low} < {high}" for low, high in self.differing)


def judge(groups: Mapping[str, Sequence[float]]) -> Verdict:
    """Tukey's honestly significant difference (Tukey-Kramer), two-sided, LEVEL for all pairs together.

    It takes the deviation over seeds as that of all overlays alike, and pools it: K overlays of n seeds each have
    K (n - 1) degrees of freedom. Not tested: one overlay, or one seed.
    """
    names = list(groups)
    if len(names) < 2 or min(map(len, groups.values())) < 2:
        return Verdict({}, None)
    means = {name: statistics.fmean(groups[name]) for name in names}
    pairs = [
        (a, b) if means[a] <= means[b] else (b, a) for a, b in itertools.combinations(names, 2)
    ]
    deviation, freedom = pooled_deviation(groups)
    if deviation < _ROUNDING:  # as where nothing is drawn from a seed
        p = {(a, b): float(means[b] - means[a] < _ROUNDING) for a, b in pairs}
        return Verdict(p, 0.0)
    found = stats.tukey_hsd(*groups.values()).pvalue
    p = {(a, b): float(found[names.index(a), names.index(b)]) for a, b in pairs}
    limit = stats.studentized_range.ppf(1 - LEVEL, len(names), freedom)
    num = stats.hmean([len(values) for values in groups.values()])
    return Verdict(p, float(limit * deviation / math.sqrt(num)))


def pooled_deviation(groups: Mapping[str, Sequence[float]]) -> tuple[float, int]:
    """Of single runs around the mean of their overlay; and its degrees of freedom."""
    squares = sum(statistics.variance(values) * (len(values) - 1) for values in groups.values())
    freedom = sum(len(values) - 1 for values in groups.values())
    return math.sqrt(squares / freedom), freedom


# ---- reading ----


@dataclasses.dataclass(frozen=True)
class Result:
    """What one finished run says. tokens_per_second: median over its steps."""

    overlay: str
    seed: int
    params: int
    flops_per_token: float
    tokens: int
    tokens_per_second: float
    loss: float
    bits_per_byte: float | None  # not with every objective
    loss_by_language: dict[str, float]
    curve: list[tuple[int, float]]  # held-out loss by tokens
    tasks: dict[str, float]
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
    per_token = flops.flops_per_token(**model.shape, sequence_length_tokens=run.sequence_length)
    speeds = [r["tokens_per_second"] for r in run.records if "tokens_per_second" in r]
    return Result(
        overlay=overlay,
        seed=seed,
        params=run.params,
        flops_per_token=per_token.causal,
        tokens=last["tokens"],
        tokens_per_second=statistics.median(speeds),
        loss=last["validation_loss"],
        bits_per_byte=last.get("validation_bits_per_byte"),
        loss_by_language=last["loss_by_language"],
        curve=[(r["tokens"], r["validation_loss"]) for r in run.records if "validation_loss" in r],
        tasks=read_tasks(model_dir),
    )


def read_tasks(model_dir: Path) -> dict[str, float]:
    """Accuracy, or what stands for it, by "task metric" of the newest results of `evaluate --tasks` in the folder."""
    for path in sorted(model_dir.glob("*.json"), key=lambda path: -path.stat().st_mtime):
        try:
            results = json.loads(path.read_text(encoding="utf-8"))["results"]
            assert isinstance(results, dict)
        except (ValueError, KeyError, TypeError, AssertionError):
            continue
        found = {}
        for task, metrics in results.items():
            numbers = {n: x for n, x in metrics.items() if isinstance(x, int | float)}
            names = [n for n in (*_METRICS, *numbers) if n in numbers and not n.endswith("_stderr")]
            if names:
                found[f"{task} ({names[0]})"] = float(numbers[names[0]])
        return found
    return {}


# ---- table ----


def rows(results: Mapping[str, Sequence[Result]]) -> list[Row]:
    """All quantities of the results by overlay: sizes, loss, lengths, tasks, languages."""

    def row(label: str, read: Any, **options: Any) -> Row:
        values = {name: [read(r) for r in found] for name, found in results.items()}
        kept = {name: None if None in found else found for name, found in values.items()}
        return Row(label, kept, **options)

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
    tasks = dict.fromkeys(name for r in every for name in r.tasks)
    found += [row(name, lambda r, n=name: r.tasks.get(n)) for name in tasks]
    languages = dict.fromkeys(name for r in every for name in r.loss_by_language)
    found += [row(f"loss in {n}", lambda r, n=n: r.loss_by_language.get(n)) for n in languages]
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
    if verdict.smallest is None:
        lines.append(
            "Noise: not tested; that takes two overlays and two seeds. A difference of single runs tells nothing."
        )
    else:
        freedom = pooled_deviation(loss.groups)[1]
        tested = sum(row.is_tested for row in found)
        lines.append(
            f"Noise: Tukey's test of all pairs, two-sided, {LEVEL:.0%} for the pairs of a row together, the deviation "
            f"pooled over the overlays ({freedom} degrees of freedom). With these seeds it sees differences of the "
            f"held-out loss from {verdict.smallest:.4f} nats on; a smaller one may be real. Each of {tested} rows is "
            f"tested by itself, so about {LEVEL * tested:.0f} differ by chance. Other text and another order would add "
            "noise that no row shows."
        )
        pairs = ", ".join(f"{low} < {high} (p = {p:.2g})" for (low, high), p in verdict.p.items())
        lines.append(f"Held-out loss: {verdict.text()}: {pairs}.")
    return lines + _length_remarks(results)


def _length_remarks(results: Mapping[str, Sequence[Result]]) -> list[str]:
    first = next(iter(results.values()))[0]
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
    ]


def markdown(names: Sequence[str], found: Sequence[Row]) -> str:
    """The table: a row a quantity, a column an overlay."""
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


def record(results: Mapping[str, Sequence[Result]], found: Sequence[Row]) -> dict[str, Any]:
    """All numbers, for other programs."""
    return {
        "runs": [dataclasses.asdict(r) for group in results.values() for r in group],
        "rows": [
            {
                "label": row.label,
                "values": row.values,
                "p": {f"{a} < {b}": p for (a, b), p in judge(row.groups).p.items()}
                if row.is_tested
                else {},
            }
            for row in found
        ],
        "remarks": remarks(results, found),
    }
