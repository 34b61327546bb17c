"""What the benchmarks share: the command line, the clock, and the report with its versions and date."""

import argparse
import contextlib
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import bloomjax
from bloomjax.errors import BadInput
from bloomjax.files import one_line_errors, write_whole

PLATFORMS = ("cpu", "gpu", "tpu")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers")


# ---- the command line ----


class Parser(argparse.ArgumentParser):
    """With --device, --json and --output. What is wrong with the arguments is one line, not the whole usage."""

    def __init__(self, doc: str | None):
        doc = doc or ""
        super().__init__(
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--device", choices=PLATFORMS, help="by default what JAX takes")
        self.add_argument("--json", action="store_true", help="print nothing but JSON")
        self.add_argument("--output", type=Path, help="also write the whole report here, as JSON")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def whole_number(text: str) -> int:
    """A count on a command line, 1 or more."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def run(function: Callable[[], int | None]) -> NoReturn:
    """Calls `function`; what the user gave and cannot be used is one line."""
    try:
        sys.exit(function() or 0)
    except BadInput as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: out of memory; take fewer or shorter rows")


def check_output(output: Path | None) -> None:
    """BadInput before minutes are spent, if the report could not be written there."""
    if output is None:
        return
    if output.is_dir():
        raise BadInput(f"--output={output} is a folder; name a file in it")
    with one_line_errors(f"--output={output}"):
        output.parent.mkdir(parents=True, exist_ok=True)


def finish(args: argparse.Namespace, report: dict[str, Any], table: str, rows: Any = None) -> None:
    """Prints the table, or with --json the report (or `rows` in its place), and writes --output."""
    print(json.dumps(report if rows is None else rows, indent=1) if args.json else table)
    if args.output is not None:
        with one_line_errors(f"--output={args.output}"):
            write_whole(args.output, json.dumps(report, indent=1).encode() + b"\n")


def say(text: str) -> None:
    """Progress: on stderr, for stdout is the result's."""
    print(text, file=sys.stderr, flush=True)


# ---- the device ----


def choose_platform(name: str | None) -> None:
    """Leaves JAX only this platform; before its first import in this process, else it has no effect."""
    if name is not None:
        os.environ["JAX_PLATFORMS"] = {"gpu": "cuda"}.get(name, name)


def device(name: str | None) -> Any:
    """The first device of the platform, or of JAX's default one."""
    import jax

    try:
        return jax.devices(name)[0]
    except (RuntimeError, AssertionError) as error:
        reason = "".join(str(error).strip().splitlines()[:1])
        raise BadInput(f"no {name or 'device'} for JAX here" + (reason and f": {reason}")) from None


def platform_of(device: Any) -> str:
    """ "cpu", "gpu" or "tpu"."""
    return "gpu" if device.platform in ("cuda", "rocm") else device.platform


def memory_limit_bytes(device: Any) -> int:
    """What programs may use of the device's memory; of a host's what is free now."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    with open("/proc/meminfo", encoding="ascii") as file:
        found = dict(line.split(":") for line in file)
    return int(found["MemAvailable"].split()[0]) * 1024


def forget_peak_memory() -> None:
    """Linux: the largest resident size of this process counts from now on."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def peak_memory_bytes(device: Any | None) -> int:
    """Most that was in use: of the device's memory where it counts that, else resident in this process."""
    stats = device.memory_stats() if device is not None else None
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    with open("/proc/self/status", encoding="ascii") as file:
        (line,) = [line for line in file if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def program_bytes(executable: Any) -> int:
    """Memory of a compiled program: arguments, results that do not take their place, and all in between."""
    stats = executable.memory_analysis()
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.argument_size_in_bytes + results + stats.temp_size_in_bytes


def is_out_of_memory(error: BaseException) -> bool:
    text = f"{type(error).__name__} {error}"
    words = "RESOURCE_EXHAUSTED", "out of memory", "Out of memory", "OutOfMemory", "MemoryError"
    return any(word in text for word in words)


def first_line(error: BaseException, length: int = 160) -> str:
    """The type of an exception and the first line of what it says; of those that a person can understand, only that."""
    if isinstance(error, BadInput):
        return str(error)
    if is_out_of_memory(error):
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:length].rstrip(": ")


# ---- the clock ----


class Times(NamedTuple):
    """Seconds of one call: the median over rounds, the best round, how many rounds of how many calls."""

    median: float
    best: float
    num_rounds: int
    num_calls: int


def time_in_turns(
    calls: Sequence[Callable[[], Any]], num_rounds: int = 9, round_seconds: float = 0.05
) -> list[Times]:
    """Times of each of `calls`, which have been called before, in turns: what disturbs one round disturbs all.

    A round is as many calls as take `round_seconds` (at least one), one after the other without waiting, as in
    training; then the last result is waited for. `calls` return arrays of JAX.
    """
    import jax

    def seconds(call, num_calls):
        started = time.perf_counter()
        for _ in range(num_calls):
            result = call()
        jax.block_until_ready(result)
        return time.perf_counter() - started

    num_calls = [max(1, math.ceil(round_seconds / seconds(call, 1))) for call in calls]
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(num_rounds):
        for number, call in enumerate(calls):
            found[number].append(seconds(call, num_calls[number]) / num_calls[number])
    return [
        Times(statistics.median(each), min(each), num_rounds, n)
        for each, n in zip(found, num_calls, strict=True)
    ]


# ---- the report ----


def circumstances(device: Any | None) -> dict[str, Any]:
    """When, where and with what: the part of a report that every benchmark has."""
    versions = {"bloomjax": bloomjax.__version__}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    found = {
        "date": datetime.date.today().isoformat(), "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)), "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(), "versions": versions,
    }  # fmt: skip
    if commit := _commit():
        found["commit"] = commit
    if device is not None:
        found |= {"device": platform_of(device), "device_kind": device.device_kind}
        version = getattr(device.client, "platform_version", "").strip().splitlines()
        found["platform_version"] = version[-1] if version else ""
    return found


def _commit() -> str | None:
    """Of this checkout; with a + if files were changed."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        done = [
            subprocess.run(
                [*git, *words], capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return done[0] + "+" * bool(done[1])


def headline(found: dict[str, Any]) -> str:
    """`circumstances` in two lines."""
    kind = found.get("device_kind") or found.get("device")
    return (
        f"{found['date']}, {kind}, {found['machine']} with {found['cores']} cores, load {found['load_average']}\n"
        f"Python {found['python']}, " + ", ".join(f"{k} {v}" for k, v in found["versions"].items())
    )


def columns(names: Sequence[str], rows: Sequence[Sequence[Any]], left: Sequence[str] = ()) -> str:
    """A table: the first column and those called `left` left, the others right; None is a dash."""

    def text(value):
        return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = [list(names)] + [[text(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    is_left = [not i or name in left for i, name in enumerate(names)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if at_left else cell.rjust(width)
            for cell, width, at_left in zip(line, widths, is_left, strict=True)
        ).rstrip()
        for line in lines
    )
