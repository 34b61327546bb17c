"""Where the time of a run went, over all of its starts: how much of it was training that counts.

    python tools/goodput.py runs/tiny
    python tools/goodput.py --model_dir=runs/tiny --plot=goodput.png

Reads goodput.jsonl and journal.jsonl of a MODEL_DIR, also while the run goes on. Beside the phases that a run books,

    lost work  steps that a later start (or a roll back) did again, and the time after the last finished step of a start
    idle       between the last line of a start and the creation of the next process
    unknown    lines that are missing or damaged

They add up to the time from the creation of the first process to the last line. Goodput is the share of `step`.
"""

import collections
import dataclasses
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from absl import flags

from bloomjax import config, ledger
from bloomjax.errors import BadInput
from bloomjax.files import one_line_errors
from bloomjax.journal import read_lines

_FLAGS = flags.FlagValues()
_MODEL_DIR = flags.DEFINE_string(
    "model_dir", None, "MODEL_DIR of a run; may also be the first argument.", flag_values=_FLAGS
)
_PLOT = flags.DEFINE_string(
    "plot", None, "Picture to write: .png, .svg or .pdf.", flag_values=_FLAGS
)
_JSON = flags.DEFINE_bool("json", False, "One JSON object.", flag_values=_FLAGS)

LOST, IDLE = "lost work", "idle"
ORDER = ("step", LOST, IDLE, "start", "compile", "restore", "save", "evaluate", "finish", "unknown")
NUM_SHOWN = 10  # newest starts in the table
_JUMP_SECONDS = 1.0
_COLOURS = {
    "step": "#0072b2",
    LOST: "#d55e00",
    IDLE: "#c8c8c8",
    "start": "#56b4e9",
    "compile": "#cc79a7",
    "restore": "#f0e442",
    "save": "#009e73",
    "evaluate": "#e69f00",
    "finish": "#7a5195",
    "unknown": "#333333",
}


@dataclasses.dataclass
class Piece:
    """`seconds` in one phase, `at` seconds after the first process was created.

    Attributes:
      start: number of the start, from 0.
      first_step, last_step: what was done in it, in the phases "step" and LOST; 0 if nothing.
      is_part: one step was begun, and not finished in it.
    """

    phase: str
    at: float
    seconds: float
    start: int
    first_step: int = 0
    last_step: int = 0
    is_part: bool = False


class Book:
    """Books intervals of all starts, in their order; `pieces` follow one upon the other without holes."""

    def __init__(self, starts: Sequence[ledger.Start]):
        self.pieces: list[Piece] = []
        self.warnings: list[str] = []
        for number, start in enumerate(starts):
            if number:
                self._gap(starts[number - 1], start, number)
            self._start(start, number)

    @property
    def seconds(self) -> float:
        return self.pieces[-1].at + self.pieces[-1].seconds if self.pieces else 0.0

    def seconds_by_phase(self) -> dict[str, float]:
        """In the order of ORDER, without phases that did not occur."""
        found: dict[str, float] = {}
        for piece in self.pieces:
            found[piece.phase] = found.get(piece.phase, 0.0) + piece.seconds
        names = [*ORDER, *(name for name in found if name not in ORDER)]
        return {name: found[name] for name in names if name in found}

    def lost_steps(self) -> int:
        lost = [p for p in self.pieces if p.phase == LOST and p.last_step and not p.is_part]
        return sum(piece.last_step - piece.first_step + 1 for piece in lost)

    def _add(self, phase: str, seconds: float, start: int, first: int = 0, last: int = 0) -> None:
        self.pieces.append(Piece(phase, self.seconds, seconds, start, first, last))

    def _gap(self, before: ledger.Start, after: ledger.Start, number: int) -> None:
        gap = after.created - before.time
        if gap < 0:
            if gap < -_JUMP_SECONDS:
                self.warnings.append(
                    f"start {number + 1} was created {-gap:.1f} s before start {number} wrote its last line: "
                    "their clocks differ"
                )
            return
        self._add(IDLE, gap, number)

    def _start(self, start: ledger.Start, number: int) -> None:
        self._look_for_jumps(start, number)
        done = None  # the newest step that is done and not lost; None until it is known
        for each in start.intervals:
            if each.from_step is not None:
                self._lose_from(each.from_step + 1)
                done = each.from_step
            if each.phase != "step":
                self._add(each.phase, each.seconds, number)
            else:
                if each.first_step and (done is None or each.first_step <= done):
                    self._lose_from(each.first_step)
                next_step = (done or 0) + 1
                first, last = each.first_step or next_step, each.last_step or next_step
                kept = each.finished_seconds if each is start.intervals[-1] else each.seconds
                if kept:
                    self._add("step", kept, number, first, last)
                    self.pieces[-1].is_part = each.last_step is None
                if each.seconds > kept:
                    self._add(LOST, each.seconds - kept, number)
            done = done if each.last_step is None else each.last_step

    def _look_for_jumps(self, start: ledger.Start, number: int) -> None:
        created = start.created
        for each in start.intervals:
            jump = each.time - each.begun_seconds - each.seconds - created
            if abs(jump) > _JUMP_SECONDS and each.phase != "unknown":
                created += jump
                self.warnings.append(
                    f"the wall clock jumped by {jump:+.1f} s during start {number + 1}"
                )

    def _lose_from(self, step: int) -> None:
        """Steps from `step` on, done so far, will be done again."""
        pieces = []
        for piece in self.pieces:
            if piece.phase != "step" or piece.last_step < step:
                pieces.append(piece)
                continue
            num_kept = max(step - piece.first_step, 0)
            num_lost = piece.last_step - piece.first_step + 1 - num_kept
            kept = piece.seconds * num_kept / (num_kept + num_lost)
            if num_kept:
                pieces.append(dataclasses.replace(piece, seconds=kept, last_step=step - 1))
            pieces.append(
                dataclasses.replace(
                    piece,
                    phase=LOST,
                    at=piece.at + kept,
                    seconds=piece.seconds - kept,
                    first_step=piece.first_step + num_kept,
                )
            )
        self.pieces = pieces


