"""Runs that are killed with SIGKILL at random moments, each compared with a run that nobody has disturbed.

    python benchmarks/drill_kills.py [--runs 100] [--seed 0] [--only N ...] [--folder DIR] [--json FILE]

A run has 24 steps of a tiny model on two devices and saves every 4; half of them are one process, half are two, of
which one or both are killed. The moment is uniform over the time that an undisturbed run takes, from the start of the
process on; of every third run it lies inside a save: a random time after the folder of an unfinished checkpoint has
appeared, while it is there. Every fifth is killed again after its next start, every thirteenth has an empty folder of
compiled programs. Then the same command runs to its end, and `differences` says what is not as in the other run.

What was found different stays in DIR. Exit code 1 if there is any.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

import tiny_run  # noqa: E402
from cluster import Cluster, without_gloo  # noqa: E402
from etils import epath  # noqa: E402

from bloomjax import checkpoint_arrays, checkpoint_manifest  # noqa: E402
from bloomjax.checkpoint_folder import TEMPORARY  # noqa: E402
from bloomjax.errors import EXIT_RESTART  # noqa: E402
from bloomjax.files import write_whole  # noqa: E402
from bloomjax.journal import read_lines  # noqa: E402
from bloomjax.ledger import FILE_NAME as LEDGER  # noqa: E402

NUM_STEPS, SAVE_EVERY_STEPS = 24, 4
FLAGS = (
    "--gin.train.mesh=@MeshShape()", f"--gin.TRAIN_STEPS={NUM_STEPS}", "--gin.EVAL_EVERY_STEPS=12",
    f"--gin.SAVE_EVERY_STEPS={SAVE_EVERY_STEPS}", "--gin.fault.slow_host_seconds=0.05",
)  # fmt: skip
LIMIT_SECONDS = 180.0  # for one start
LEAVE_SECONDS = 130.0  # for those who have lost a peer: Cluster.heartbeat_timeout_seconds is 100
_TIMES = ("seconds", "tokens_per_second", "mfu")
_EVENTS = {"start", "save", "energy", "fault", "done", "lost_peer"}


# ---- plans ----


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is done to a run: how many processes, whether its first kill lies inside a save, and so on."""

    number: int
    num_processes: int
    in_save: bool
    is_cold: bool = False
    num_kills: int = 1
    seed: int = 0


def plans(num_runs: int, seed: int) -> list[Plan]:
    return [
        Plan(
            number=n,
            num_processes=1 + n % 2,
            in_save=n // 2 % 3 == 0,
            is_cold=n % 13 == 12,
            num_kills=1 + (n % 5 == 4),
            seed=seed,
        )
        for n in range(num_runs)
    ]


# ---- one start ----


class Start:
    """The processes of one start of the command."""

    def __init__(self, text: tiny_run.Text, model_dir: Path, num_processes: int, cache: Path):
        flags = (*FLAGS, f"--gin.train.compilation_cache_dir='{cache}'")
        self._model_dir = model_dir
        self._ledgers = len(_ledger_runs(model_dir))
        self._started = time.monotonic()
        self.job = Cluster(tiny_run.command(text, model_dir, *flags), num_processes, num_devices=2)

    def seconds(self) -> float:
        return time.monotonic() - self._started

    def is_running(self) -> bool:
        return any(process.poll() is None for process in self.job.processes)

    def pause(self) -> bool:
        """Sleeps a moment; False if there is nothing to wait for any more."""
        time.sleep(0.002)
        return self.is_running() and self.seconds() < LIMIT_SECONDS

    def kill(self, victims: list[int]) -> dict[str, Any]:
        """kill -9, and what the run was doing."""
        seconds, saving = self.seconds(), unfinished(self._model_dir)
        for victim in victims:
            self.job.processes[victim].send_signal(signal.SIGKILL)
        runs = _ledger_runs(self._model_dir)
        phase = list(runs.values())[-1] if len(runs) > self._ledgers else "start"
        steps = [record["step"] for record in _records(self._model_dir)]
        return {
            "seconds": round(seconds, 3), "victims": victims, "phase": phase,
            # What an earlier kill has left lies there until it is restored.
            "in_save": bool(saving) and phase not in ("start", "restore"), "step": max(steps, default=0),
        }  # fmt: skip

    def end(self, limit_seconds: float = LIMIT_SECONDS) -> tuple[list[int], str]:
        """Exit codes and stderr, without what was not ended by itself in time: that gets -SIGABRT, and its stacks."""
        deadline = time.monotonic() + limit_seconds
        while self.is_running() and time.monotonic() < deadline:
            time.sleep(0.02)
        for process in self.job.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGABRT)
        results = self.job.end(20)
        err = "".join(without_gloo(err) for _, _, err in results)
        return [code for code, _, _ in results], err


