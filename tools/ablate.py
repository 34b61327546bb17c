"""Compares gin overlays: trains each with each seed on the same data, and says which differences are more than noise.

    python tools/ablate.py --gin_file=tiny.gin --gin_file=text_files.gin --gin.TEXT_DIR="'my_text'" \\
        --overlays=ablations/alibi.gin,ablations/learned.gin,ablations/rotary.gin --seeds=1,2 --out=runs/positions

Runs go one after the other, each a `python -m bloomjax.train` of its own with OUT/NAME-SEED.gin, MODEL_DIR
OUT/NAME-SEED and log OUT/NAME-SEED.log. The same command goes on where it was ended; a finished run is not started
again, and more overlays or seeds may be added. `a.gin+b.gin` is two overlays at once, `base` none.

Written at the end: OUT/table.md, OUT/results.json, OUT/plot.png. Results of `python -m bloomjax.evaluate --tasks` as
JSON in the folder of each run are rows of the table, too, with the next start of this command. --lengths=1,2 adds the
held-out loss in windows of so many times the training length.
"""

import dataclasses
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import ablate_lengths
import ablate_plan
import ablate_plots
import ablate_table
import scaling_plots
from ablate_plan import Run
from ablate_table import Result
from absl import flags

from bloomjax import config
from bloomjax.errors import EXIT_RESTART, BadInput, Restart
from bloomjax.files import write_whole
from bloomjax.preflight import prepare_in_subprocess
from bloomjax.token_store import store_exists

_FLAGS = flags.FlagValues()
_OVERLAYS = flags.DEFINE_string(
    "overlays", "", "Gin files, A,B+C,base: each is an experiment.", flag_values=_FLAGS
)
_SEEDS = flags.DEFINE_string("seeds", "1,2", "Of initial weights and dropout.", flag_values=_FLAGS)
_OUT = flags.DEFINE_string(
    "out", None, "Folder of the runs and the table; may be there to go on.", flag_values=_FLAGS
)
_TOKENS = flags.DEFINE_integer(
    "tokens", None, "Of each run, cosine included; None for what the gin files say.",
    flag_values=_FLAGS, lower_bound=1,
)  # fmt: skip
_LENGTHS = flags.DEFINE_string(
    "lengths", "", "Held-out loss at these multiples of the training length.", flag_values=_FLAGS
)


def ablate() -> None:
    """What the flags ask for. BadInput before anything is trained, where that can be."""
    overlays = ablate_plan.parse_overlays(_OVERLAYS.value)
    seeds = ablate_plan.parse_numbers("seeds", _SEEDS.value)
    multiples = ablate_plan.parse_numbers("lengths", _LENGTHS.value) if _LENGTHS.value else []
    if 0 in multiples or (multiples and 1 not in multiples):
        raise BadInput(f"--lengths={_LENGTHS.value}: give 1 and multiples above it, such as 1,2")
    if not _OUT.value:
        raise BadInput("--out must be given: the folder of the runs and the table")
    scaling_plots.pyplot()  # or it is missing after hours of training
    folder = Path(_OUT.value)
    runs = ablate_plan.plan(overlays, seeds, folder, _TOKENS.value)
    ablate_plan.write(runs)
    _write_list(runs, folder)
    results = train_all(runs)
    if multiples:
        results = [
            dataclasses.replace(
                each, lengths=ablate_lengths.measure(run.model_dir, sorted(multiples))
            )
            for run, each in zip(runs, results, strict=True)
        ]
    report(results, folder)


def _write_list(runs: Sequence[Run], folder: Path) -> None:
    """OUT/runs.json, for people and programs: what runs there are, those of earlier commands included."""
    path = folder / "runs.json"
    there = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    now = [
        {
            "run": run.name, "overlay": run.overlay, "seed": run.seed, "model_dir": str(run.model_dir),
            "command": shlex.join(_command(run)[1:]),
        }
        for run in runs
    ]  # fmt: skip
    kept = [each for each in there if each["run"] not in {run.name for run in runs}]
    write_whole(path, json.dumps([*kept, *now], indent=1).encode() + b"\n")


def _command(run: Run) -> list[str]:
    return [sys.executable, "-m", "bloomjax.train", f"--gin_file={run.gin_file}"]


def train_all(runs: Sequence[Run]) -> list[Result]:
    """Results of all runs; trains those that are not finished."""
    found: list[Result] = []
    is_prepared = False
    for number, run in enumerate(runs, 1):
        label = f"{number}/{len(runs)} {run.name}"
        result = ablate_table.read_result(run.overlay, run.seed, run.model_dir)
        if result:
            print(f"{label}: done before, held-out loss {result.loss:.4f}", flush=True)
        else:
            if not is_prepared:
                _prepare()
                is_prepared = True
            started = time.monotonic()
            _train(run)
            result = ablate_table.read_result(run.overlay, run.seed, run.model_dir)
            if result is None:
                raise BadInput(f"{run.model_dir} is not finished: see {_log(run)}")
            seconds = time.monotonic() - started
            print(f"{label}: held-out loss {result.loss:.4f}, {seconds:.0f} s", flush=True)
        found.append(result)
    return found


def _prepare() -> None:
    """Vocabulary and store, once for all runs, as `train` makes them. Restart or BadInput has been explained by it."""
    try:
        config.build("train.prepare")
    except BadInput:  # not bound: the store has to be there
        return
    has_text = config.build("train.text_dir") is not None
    if has_text or not store_exists(config.build("TrainData.store_dir")):
        if code := prepare_in_subprocess():
            raise BadInput(
                f"python -m bloomjax.prepare ended with code {code}; nothing was trained"
            )


def _log(run: Run) -> Path:
    return run.gin_file.with_suffix(".log")


def _train(run: Run) -> None:
    """One run, from its last checkpoint on if it has one."""
    with _log(run).open("ab") as log:
        process = subprocess.Popen(_command(run), stdout=log, stderr=subprocess.STDOUT)
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_RESTART))
        try:
            code = process.wait()
        except BaseException:
            process.terminate()  # it saves, and the next start goes on from there
            process.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    if code == 0:
        return
    lines = _log(run).read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["(no output)"]  # fmt: skip
    said = f"{run.name} ended with code {code}: {lines[-1]} ({_log(run)})"
    if code == EXIT_RESTART:
        raise Restart(f"{said}; the same command goes on")
    raise BadInput(said)


def report(results: Sequence[Result], folder: Path) -> None:
    """Prints and writes the table, and draws the plot."""
    groups: dict[str, list[Result]] = {}
    for each in results:
        groups.setdefault(each.overlay, []).append(each)
    rows = ablate_table.rows(groups)
    text = "\n\n".join(
        [ablate_table.markdown(list(groups), rows), "\n".join(ablate_table.remarks(groups, rows))]
    )
    write_whole(folder / "table.md", text.encode() + b"\n")
    numbers = ablate_table.record(groups, rows)
    write_whole(folder / "results.json", json.dumps(numbers, indent=1).encode() + b"\n")
    ablate_plots.plot(groups, str(folder / "plot.png"))
    print(f"\n{text}\n\nwritten: {folder}/table.md, {folder}/results.json, {folder}/plot.png")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command, also with the arguments of a test."""
    config.call(ablate, argv, _FLAGS)


if __name__ == "__main__":
    main()
