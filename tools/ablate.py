"""Compares gin overlays: trains each with each seed on the same data, and says which differences are more than noise.

    python tools/ablate.py --gin_file=tiny.gin --gin_file=text_files.gin --gin.TEXT_DIR="'my_text'" \\
        --overlays=ablations/alibi.gin,ablations/learned.gin,ablations/rotary.gin --seeds=1,2 --out=runs/positions

Runs go one after the other, each a `python -m bloomjax.train` of its own with OUT/NAME-SEED.gin, MODEL_DIR
OUT/NAME-SEED and log OUT/NAME-SEED.log. The same command goes on where it was ended; a finished run is not started
again, and more overlays or seeds may be added. `a.gin+b.gin` is two overlays at once, `base` none.

Written at the end: OUT/table.md, OUT/results.json, OUT/plot.png. A run that failed is a line there; the others go on.
--tasks=A,B puts tasks of lm-evaluation-harness to each finished run, --beside=FILE adds a column of published results,
--lengths=1,2 the held-out loss in windows of so many times the training length.
"""

import dataclasses
import hashlib
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
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

from bloomjax import config, harness, results_table, task_presets
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
_TASKS = flags.DEFINE_string(
    "tasks", "", "Put to each finished run, as evaluate's --tasks.", flag_values=_FLAGS
)
_INCLUDE_PATH = flags.DEFINE_string(
    "include_path", None, "Folder with task files of your own.", flag_values=_FLAGS
)
_NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", 0, "Solved examples before each question.", flag_values=_FLAGS, lower_bound=0
)
_BESIDE = flags.DEFINE_multi_string(
    "beside", [], "A column: a file of evaluate's --output, or a *_agg.json of BigScience.",
    flag_values=_FLAGS,
)  # fmt: skip


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
    beside = [results_table.read_results(Path(path)) for path in _BESIDE.value]
    if twice := overlays.keys() & {column.name for column in beside}:
        raise BadInput(
            f"--beside and --overlays both have {min(twice)}; give that file another name"
        )
    if _TASKS.value:
        # Or they are missing after hours, too.
        harness.check_installed()
        harness.load_tasks(task_presets.expand(_TASKS.value), _INCLUDE_PATH.value)
    folder = Path(_OUT.value)
    runs = ablate_plan.plan(overlays, seeds, folder, _TOKENS.value)
    ablate_plan.write(runs)
    _write_list(runs, folder)
    results, failures = finish_all(runs)
    if not results:
        raise BadInput(f"none of the {len(runs)} runs is finished: {failures[0]}")
    if multiples:
        try:
            results = {
                run: dataclasses.replace(
                    each, lengths=ablate_lengths.measure(run.model_dir, sorted(multiples))
                )
                for run, each in results.items()
            }
        except BadInput as error:
            failures.append(f"--lengths: {error}")
    groups = {name: [r for r in results.values() if r.overlay == name] for name in overlays}
    report(groups, failures, beside, folder)
    if failures:
        raise BadInput(f"{len(failures)} failed, the rest is in {folder}/table.md: {failures[0]}")


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


def finish_all(runs: Sequence[Run]) -> tuple[dict[Run, Result], list[str]]:
    """Results of those that are finished, trained and evaluated where they were not; and a line for each failure."""
    found: dict[Run, Result] = {}
    failures: list[str] = []
    if not all(map(_read, runs)):
        _prepare()
    for number, run in enumerate(runs, 1):
        label = f"{number}/{len(runs)} {run.name}"
        before = after = ""
        try:
            if _read(run):
                before = "done before, "
            else:
                started = time.monotonic()
                _train(run)
                after = f", {time.monotonic() - started:.0f} s"
            if not (result := _read(run)):
                raise BadInput(f"{run.model_dir} is not finished: see {_log(run)}")
            found[run] = result
            print(f"{label}: {before}held-out loss {result.loss:.4f}{after}", flush=True)
            if _TASKS.value and _evaluate(run, result.step):
                found[run] = _read(run) or result
        except BadInput as error:
            failures.append(f"{run.name}: {error}")
            print(f"{label}: failed: {error}", flush=True)
    return found, failures


def _read(run: Run) -> Result | None:
    return ablate_table.read_result(run.overlay, run.seed, run.model_dir)


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
    _execute(run, _command(run))


def _evaluate(run: Run, step: int) -> bool:
    """The tasks of the flags, unless their results of this step are there; whether it was needed."""
    asked = [f"--tasks={_TASKS.value}", f"--num_fewshot={_NUM_FEWSHOT.value}"]
    if _INCLUDE_PATH.value:
        asked.append(f"--include_path={_INCLUDE_PATH.value}")
    digest = hashlib.sha256("\n".join(asked).encode()).hexdigest()[:8]
    output = run.model_dir / f"tasks-{step}-{digest}.json"
    if output.exists():
        return False
    asked += [f"--checkpoint={run.model_dir}", f"--step={step}", f"--output={output}"]
    _execute(run, [sys.executable, "-m", "bloomjax.evaluate", *asked])
    return True


def _execute(run: Run, command: Sequence[str]) -> None:
    """A command of a run; Restart or BadInput if it fails."""
    with _log(run).open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
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
    said = f"{command[2]} ended with code {code}: {lines[-1]} ({_log(run)})"
    if code == EXIT_RESTART:
        raise Restart(f"{run.name}: {said}; the same command goes on")
    raise BadInput(said)


def report(
    groups: Mapping[str, Sequence[Result]],
    failures: Sequence[str],
    beside: Sequence[results_table.Results],
    folder: Path,
) -> None:
    """Prints and writes the table, and draws the plot."""
    rows = ablate_table.rows(groups, beside)
    columns = [*groups, *(column.name for column in beside)]
    lines = [f"Failed: {line}" for line in failures] + ablate_table.remarks(groups, rows)
    text = "\n\n".join([ablate_table.markdown(columns, rows), "\n".join(lines)])
    write_whole(folder / "table.md", text.encode() + b"\n")
    numbers = ablate_table.record(groups, rows) | {"failures": list(failures)}
    write_whole(folder / "results.json", json.dumps(numbers, indent=1).encode() + b"\n")
    ablate_plots.plot(groups, str(folder / "plot.png"))
    print(f"\n{text}\n\nwritten: {folder}/table.md, {folder}/results.json, {folder}/plot.png")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command, also with the arguments of a test."""
    config.call(ablate, argv, _FLAGS)


if __name__ == "__main__":
    main()