def unfinished(model_dir: Path) -> list[str]:
    """Folders of checkpoints that are being written."""
    with contextlib.suppress(FileNotFoundError):
        return [n for n in os.listdir(model_dir / "checkpoints") if n.endswith(TEMPORARY)]
    return []


def _ledger_runs(model_dir: Path) -> dict[str, str]:
    """The phase that each start was in last."""
    lines, _ = read_lines(model_dir / LEDGER)
    return {line["run"]: line["phase"] for line in lines}


def _records(model_dir: Path) -> list[dict[str, Any]]:
    return read_lines(model_dir / "metrics.jsonl")[0]


def wait_for_moment(start: Start, seconds: float) -> bool:
    """Until the start is that old; False if it has ended before."""
    while start.seconds() < seconds:
        if not start.pause():
            return False
    return start.is_running()


def wait_for_save(start: Start, model_dir: Path, rng: random.Random, save_seconds: float) -> bool:
    """Until a random moment within a random save; False if the run has ended before."""
    to_pass = rng.randrange(NUM_STEPS // SAVE_EVERY_STEPS)
    seen: set[str] = set()
    while start.pause():
        new = set(unfinished(model_dir)) - seen
        if not new:
            continue
        seen |= new
        if len(seen) <= to_pass:
            continue
        end = time.monotonic() + rng.uniform(0, save_seconds)
        while time.monotonic() < end:
            time.sleep(0.001)
        if new & set(unfinished(model_dir)):
            return start.is_running()
    return False


# ---- one run ----


@dataclasses.dataclass
class Bench:
    """Text, folder and undisturbed runs; `seconds` of a start and of a save, by (processes, is cold)."""

    text: tiny_run.Text
    folder: Path
    undisturbed: dict[int, Path] = dataclasses.field(default_factory=dict)
    seconds: dict[tuple[int, bool], float] = dataclasses.field(default_factory=dict)
    save_seconds: dict[int, float] = dataclasses.field(default_factory=dict)

    def cache(self, num_processes: int) -> Path:
        return self.folder / f"xla-{num_processes}"

    def prepare(self, num_processes: int, twice: bool = True) -> None:
        """The undisturbed run, first cold and then warm; both must be equal."""
        for is_cold in (True, False) if twice else (True,):
            model_dir = self.folder / f"undisturbed-{num_processes}-{is_cold}"
            start = Start(self.text, model_dir, num_processes, self.cache(num_processes))
            saves: dict[str, list[float]] = {}
            while start.pause():
                for name in unfinished(model_dir):
                    saves.setdefault(name, []).append(time.monotonic())
            self.seconds[num_processes, is_cold] = start.seconds()
            codes, err = start.end()
            if any(codes):
                raise SystemExit(f"the undisturbed run ended with {codes}: {err}")
            self.save_seconds[num_processes] = statistics.median(
                times[-1] - times[0] for times in saves.values()
            )
            if not is_cold:
                found = differences(model_dir, self.undisturbed[num_processes])
                if found:
                    raise SystemExit(f"two undisturbed runs differ: {found}")
            self.undisturbed[num_processes] = model_dir

    def drill(self, plan: Plan) -> dict[str, Any]:
        """Kills, goes on, compares: what happened, with the `problems` there were."""
        rng = random.Random(f"{plan.seed}/{plan.number}")
        for attempt in range(8):
            model_dir = self.folder / f"run-{plan.number}-{attempt}"
            row = self._attempt(plan, model_dir, rng)
            if not row["problems"]:
                shutil.rmtree(model_dir, ignore_errors=True)
            if row["problems"] or row["kills"]:
                return dataclasses.asdict(plan) | {"attempts": attempt + 1} | row
        raise SystemExit(f"{plan}: 8 runs ended before they were killed")

    def _attempt(self, plan: Plan, model_dir: Path, rng: random.Random) -> dict[str, Any]:
        cache = self.cache(plan.num_processes)
        if plan.is_cold:
            cache = self.folder / f"{model_dir.name}.xla"
        began, kills, problems, num_starts, codes = time.monotonic(), [], [], 0, []
        while not (codes and set(codes) == {0}) and not problems and num_starts < 5:
            num_starts += 1
            is_cold = plan.is_cold and num_starts == 1
            start = Start(self.text, model_dir, plan.num_processes, cache)
            is_killed = len(kills) < plan.num_kills and self._wait(
                plan, start, model_dir, rng, is_first=not kills, is_cold=is_cold
            )
            if not is_killed:
                codes, err = start.end()
                if set(codes) != {0}:
                    problems.append(f"start {num_starts} ended with {codes}: {err[-2000:]}")
                continue
            victims = rng.choice([[0], [1], [0, 1]]) if plan.num_processes > 1 else [0]
            kill = start.kill(victims)
            kills.append(kill)
            problems += self._after_kill(start, kill, model_dir)
            if not problems and not kill["victims"]:
                codes = [0]
        if plan.is_cold:
            shutil.rmtree(cache, ignore_errors=True)
        kills = [kill for kill in kills if kill["victims"]]
        if not problems and kills:
            problems += differences(model_dir, self.undisturbed[plan.num_processes])
            problems += wrong_starts(model_dir, kills)
        superseded, _ = read_lines(model_dir / "metrics.superseded.jsonl")
        return {
            "kills": kills, "num_starts": num_starts, "problems": problems,
            "steps_done_again": sum(record["step"] > 0 for record in superseded),
            "seconds": round(time.monotonic() - began, 1),
        }  # fmt: skip

    def _wait(self, plan, start, model_dir, rng, *, is_first: bool, is_cold: bool) -> bool:
        if plan.in_save and is_first:
            save_seconds = self.save_seconds[plan.num_processes]
            return wait_for_save(start, model_dir, rng, save_seconds)
        seconds = self.seconds[plan.num_processes, is_cold]
        return wait_for_moment(start, rng.uniform(0, seconds))

    def _after_kill(self, start: Start, kill: dict[str, Any], model_dir: Path) -> list[str]:
        """Lets the others end; adds to `kill` how, and from which checkpoint the next start should go on."""
        survivors = [n for n in range(len(start.job.processes)) if n not in kill["victims"]]
        # Who had not joined yet waits for the peer, and a launcher ends it.
        waits = LEAVE_SECONDS if kill["phase"] != "start" else 5.0
        before = time.monotonic()
        codes, err = start.end(waits)
        kill |= {"codes": codes, "leave_seconds": round(time.monotonic() - before, 2)}
        kill["is_ended_by_launcher"] = bool(survivors) and kill["leave_seconds"] > waits
        kill["num_announced"] = len(_announced(model_dir))
        kill["newest"] = max(_steps(model_dir), default=0)
        if all(codes[n] == 0 for n in kill["victims"]):  # it had ended just before
            kill["victims"] = []
            return []
        problems = []
        for n in survivors:
            allowed = (EXIT_RESTART, -signal.SIGABRT, 0 if kill["step"] == NUM_STEPS else None)
            if codes[n] not in allowed:
                problems.append(f"process {n} ended with {codes[n]} after the kill: {err[-2000:]}")
        if kill["is_ended_by_launcher"] and kill["phase"] != "start":
            problems.append(f"processes {survivors} did not end by themselves: {err[-6000:]}")
        return problems


def _steps(model_dir: Path) -> list[int]:
    folder = model_dir / "checkpoints"
    names = os.listdir(folder) if folder.exists() else []
    return sorted(int(name) for name in names if name.isdecimal())


def _announced(model_dir: Path) -> list[int]:
    """After which step each start went on."""
    lines, _ = read_lines(model_dir / "journal.jsonl")
    return [line["step"] for line in lines if line["event"] == "start"]


def wrong_starts(model_dir: Path, kills: list[dict[str, Any]]) -> list[str]:
    """Starts that did not go on from the newest checkpoint that was whole."""
    steps = _announced(model_dir)
    wanted = {kill["num_announced"]: kill["newest"] for kill in kills}
    return [
        f"a start went on after step {steps[n]}, the newest checkpoint was {newest}"
        for n, newest in wanted.items()
        if n < len(steps) and steps[n] != newest
    ]


# ---- comparing ----


def differences(model_dir: Path, expected: Path) -> list[str]:
    """In what a run is not the undisturbed one, a line each: records, checkpoints to the bit, what lies about."""
    checks: list[Callable[[Path, Path], Iterator[str]]] = [
        different_records, different_folders, different_positions, different_arrays, odd_lines
    ]  # fmt: skip
    found = []
    for check in checks:
        try:
            found += check(model_dir, expected)
        except Exception as error:
            found.append(f"{check.__name__}: {type(error).__name__}: {error}")
    return found


def _timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in _TIMES}