def account(model_dir: Path) -> tuple[dict[str, Any], Book]:
    """What --json prints. BadInput if there is no ledger, or it cannot be read."""
    path = model_dir / ledger.FILE_NAME
    if not path.is_file():
        what = f"has no {path.name}" if model_dir.is_dir() else "is no folder"
        raise BadInput(f"{model_dir} {what}: is it the MODEL_DIR of a run?")
    journal_path = model_dir / "journal.jsonl"
    with one_line_errors(f"cannot read {model_dir}"):
        starts, bad = ledger.read_ledger(path)
        journal, bad_journal = read_lines(journal_path)
    if not starts:
        raise BadInput(f"{path} has no line that can be read")
    book = Book(starts)
    book.warnings += [
        ledger.lines_text(*each) for each in ((path, bad), (journal_path, bad_journal)) if each[1]
    ]
    endings = ledger.ends(starts, journal)
    by_phase = book.seconds_by_phase()
    lost = collections.defaultdict(float)
    for piece in book.pieces:
        lost[piece.start] += piece.seconds if piece.phase == LOST else 0.0
    shown = []
    for number, (start, ending) in enumerate(zip(starts, endings, strict=True)):
        steps = [each for each in start.intervals if each.last_step]
        shown.append({
            "number": number + 1, "created": start.created, "host": start.host, "pid": start.pid,
            "seconds": start.seconds, "first_step": steps[0].first_step if steps else None,
            "last_step": start.last_step, "end": ending, "lost_seconds": lost[number],
        })  # fmt: skip
    found = {
        "model_dir": str(model_dir), "from": starts[0].created, "to": starts[-1].time,
        "seconds": book.seconds, "seconds_by_phase": by_phase,
        "goodput": by_phase.get("step", 0.0) / book.seconds if book.seconds else 0.0,
        "lost_steps": book.lost_steps(), "last_step": starts[-1].last_step,
        "num_starts": len(starts), "starts": shown, "warnings": book.warnings,
    }  # fmt: skip
    return found, book


def table(found: dict[str, Any]) -> str:
    """For a person."""
    total = found["seconds"]
    lines = [
        f"{found['model_dir']}: {_utc(found['from'])} to {_utc(found['to'])} UTC, {ledger.duration(total)}, "
        f"starts: {found['num_starts']} ({ledger.counted([s['end'] for s in found['starts']])})"
    ]
    for phase, seconds in found["seconds_by_phase"].items():
        lines.append(
            f"  {phase:<10}{ledger.duration(seconds):>16}{seconds / max(total, 1e-9):>9.2%}"
        )
    lost = f"; {found['lost_steps']:,} steps were done again" if found["lost_steps"] else ""
    lines.append(f"goodput {found['goodput']:.2%}: steps that count, of all the time{lost}")
    shown = found["starts"][-NUM_SHOWN:]
    lines.append(
        "starts:" if len(shown) == found["num_starts"] else f"the newest {NUM_SHOWN} starts:"
    )
    for each in shown:
        steps = f"{each['first_step']}-{each['last_step']}" if each["last_step"] else "none"
        seconds = each["lost_seconds"]
        lost = f"  lost {ledger.duration(seconds)}" if seconds >= 0.05 else ""
        lines.append(
            f"  {each['number']:>3}  {_utc(each['created'])}  {each['host']} pid {each['pid']}  "
            f"{ledger.duration(each['seconds'])}  steps {steps}  {each['end']}{lost}"
        )
    return "\n".join(lines)


