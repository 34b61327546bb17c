"""Whether a run is well, on one screen, and as an exit code for cron.

    python tools/status.py runs/tiny
    python tools/status.py --model_dir=runs/tiny --json

Exit code 0: alive, or finished; 3: stuck (a process is there, and nothing gets done); 4: no process, and not finished
(ended: it said why; dead: it did not); 1: bad input. It loads no JAX, takes no lock and writes nothing.

Stuck is a run without a finished step for --stuck_seconds; so is one whose save or evaluation takes that long and twice
as long as any before. To start, compile and restore it has half an hour.

The process is looked for by its number if it is on this host. On another host it is alive if it has written a sign of
life (one every 10 s, in goodput.jsonl) in the last two minutes.
"""

import json
import os
import re
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from absl import flags

from bloomjax import config, ledger
from bloomjax.errors import BadInput
from bloomjax.files import one_line_errors
from bloomjax.journal import read_lines

EXIT_STUCK, EXIT_NOT_RUNNING = 3, 4

_FLAGS = flags.FlagValues()
_MODEL_DIR = flags.DEFINE_string(
    "model_dir", None, "MODEL_DIR of a run; may also be the first argument.", flag_values=_FLAGS
)
_STUCK = flags.DEFINE_float(
    "stuck_seconds", None, "Without a finished step for so long it is stuck; default: 10 times the usual step, at "
    "least 300.", flag_values=_FLAGS,
)  # fmt: skip
_JSON = flags.DEFINE_bool("json", False, "One JSON object.", flag_values=_FLAGS)

# Of the journal what needs nobody's attention.
_ORDINARY = {"start", "restore", "save", "evaluate", "done", "energy"}
_MISSING_SECONDS = 12 * ledger.FLUSH_SECONDS
_SETUP_SECONDS = 1800.0
_DAY = 86400.0
_NUM_SHOWN = 10  # incidents
_TAIL_BYTES = 1 << 16  # of metrics.jsonl
_NUM_RECENT = 50  # steps


def read_status(model_dir: Path, stuck_seconds: float | None, now: float) -> dict[str, Any]:
    """What --json prints; `now` is the wall clock. BadInput for a folder of no run, or one that cannot be read."""
    names = ("journal.jsonl", ledger.FILE_NAME, "metrics.jsonl", ".lock")
    paths = [model_dir / name for name in names]
    if not any(path.is_file() for path in paths):
        what = "has no journal.jsonl" if model_dir.is_dir() else "is no folder"
        raise BadInput(f"{model_dir} {what}: is it the MODEL_DIR of a run?")
    with one_line_errors(f"cannot read {model_dir}"):
        journal, bad_journal = read_lines(paths[0])
        starts, bad_ledger = ledger.read_ledger(paths[1])
        records = _tail(paths[2])
        holder = _lock_holder(paths[3])
        changed = max(path.stat().st_mtime for path in paths if path.is_file())
    endings = ledger.ends(starts, journal)
    last = starts[-1] if starts else None
    if last and holder and holder != (last.pid, last.host):
        last = None  # the next one has the lock, and has not written yet
    sign = last.time if last else changed
    pid, host = holder or ((last.pid, last.host) if last else (None, None))
    found: dict[str, Any] = {"model_dir": str(model_dir), "time": now, "pid": pid, "host": host}
    found |= {"state": "", "last_sign_seconds": max(now - sign, 0.0)}
    found |= _position(last, journal, records) | _progress(last, records, sign, now)
    is_running = _is_running(paths[3], last, holder, now - sign)
    if is_running:
        limit = found["stuck_after_seconds"] = _limit_seconds(starts, found, stuck_seconds)
        found["state"] = "stuck" if found["idle_seconds"] > limit else "alive"
    else:
        found["state"] = _how_it_ended(endings, journal)
        endings = [ledger.KILLED if each == ledger.NO_END else each for each in endings]
    found |= _rate(last, records, found, is_running)
    saves = [each for each in journal if each.get("event") == "save"]
    if saves:
        found["last_save_step"] = saves[-1].get("step")
        found["last_save_seconds"] = max(now - _number(saves[-1].get("time"), now), 0.0)
    found["starts_in_24_hours"] = sum(start.created > now - _DAY for start in starts)
    found["ends_in_24_hours"] = [
        ending for start, ending in zip(starts, endings, strict=True)
        if start.time > now - _DAY and not (is_running and start is starts[-1])
    ]  # fmt: skip
    found["incidents"] = [
        each for each in journal
        if str(each.get("event")) not in _ORDINARY
        and now - _DAY < _number(each.get("time"), 0.0) < now + _DAY
    ]  # fmt: skip
    unreadable = ((paths[0], bad_journal), (paths[1], bad_ledger))
    found["warnings"] = [ledger.lines_text(*each) for each in unreadable if each[1]]
    return found