def different_records(model_dir: Path, expected: Path) -> Iterator[str]:
    """Each step once and in order, with the same bits; also those that were done again."""
    lines = (model_dir / "metrics.jsonl").read_text().splitlines()
    mine, wanted = list(map(json.loads, lines)), _records(expected)
    if [r["step"] for r in mine] != list(range(NUM_STEPS + 1)):
        yield f"metrics.jsonl has the steps {[r['step'] for r in mine]}"
    by_step = {record["step"]: _timeless(record) for record in wanted}
    for record in mine:
        if _timeless(record) != by_step.get(record["step"]):
            yield f"metrics.jsonl: {record}, undisturbed {by_step.get(record['step'])}"
    for record in read_lines(model_dir / "metrics.superseded.jsonl")[0]:
        other = by_step[record["step"]]
        for name in ("loss", "grad_norm", "samples"):
            if record.get(name) != other.get(name):
                yield f"{name} of step {record['step']} was {record} when it was done first"


def different_folders(model_dir: Path, expected: Path) -> Iterator[str]:
    """The same checkpoints, and no leftovers anywhere."""

    def names(folder: Path) -> set[str]:
        found = {path.name for path in folder.iterdir()} - {"metrics.superseded.jsonl"}
        return {name for name in found if not name.startswith("events.out.tfevents.")}

    for part in (".", "checkpoints", "vocabulary"):
        there, wanted = names(model_dir / part), names(expected / part)
        if there != wanted:
            yield f"{part} has {sorted(there - wanted)} and lacks {sorted(wanted - there)}"
    for path in (expected / "vocabulary").iterdir():
        if (model_dir / "vocabulary" / path.name).read_bytes() != path.read_bytes():
            yield f"vocabulary/{path.name} differs"