def _utc(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"


# ---- picture ----


def check_plot(path: str) -> None:
    """BadInput for a picture that could not be written, before anything is read."""
    if Path(path).suffix not in (".png", ".svg", ".pdf"):
        raise BadInput(f"--plot={path}: pictures end in .png, .svg, .pdf")
    if not Path(path).resolve().parent.is_dir():
        raise BadInput(f"--plot={path}: there is no folder {Path(path).parent}")
    try:
        import matplotlib
    except ImportError as error:
        raise BadInput(f"--plot needs matplotlib: pip install 'bloomjax[plot]' ({error})") from None
    matplotlib.use("Agg")


def plot(found: dict[str, Any], book: Book, path: str) -> None:
    """Steps over time, below them the phases on the same axis, beside them the share of each phase."""
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(12, 5.2), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(2.1, 1), height_ratios=(5, 1))
    steps = figure.add_subplot(grid[0, 0])
    strip = figure.add_subplot(grid[1, 0], sharex=steps)
    shares = figure.add_subplot(grid[:, 1])
    for axis in (steps, strip, shares):
        axis.spines[["top", "right"]].set_visible(False)
    unit, unit_seconds = _unit(book.seconds)
    _plot_steps(steps, book, unit_seconds)
    by_phase = found["seconds_by_phase"]
    for phase in by_phase:
        spans = [
            (p.at / unit_seconds, p.seconds / unit_seconds) for p in book.pieces if p.phase == phase
        ]
        strip.broken_barh(spans, (0, 1), color=_colour(phase), linewidth=0)
    strip.set(
        yticks=[], xlabel=f"{unit} since {_utc(found['from'])} UTC", ylabel="phase", ylim=(0, 1)
    )
    strip.set_xlim(0, book.seconds / unit_seconds)
    names = list(by_phase)[::-1]
    total = max(book.seconds, 1e-9)
    widths = [by_phase[name] / total for name in names]
    shares.barh(
        names, widths, color=[_colour(name) for name in names], edgecolor="#666666", linewidth=0.4
    )
    for place, (name, width) in enumerate(zip(names, widths, strict=True)):
        text = f" {width:.1%}  {ledger.duration(by_phase[name])}"
        shares.text(width, place, text, va="center", fontsize=9)
    shares.set(xlim=(0, 1.55 * max(widths)), xticks=[], title=f"Goodput {found['goodput']:.1%}")
    shares.spines["bottom"].set_visible(False)
    num = found["num_starts"]
    name = Path(found["model_dir"]).resolve().name
    steps.set_title(
        f"{name}: {num} start{'s' if num > 1 else ''} in {ledger.duration(book.seconds)}"
    )
    beside = Path(path).with_name(f".{Path(path).name}{Path(path).suffix}")
    with one_line_errors(f"cannot write {path}"):
        figure.savefig(beside, dpi=110)
        beside.rename(path)
    pyplot.close(figure)


def _plot_steps(axis: Any, book: Book, unit_seconds: float) -> None:
    """Each stretch of steps as a slanted line; white between them, where nothing was trained."""
    labelled = set()
    for piece in book.pieces:
        if piece.phase == IDLE:
            at, end = piece.at / unit_seconds, (piece.at + piece.seconds) / unit_seconds
            axis.axvspan(at, end, color=_colour(IDLE), alpha=0.4, linewidth=0)
        if not piece.last_step or piece.is_part:
            continue
        label = {"step": "steps that count", LOST: "steps done again later"}[piece.phase]
        axis.plot(
            [piece.at / unit_seconds, (piece.at + piece.seconds) / unit_seconds],
            [piece.first_step - 1, piece.last_step],
            color=_colour(piece.phase),
            linewidth=1.8,
            solid_capstyle="butt",
            label=None if label in labelled else label,
        )
        labelled.add(label)
    begun = {piece.start: piece.at for piece in reversed(book.pieces) if piece.phase != IDLE}
    places = [at / unit_seconds for at in begun.values()]
    axis.plot(places, [0] * len(places), "^", color="black", clip_on=False, label="starts")
    axis.set(ylabel="step", ylim=(0, None))
    axis.grid(True, alpha=0.25, linewidth=0.6)
    axis.tick_params(labelbottom=False)
    axis.legend(frameon=False, loc="upper left")


def _colour(phase: str) -> str:
    return _COLOURS.get(phase, "#999999")


def _unit(seconds: float) -> tuple[str, float]:
    if seconds >= 3 * 86400:
        return "days", 86400.0
    if seconds >= 3 * 3600:
        return "hours", 3600.0
    return ("minutes", 60.0) if seconds >= 180 else ("seconds", 1.0)


def goodput() -> None:
    """Prints what the flags ask for."""
    if not _MODEL_DIR.value:
        raise BadInput("goodput needs the MODEL_DIR of a run: goodput.py MODEL_DIR")
    if _PLOT.value:
        check_plot(_PLOT.value)
    found, book = account(Path(_MODEL_DIR.value))
    if _PLOT.value:
        plot(found, book, _PLOT.value)
    print(json.dumps(found, ensure_ascii=False) if _JSON.value else table(found))
    for warning in book.warnings:
        print(f"bloomjax: {warning}", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    """The command, also with the arguments of a test."""
    program, *arguments = sys.argv if argv is None else argv
    if arguments and not arguments[0].startswith("-"):
        arguments[0] = f"--model_dir={arguments[0]}"
    config.call(goodput, [program, *arguments], _FLAGS)


if __name__ == "__main__":
    main()