def exit_code(state: str) -> int:
    return {"alive": 0, "finished": 0, "stuck": EXIT_STUCK}.get(state, EXIT_NOT_RUNNING)


def _number(value: Any, otherwise: float) -> float:
    return float(value) if isinstance(value, int | float) else otherwise


def _tail(path: Path) -> list[dict[str, Any]]:
    """Records of the newest steps; a line that is being written does not count."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _TAIL_BYTES, 0))
        lines = file.read().split(b"\n")
    found = []
    for line in lines[1 if size > _TAIL_BYTES else 0 :]:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            found.append(record)
    return found[-_NUM_RECENT:]


# ---- is there a process ----


def _lock_holder(path: Path) -> tuple[int, str] | None:
    """Process number and host of the one that locked MODEL_DIR last; it may have ended."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    match = re.match(r"pid (\d+) on (\S+)", text)
    return (int(match[1]), match[2]) if match else None


def _is_running(
    lock: Path, last: ledger.Start | None, holder: tuple[int, str] | None, sign_seconds: float
) -> bool:
    """Looks, and does not try the lock: a run that starts in that moment would find it taken and give up."""
    if last and last.end:
        return False
    namespace = last.pid_namespace if last else None
    is_here = holder is not None and holder[1] == os.uname().nodename
    if holder and is_here and namespace in (None, ledger.pid_namespace()):
        holds = _holds_lock(holder[0], lock)
        if holds is not None:
            return holds
    return sign_seconds < _MISSING_SECONDS