def position(model_dir: Path, step: int) -> dict[str, Any]:
    """Of a checkpoint, but for what depends on the clock."""
    path = model_dir / "checkpoints" / str(step) / "position" / "metadata"
    found = json.loads(path.read_text())
    found.pop("checksum")
    return found | {"record": _timeless(found["record"] or {})}


def different_positions(model_dir: Path, expected: Path) -> Iterator[str]:
    """Hash chain over the samples, guard, fingerprints of every leaf; files as the manifest says."""
    for step in _steps(expected):
        mine, wanted = position(model_dir, step), position(expected, step)
        for name in sorted(mine | wanted):
            if mine.get(name) != wanted.get(name):
                yield (
                    f"checkpoint {step}: {name} is {mine.get(name)}, undisturbed {wanted.get(name)}"
                )
        folder = epath.Path(model_dir / "checkpoints" / str(step))
        entries = checkpoint_manifest.read(folder)
        assert entries, f"checkpoint {step} has no manifest"
        yield from (
            f"checkpoint {step}: {x}" for x in checkpoint_manifest.problems(folder, entries)
        )


def different_arrays(model_dir: Path, expected: Path) -> Iterator[str]:
    """Of the last checkpoint, read and compared bit by bit."""
    paths = [epath.Path(each / "checkpoints" / str(NUM_STEPS)) for each in (model_dir, expected)]
    kinds = [position(each, NUM_STEPS)["arrays"] for each in (model_dir, expected)]
    for each in checkpoint_arrays.differences((paths[0], paths[1]), (kinds[0], kinds[1])):
        if not each.is_equal:
            yield f"{each.name}: {each.num_equal} of {each.num_elements} elements are equal"


def odd_lines(model_dir: Path, expected: Path) -> Iterator[str]:
    """Of the journal and the ledger: what cannot be read, and what should not have happened."""
    del expected
    for name in ("journal.jsonl", LEDGER):
        lines, unreadable = read_lines(model_dir / name)
        if unreadable:
            yield f"{name}: lines {unreadable} cannot be read"
        for line in lines:
            if name == "journal.jsonl" and line["event"] not in _EVENTS:
                yield f"journal: {line}"


# ---- all ----


def totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    kills = [kill | {"of": row["num_processes"]} for row in rows for kill in row["kills"]]
    survived = [kill for kill in kills if 0 < len(kill["victims"]) < kill["of"]]
    waits = [k["leave_seconds"] for k in survived if k["phase"] != "start"]
    return {
        "runs": len(rows),
        "runs_equal": sum(not row["problems"] for row in rows),
        "runs_by_processes": Counter(str(row["num_processes"]) for row in rows),
        "runs_with_first_kill_in_save": sum(
            row["in_save"] and row["kills"][0]["in_save"] for row in rows if row["kills"]
        ),
        "runs_with_empty_cache": sum(row["is_cold"] for row in rows),
        "kills": len(kills),
        "kills_in_save": sum(kill["in_save"] for kill in kills),
        "kills_by_phase": Counter(kill["phase"] for kill in kills),
        "kills_of_two_processes_by_victims": Counter(
            " and ".join(map(str, kill["victims"])) for kill in kills if kill["of"] > 1
        ),
        "exit_codes_of_survivors": Counter(
            str(code) for kill in survived for n, code in enumerate(kill["codes"])
            if n not in kill["victims"]
        ),
        "starting_survivors_ended_by_launcher": sum(k["is_ended_by_launcher"] for k in survived),
        "longest_seconds_until_survivors_left": max(waits, default=None),
        "starts": sum(row["num_starts"] for row in rows),
        "steps_done_again": sum(row["steps_done_again"] for row in rows),
    }  # fmt: skip


def report(
    bench: Bench, rows: list[dict[str, Any]], seed: int, load: list[float], minutes: float
) -> dict[str, Any]:
    versions = {name: metadata.version(name) for name in ("jax", "orbax-checkpoint", "tensorstore")}
    seconds = {
        f"{n}{', empty cache' if is_cold else ''}": round(each, 2)
        for (n, is_cold), each in bench.seconds.items()
    }
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load": [load, [round(x, 1) for x in os.getloadavg()]],
        "versions": versions | {"python": platform.python_version()},
        "seed": seed,
        "minutes": round(minutes, 1),
        "undisturbed_seconds": seconds,
        "save_seconds": {str(n): round(each, 3) for n, each in bench.save_seconds.items()},
        "totals": totals(rows),
        "runs": rows,
    }


def line_of(row: dict[str, Any]) -> str:
    kills = "; ".join(
        f"{'+'.join(map(str, kill['victims']))} at {kill['seconds']:.2f} s in {kill['phase']}"
        f"{' (saving)' if kill['in_save'] else ''} at step {kill['step']}, goes on at {kill['newest']}"
        for kill in row["kills"]
    )
    cold = ", cold" if row["is_cold"] else ""
    verdict = "equal" if not row["problems"] else "DIFFERS " + " | ".join(row["problems"])
    return f"{row['number']:3}  {row['num_processes']}{cold}  killed {kills}  {verdict}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of runs")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary one by default")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    os.environ["PYTHONFAULTHANDLER"] = "1"  # who hangs shows where, when it is aborted
    folder = options.folder or Path(tempfile.mkdtemp(prefix="drill_kills."))
    (folder / "text").mkdir(parents=True)
    began = time.monotonic()
    bench = Bench(tiny_run.Text(folder / "text"), folder)
    load = [round(x, 1) for x in os.getloadavg()]
    chosen = plans(options.runs, options.seed)
    if options.only is not None:
        chosen = [plan for plan in chosen if plan.number in options.only]
    for num_processes in sorted({plan.num_processes for plan in chosen}):
        bench.prepare(num_processes)
    rows = []
    for plan in chosen:
        rows.append(bench.drill(plan))
        print(line_of(rows[-1]), flush=True)
        if options.json:  # so far: a drill is long
            found = report(bench, rows, options.seed, load, (time.monotonic() - began) / 60)
            write_whole(options.json, (json.dumps(found, indent=1) + "\n").encode())
    found = totals(rows)
    print(json.dumps(found, indent=2))
    minutes = (time.monotonic() - began) / 60
    print(
        f"{found['runs_equal']} of {found['runs']} equal to the undisturbed run; {minutes:.1f} min"
    )
    if found["runs_equal"] == found["runs"] and options.folder is None:
        shutil.rmtree(folder)
    elif found["runs_equal"] < found["runs"]:
        print(f"what differs lies in {folder}")
    return int(found["runs_equal"] < found["runs"])


if __name__ == "__main__":
    sys.exit(main())
