"""Before hardware is booked: `python -m bloomjax.plan --gin_file=176b.gin --gin_file=hardware/v5p_1024.gin
--target=v5p-1024`.

Lowers the train step that `train` runs, compiles it with the compiler of the target where that is installed, and says
what it needs and how long it may take. Exit code: 0 it fits, 3 it does not, 2 something given is wrong.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags

from bloomjax import config, energy, plan_report, targets
from bloomjax.errors import BadInput
from bloomjax.objectives import CausalLM

_FITS, _BAD_INPUT, _DOES_NOT_FIT = 0, 2, 3
_FLAGS = flags.FlagValues()
_TARGET = flags.DEFINE_multi_string(
    "target", [], f"Hardware, such as {targets.EXAMPLES}; may be given several times.",
    flag_values=_FLAGS,
)  # fmt: skip
_MODE = flags.DEFINE_enum(
    "mode", None, ["shape", "compile"],
    "shape: what shapes tell, in seconds; compile: all. By default compile where the compiler is installed.",
    flag_values=_FLAGS,
)  # fmt: skip
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object a target.", flag_values=_FLAGS)
_SUGGEST = flags.DEFINE_bool(
    "suggest", False, "Search mesh, microbatch and remat for the fastest layout that fits.",
    flag_values=_FLAGS,
)  # fmt: skip
_SUGGEST_SECONDS = flags.DEFINE_float(
    "suggest_seconds", 570.0, "No compilation begins that would probably end later.",
    flag_values=_FLAGS,
)  # fmt: skip
_NETWORK = flags.DEFINE_float(
    "network_gbit_per_host", None, "Network of one host, all adapters together, one direction.",
    lower_bound=0.001, flag_values=_FLAGS,
)  # fmt: skip
_WATTS = flags.DEFINE_float(
    "device_watts", None, "Draw of one device, in place of its TDP.", lower_bound=0.001, flag_values=_FLAGS,
)  # fmt: skip
_PUE = flags.DEFINE_float(
    "pue", 1.2, "Power usage effectiveness of the site (1.2: Jean Zay).", flag_values=_FLAGS
)
_CO2 = flags.DEFINE_float(
    "co2_grams_per_kwh", 57.0, "Of the grid (57: France, as in Luccioni et al. 2022).",
    flag_values=_FLAGS,
)  # fmt: skip
_RESULT = flags.DEFINE_string(
    "result", None, "Internal: where the process that compiles for one target puts its figures.",
    flag_values=_FLAGS,
)  # fmt: skip


def plan() -> int:
    """Plans for each target in turn; BadInput of one leaves the others."""
    if _RESULT.value:
        return _compile_here(Path(_RESULT.value))
    if not _TARGET.value:
        raise BadInput(f"give --target=..., such as {targets.EXAMPLES}")
    energy.Site(_CO2.value, _PUE.value)  # refused before minutes of compiling
    codes = [_plan_one(name, is_first=number == 0) for number, name in enumerate(_TARGET.value)]
    return _BAD_INPUT if _BAD_INPUT in codes else max(codes)


def _plan_one(name: str, is_first: bool) -> int:
    try:
        target = targets.parse(name)
        missing = target.missing()
        if missing and _MODE.value == "compile":
            raise BadInput(f"target {name}: {missing}")
        if _SUGGEST.value:
            return _suggest(target, missing)
        compiles = _MODE.value == "compile" or (_MODE.value is None and not missing)
        found = _compile_elsewhere(target) if compiles else _shape_here(target)
    except BadInput as error:
        print(f"bloomjax: {_one_line(error)}", file=sys.stderr)
        return _BAD_INPUT
    if _JSON.value:
        print(json.dumps(found), flush=True)
    else:
        if not is_first:
            print()
        print("\n".join(plan_report.lines(found)), flush=True)
        if _MODE.value is None and missing:
            print(f"shapes only: {missing}", flush=True)
    return _DOES_NOT_FIT if found["fits"] is False else _FITS


def _one_line(error: BadInput) -> str:
    return str(error).split("\n  In call to configurable")[0]


def _shape_here(target: targets.Target) -> dict[str, Any]:
    os.environ.update(target.environment())  # in time: nothing has loaded jax yet
    from bloomjax import plan_measure

    return plan_measure.shape_figures(_setup(), target, _assumptions())


def _compile_elsewhere(target: targets.Target, bindings: Sequence[str] = ()) -> dict[str, Any]:
    """In a process of its own: the environment must stand before jax is loaded, and a compiler may crash."""
    with tempfile.TemporaryDirectory(prefix="bloomjax-plan-") as folder:
        result, stderr = Path(folder, "figures.json"), Path(folder, "stderr")
        # main's arguments may be a test's: only flags that this process has parsed count.
        command = [
            sys.executable,
            "-m",
            "bloomjax.plan",
            *config.arguments(),
            f"--target={target.name}",
        ]
        command += [f"--result={result}", *_own_arguments()]
        command += [f"--gin_bindings={binding}" for binding in bindings]
        with stderr.open("wb") as file:
            code = subprocess.run(
                command,
                env=os.environ | target.environment(),
                stdout=file,
                stderr=file,
                check=False,
            ).returncode
        if not result.exists():
            last = [
                line for line in stderr.read_text(errors="replace").splitlines() if line.strip()
            ]
            print("\n".join(last[-30:]), file=sys.stderr)
            raise BadInput(f"target {target.name}: its compiler's process ended with status {code}")
        found = json.loads(result.read_text(encoding="utf-8"))
    if "bad_input" in found:
        raise BadInput(found["bad_input"])
    return found


def _own_arguments() -> list[str]:
    given = [f for f in (_NETWORK, _WATTS, _PUE, _CO2) if f.value is not None]
    return [f"--{f.name}={f.value}" for f in given]


def _compile_here(result: Path) -> int:
    from bloomjax import plan_measure

    try:
        target = targets.parse(_TARGET.value[0])
        found = plan_measure.compiled_figures(
            _setup(), target, _assumptions(), result.with_name("stderr")
        )
    except BadInput as error:
        found = {"bad_input": _one_line(error)}
    result.write_text(json.dumps(found), encoding="utf-8")
    return 0


def _suggest(target: targets.Target, missing: str | None) -> int:
    os.environ.update(target.environment())
    from bloomjax import plan_suggest

    asks_compiler = _MODE.value == "compile" or (_MODE.value is None and not missing)
    started = time.monotonic()
    tried = plan_suggest.search(
        _setup(), target, _assumptions(),
        (lambda layout: _compile_elsewhere(target, layout.bindings())) if asks_compiler else None,
        _SUGGEST_SECONDS.value,
    )  # fmt: skip
    if _JSON.value:
        best = tried[0].layout._asdict() if tried and tried[0].fits else None
        rows = [dataclasses.asdict(each) | {"layout": each.layout._asdict()} for each in tried]
        print(json.dumps({"target": target.name, "suggestion": best, "tried": rows}), flush=True)
    else:
        for line in plan_report.suggestion_lines(target.name, tried, time.monotonic() - started):
            print(line, flush=True)
    return _FITS if tried and tried[0].fits else _DOES_NOT_FIT


def _assumptions() -> Any:
    from bloomjax.plan_measure import Assumptions

    network = _NETWORK.value and _NETWORK.value * 1e9 / 8
    return Assumptions(network, _WATTS.value, _PUE.value, _CO2.value)


def _setup() -> Any:
    """The parts of `train` that decide about its step; nothing else of it need be bound."""
    from bloomjax.plan_measure import Setup
    from bloomjax.schedules import run_length_steps

    schedule = config.build("train.batch_schedule")
    num_steps = run_length_steps(
        schedule, _optional("train.train_steps"), _optional("train.train_samples")
    )
    share = _optional("TrainData.max_filled_share")
    phases = _optional("TrainData.phases") or ()
    changes = [(p.first_sample, p.sequence_length) for p in phases if p.sequence_length]
    stretches = ((0, config.build("TrainData.sequence_length")), *changes)
    curriculum = _optional("TrainData.curriculum")
    return Setup(
        model=config.build("train.model"), optimizer=config.build("train.optimizer"),
        mesh=config.build("train.mesh"), step=config.build("train.step"), batch_schedule=schedule,
        num_steps=num_steps, sequence_length=max(length for _, length in stretches),
        max_filled_share=0.5 if share is None else share, stretches=stretches, curriculum=curriculum,
        is_guarded=_optional("Health.guard") is not None,
        objective=_optional("TrainData.objective") or CausalLM(),
    )  # fmt: skip


def _optional(binding: str) -> Any:
    try:
        return config.build(binding)
    except BadInput as error:
        if "does not bind" in str(error):
            return None
        raise


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command, also with the arguments of a test."""
    try:
        config.call(plan, argv, _FLAGS)
    except SystemExit as end:
        # Wrong flags and gin files, too, are an error here, and 1 is none of this verb's codes.
        raise SystemExit(_BAD_INPUT if end.code == 1 else end.code) from None


if __name__ == "__main__":
    main()