def _holds_lock(pid: int, lock: Path) -> bool | None:
    """Whether this process of this host has the file open; None where the system does not say."""
    process = Path(f"/proc/{pid}")
    try:
        if not Path("/proc/self/fd").is_dir():
            return None
        if process.joinpath("stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return False  # dead, and its parent has not asked yet
        target = os.path.realpath(lock)
        return any(os.path.realpath(each) == target for each in process.joinpath("fd").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return False
    except PermissionError:  # another user's
        return None


# ---- how far, how fast ----


def _position(
    last: ledger.Start | None, journal: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """`step` and `num_steps`, each None where nobody has said."""
    begun = [each for each in journal if each.get("event") == "start"]
    noted = begun[-1] if begun else {}
    plan = last.plan if last else {}
    step = last.last_step if last else None
    if step is None and records:
        step = records[-1]["step"]
    step = plan.get("step", noted.get("step")) if step is None else step
    return {"step": step, "num_steps": plan.get("num_steps", noted.get("num_steps"))}


def _progress(
    last: ledger.Start | None, records: Sequence[dict[str, Any]], sign: float, now: float
) -> dict[str, Any]:
    """The phase, for how long nothing was finished (no step, no phase), and what a step usually takes."""
    known = [_number(each.get("seconds"), 0.0) for each in records]
    known = [seconds for seconds in known if seconds > 0]
    idle, phase = now - sign, None
    if last:
        newest = last.intervals[-1]
        idle, phase = idle + newest.seconds - newest.finished_seconds, newest.phase
    usual = statistics.median(known) if known else None
    return {"phase": phase, "idle_seconds": max(idle, 0.0), "usual_step_seconds": usual}


def _limit_seconds(
    starts: Sequence[ledger.Start], found: dict[str, Any], stuck_seconds: float | None
) -> float:
    """After how long without anything finished a run is stuck."""
    limit = stuck_seconds or max(300.0, 10 * (found["usual_step_seconds"] or 0.0))
    phase = found["phase"]
    if phase in (None, "start", "compile", "restore"):
        return max(limit, _SETUP_SECONDS)
    if phase != "step":
        done = [x.seconds for start in starts for x in start.intervals if x.phase == phase]
        limit = max([limit, *(2 * seconds for seconds in done[:-1])])  # the last goes on
    return limit


def _how_it_ended(endings: Sequence[str], journal: Sequence[dict[str, Any]]) -> str:
    words = [each["event"] for each in journal if each.get("event") in ("start", "stop", "done")]
    if words[-1:] == ["done"]:
        return "finished"
    if words[-1:] == ["stop"] or (endings and endings[-1] not in (ledger.KILLED, ledger.NO_END)):
        return "ended"
    return "dead"


def _rate(
    last: ledger.Start | None,
    records: Sequence[dict[str, Any]],
    found: dict[str, Any],
    is_running: bool,
) -> dict[str, Any]:
    """Seconds a step, tokens a second, and `eta_seconds` if what is not training goes on as in this start."""
    usual, step, num_steps = found["usual_step_seconds"], found["step"], found["num_steps"]
    speeds = [_number(each.get("tokens_per_second"), 0.0) for each in records]
    speeds = [speed for speed in speeds if speed > 0]
    speed = statistics.median(speeds) if speeds else None
    rate: dict[str, Any] = {"tokens_per_second": speed}
    if not (is_running and usual and num_steps) or step is None:
        return rate
    stepping = other = 0.0
    for each in last.intervals if last else ():
        if each.phase == "step":
            stepping += each.seconds
        elif stepping:
            other += each.seconds
    overhead = 1 + other / stepping if stepping else 1.0
    seconds = max(num_steps - step, 0) * usual
    num_tokens = last.plan.get("num_tokens") if last else None
    if isinstance(num_tokens, int) and speed and isinstance(records[-1].get("tokens"), int):
        seconds = max(num_tokens - records[-1]["tokens"], 0) / speed  # the batch may still grow
    return rate | {"eta_seconds": seconds * overhead}


# ---- for a person ----


def screen(found: dict[str, Any]) -> str:
    """What is known, a line each."""

    def ago(seconds: float) -> str:
        return f"{ledger.duration(seconds)} ago"

    where = f" (pid {found['pid']} on {found['host']})" if found["pid"] else ""
    lines = [f"{found['model_dir']}: {found['state'].upper()}{where}"]
    step, num_steps, usual = found["step"], found["num_steps"], found["usual_step_seconds"]
    if step is not None:
        share = f" of {num_steps:,} ({step / num_steps:.1%})" if num_steps else ""
        lines.append(f"  step       {step:,}{share}")
    if "stuck_after_seconds" in found:
        what = found["phase"] or "unknown"
        lines.append(
            f"  now        phase {what}; nothing finished for {ledger.duration(found['idle_seconds'])}"
            f" (stuck after {ledger.duration(found['stuck_after_seconds'])})"
        )
    else:
        phase = f", in phase {found['phase']}" if found["phase"] else ""
        lines.append(f"  last sign  {ago(found['last_sign_seconds'])}{phase}")
    if usual:
        speed = found["tokens_per_second"]
        tokens = f", {speed:,.0f} tokens/s" if speed else ""
        lines.append(f"  rate       {usual:.3g} s a step{tokens}")
    if found.get("eta_seconds", 1e10) < 1e10:
        at = datetime.fromtimestamp(found["time"] + found["eta_seconds"], UTC)
        left = ledger.duration(found["eta_seconds"])
        lines.append(f"  ETA        {left}, {at:%Y-%m-%d %H:%M} UTC")
    saved = "none yet"
    if "last_save_step" in found:
        saved = f"step {found['last_save_step']}, {ago(found['last_save_seconds'])}"
    lines.append(f"  last save  {saved}")
    ends = ledger.counted(found["ends_in_24_hours"])
    lines.append(f"  starts     {found['starts_in_24_hours']} in 24 h; ends: {ends or 'none'}")
    lines += _incident_lines(found["incidents"])
    return "\n".join(lines)


def _incident_lines(incidents: Sequence[dict[str, Any]]) -> list[str]:
    if not incidents:
        return ["  incidents  none in 24 h"]
    events = ledger.counted([str(each.get("event", "?")) for each in incidents])
    lines = [f"  incidents  {len(incidents)} in 24 h: {events}"]
    if len(incidents) > _NUM_SHOWN:
        lines.append(f"    ... the newest {_NUM_SHOWN}, all in journal.jsonl:")
    for each in incidents[-_NUM_SHOWN:]:
        at = datetime.fromtimestamp(each["time"], UTC)
        fields = {k: v for k, v in each.items() if k not in ("time", "event")}
        text = "  ".join(f"{k} {_brief(v)}" for k, v in fields.items())
        lines.append(f"    {at:%m-%d %H:%M:%S}  {each.get('event', '?')}  {text}"[:150])
    return lines


def _brief(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def status() -> int:
    """Prints what the flags ask for; the exit code says how the run is."""
    if not _MODEL_DIR.value:
        raise BadInput("status needs the MODEL_DIR of a run: status.py MODEL_DIR")
    if _STUCK.value is not None and not 0 < _STUCK.value < float("inf"):
        raise BadInput(f"--stuck_seconds={_STUCK.value} must be a number above 0")
    found = read_status(Path(_MODEL_DIR.value), _STUCK.value, time.time())
    print(json.dumps(found, ensure_ascii=False) if _JSON.value else screen(found))
    for warning in found["warnings"]:
        print(f"bloomjax: {warning}", file=sys.stderr)
    return exit_code(found["state"])


def main(argv: list[str] | None = None) -> None:
    """The command, also with the arguments of a test."""
    program, *arguments = sys.argv if argv is None else argv
    if arguments and not arguments[0].startswith("-"):
        arguments[0] = f"--model_dir={arguments[0]}"
    config.call(status, [program, *arguments], _FLAGS)


if __name__ == "__main__":
    main()
