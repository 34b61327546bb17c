"""kWh and CO2 of a run over all of its starts, or of so many device hours: training, idle infrastructure, hardware.

    python tools/carbon.py runs/tiny --region=us-central1
    python tools/carbon.py --device_hours=1082990 --device=a100_sxm_80

Of a MODEL_DIR it reads the energy entries of journal.jsonl, also while the run goes on; where there are none, the time
that goodput.jsonl has booked, at the power of the table. It loads no JAX and writes nothing. The formulas are those of
Luccioni et al. 2022 (arXiv 2211.02001); docs/carbon.md.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from bloomjax import config, energy, ledger
from bloomjax.energy_meter import EVENT
from bloomjax.errors import BadInput
from bloomjax.files import one_line_errors
from bloomjax.journal import read_lines

_FLAGS = flags.FlagValues()
_MODEL_DIR = flags.DEFINE_string(
    "model_dir", None, "MODEL_DIR of a run; may also be the first argument.", flag_values=_FLAGS
)
_HOURS = flags.DEFINE_float(
    "device_hours", None, "Without a run: devices x hours.", flag_values=_FLAGS
)
_DEVICE = flags.DEFINE_string(
    "device", None, "Without a run: which device, such as a100_sxm_80 or v4.", flag_values=_FLAGS
)
_REGION = flags.DEFINE_string(
    "region", None, f"Of the grid: {', '.join(energy.REGIONS)}. Default: that of the run, or france.",
    flag_values=_FLAGS,
)  # fmt: skip
_CO2 = flags.DEFINE_float(
    "co2_grams_per_kwh", None, "Of the grid, in place of --region.", flag_values=_FLAGS
)
_PUE = flags.DEFINE_float(
    "pue", None, "Power usage effectiveness of the site. Default: that of the run, or 1.0.", flag_values=_FLAGS
)  # fmt: skip
_IDLE_RATIO = flags.DEFINE_float(
    "idle_ratio", energy.IDLE_RATIO, "kWh of idle infrastructure a kWh of the devices (0.592: Jean Zay).",
    flag_values=_FLAGS,
)  # fmt: skip
_WATTS = flags.DEFINE_float(
    "device_watts", None, "Of one device while it trains, where nothing was measured.", flag_values=_FLAGS
)  # fmt: skip
_IDLE_WATTS = flags.DEFINE_float(
    "idle_device_watts", None, "Of one device that waits. Default: a fifth of --device_watts.",
    flag_values=_FLAGS,
)  # fmt: skip
_JSON = flags.DEFINE_bool("json", False, "One JSON object.", flag_values=_FLAGS)

_NUMBERS = ("seconds", "step_seconds", "num_devices", "measured_devices", "measured_joules")


def carbon_of(
    entries: Sequence[Mapping[str, Any]], site: energy.Site, given: energy.Power | None
) -> dict[str, Any]:
    """What --json prints, of energy entries (those of the journal); `given` is the power where nothing was measured."""
    device_hours = server_hours = steps = measured = estimated = 0.0
    hardware = energy.Embodied(0.0, 0.0)
    is_known = True
    for entry in entries:
        hours = entry["num_devices"] * entry["seconds"] / 3600
        is_cpu = "cpu" in str(entry["device"]).casefold()
        servers = hours * energy.servers_per_device(str(entry["device"]))
        if is_cpu:  # jax's CPU devices may be parts of one
            servers = entry.get("num_hosts", 1) * entry["seconds"] / 3600
        made = energy.embodied(0.0 if is_cpu else hours, servers)
        hardware = energy.Embodied(*(a + b for a, b in zip(hardware, made, strict=True)))
        device_hours, server_hours = device_hours + hours, server_hours + servers
        steps += entry["num_devices"] * entry["step_seconds"] / 3600
        measured += entry["measured_joules"]
        num_left = entry["num_devices"] - entry["measured_devices"]
        if given and num_left:
            share = min(entry["step_seconds"] / max(entry["seconds"], 1e-9), 1.0)
            estimated += energy.joules(given, num_left * entry["seconds"], share)
        elif entry["estimated_joules"] is None:
            is_known = False
        else:
            estimated += entry["estimated_joules"]
    kwh = (measured + estimated) / energy.JOULES_PER_KWH if is_known else None
    found: dict[str, Any] = {
        "device_hours": device_hours, "server_hours": server_hours,
        "step_share": steps / device_hours if device_hours else 0.0,
        "kwh": kwh, "measured_kwh": measured / energy.JOULES_PER_KWH,
        "estimated_kwh": estimated / energy.JOULES_PER_KWH if is_known else None,
        "idle_kwh": None, "dynamic_tonnes": None, "idle_tonnes": None,
        "embodied_servers_tonnes": hardware.servers_tonnes, "embodied_devices_tonnes": hardware.devices_tonnes,
        "embodied_tonnes": sum(hardware), "with_idle_tonnes": None, "total_tonnes": None,
        "co2_grams_per_kwh": site.grams_co2_per_kwh, "pue": site.pue, "idle_ratio": site.idle_ratio,
    }  # fmt: skip
    if kwh is not None:
        dynamic, idle = energy.dynamic_tonnes(kwh, site), energy.idle_tonnes(kwh, site)
        found |= {
            "idle_kwh": kwh * site.idle_ratio, "dynamic_tonnes": dynamic, "idle_tonnes": idle,
            "with_idle_tonnes": dynamic + idle, "total_tonnes": dynamic + idle + sum(hardware),
        }  # fmt: skip
    return found


# ---- a run ----


def of_run(model_dir: Path, given: energy.Power | None) -> dict[str, Any]:
    """BadInput for a folder of no run, or one whose files cannot be read."""
    journal_path, ledger_path = model_dir / "journal.jsonl", model_dir / ledger.FILE_NAME
    if not journal_path.is_file():
        what = f"has no {journal_path.name}" if model_dir.is_dir() else "is no folder"
        raise BadInput(f"{model_dir} {what}: is it the MODEL_DIR of a run?")
    with one_line_errors(f"cannot read {model_dir}"):
        journal, bad = read_lines(journal_path)
        starts = ledger.read_ledger(ledger_path)[0] if ledger_path.is_file() else []
    warnings = [ledger.lines_text(journal_path, bad)] if bad else []
    lines = [line for line in journal if line.get("event") == EVENT]
    entries: list[Mapping[str, Any]] = [line for line in lines if _is_entry(line)]
    if len(entries) < len(lines):
        warnings.append(
            f"{len(lines) - len(entries)} energy entries of {journal_path} are damaged; not counted"
        )
    source = "entries of journal.jsonl"
    if not entries:
        entries, source = _from_goodput(starts, journal), "starts in goodput.jsonl"
    if not entries:
        raise BadInput(
            f"{model_dir} has neither energy entries in journal.jsonl (Health.energy, written with each save) nor "
            "starts with steps in goodput.jsonl"
        )
    found = carbon_of(entries, _site(entries[-1]), given)
    seconds = sum(entry["seconds"] for entry in entries)
    left = max(sum(start.seconds for start in starts) - seconds, 0.0)
    sources = dict.fromkeys(
        part for entry in entries for part in str(entry.get("source", "")).split("; ")
    )
    head = {
        "model_dir": str(model_dir), "device": str(entries[-1]["device"]),
        "num_devices": entries[-1]["num_devices"], "counted": f"{len(entries)} {source}",
        "power": given.source if given else "; ".join(sources), "seconds": seconds,
        "seconds_not_counted": round(left, 3), "warnings": warnings,
    }  # fmt: skip
    return head | found


def _is_entry(line: Mapping[str, Any]) -> bool:
    numbers = [line.get(name) for name in _NUMBERS]
    estimated = line.get("estimated_joules", math.nan)
    if estimated is not None:
        numbers.append(estimated)
    return "device" in line and all(
        isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x < math.inf
        for x in numbers
    )


def _from_goodput(
    starts: Sequence[ledger.Start], journal: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """An entry a start, of a run without Health.energy; what the devices are stands in the journal."""
    entries = []
    begun = [line for line in journal if line.get("event") == "start"]
    for start in starts:
        mine = [
            line for line in begun
            if line.get("pid") == start.pid and start.created <= line["time"] <= start.time + 1
        ]  # fmt: skip
        if not mine:
            continue
        kind, num = str(mine[-1].get("device")), int(mine[-1].get("num_devices", 0))
        steps = sum(each.seconds for each in start.intervals if each.phase == "step")
        power = energy.power_of(kind)
        used = power and energy.joules(power, num * start.seconds, steps / start.seconds)
        hosts = {each.get("host") for each in mine[-1].get("processes", [])}
        entries.append({
            "device": kind, "num_devices": num, "num_hosts": max(len(hosts), 1), "seconds": start.seconds,
            "step_seconds": steps, "measured_devices": 0, "measured_joules": 0.0, "estimated_joules": used,
            "source": power.source if power else "unknown",
        })  # fmt: skip
    return entries


# ---- device hours ----


def of_hours(device_hours: float, name: str | None, given: energy.Power | None) -> dict[str, Any]:
    """Of devices that train all the time, at their TDP, as the paper counts. BadInput for an unknown device."""
    if not 0 < device_hours < 1e15:
        raise BadInput(f"--device_hours={device_hours} must be above 0")
    if name is None:
        raise BadInput(
            f"--device_hours needs --device: {', '.join(energy.GPUS)}, {', '.join(energy.TPUS)}"
        )
    kind, watts = name, given and given.watts
    if given is None or name in energy.GPUS | energy.TPUS:
        chip = energy.chip_named(name)
        kind, watts = chip.device_kind, watts or chip.watts
    if watts is None:
        raise BadInput(f"nobody has published what a {name} draws: give --device_watts")
    entry = {
        "device": kind, "num_devices": 1, "seconds": device_hours * 3600,
        "step_seconds": device_hours * 3600, "measured_devices": 0, "measured_joules": 0.0,
        "estimated_joules": watts * device_hours * 3600,
    }  # fmt: skip
    head = {"device": name, "power": f"{watts:g} W all the time", "warnings": []}
    return head | carbon_of([entry], _site({}), None)


def _site(entry: Mapping[str, Any]) -> energy.Site:
    """By flags, else as the run had it."""
    if _REGION.value is not None and _CO2.value is not None:
        raise BadInput("give --region or --co2_grams_per_kwh, not both")
    grams = entry.get("co2_grams_per_kwh", energy.REGIONS["france"])
    if _REGION.value is not None:
        grams = energy.grams_of(_REGION.value)
    elif _CO2.value is not None:
        grams = _CO2.value
    pue = entry.get("pue", 1.0) if _PUE.value is None else _PUE.value
    return energy.Site(grams, pue, _IDLE_RATIO.value)


# ---- for a person ----


def table(found: Mapping[str, Any]) -> str:
    """Each figure with what it was made from."""
    hours = found["device_hours"]
    where = f"{_number(hours)} device hours of {found['device']}"
    if "model_dir" in found:
        count = found["num_devices"]
        where = (
            f"{found['model_dir']}: {found['counted']}, {ledger.duration(found['seconds'])} of {count} x "
            f"{found['device']}, {found['step_share']:.1%} of it in steps"
        )
    lines = [where]
    grid = f"{found['co2_grams_per_kwh']:g} g/kWh"
    if found["kwh"] is None:
        lines.append(
            f"energy unknown: nobody has published what a {found['device']} draws (--device_watts)"
        )
    else:
        how = found["power"]
        if found["measured_kwh"] and found["estimated_kwh"]:
            parts = _number(found["measured_kwh"]), _number(found["estimated_kwh"])
            how = f"measured {parts[0]} kWh, estimated {parts[1]} kWh; {how}"
        ratio = f"{found['idle_ratio']:.3f} a kWh of devices"
        idle = f"{_number(found['idle_kwh'])} kWh of idle infrastructure ({ratio})"
        lines += [
            _row("energy", f"{_number(found['kwh'])} kWh", how),
            _row("dynamic", _mass(found["dynamic_tonnes"]), f"kWh x PUE {found['pue']:g} x {grid}"),
            _row("idle", _mass(found["idle_tonnes"]), f"{idle} x {grid}"),
            _row("", _mass(found["with_idle_tonnes"]), "dynamic and idle"),
        ]
    servers, devices = found["embodied_servers_tonnes"], found["embodied_devices_tonnes"]
    life = f"{energy.LIFETIME_HOURS:,.0f} h"
    made = f"servers {_mass(servers)}: {_number(found['server_hours'])} h x {energy.SERVER_KG:g} kg / {life}"
    if devices:
        made += f"; devices {_mass(devices)}: {_number(hours)} h x {energy.DEVICE_KG:g} kg / {life}"
    lines.append(_row("embodied", _mass(found["embodied_tonnes"]), made))
    if found["total_tonnes"] is not None:
        lines.append(_row("total", _mass(found["total_tonnes"]), "dynamic, idle and embodied"))
    left = found.get("seconds_not_counted", 0.0)
    if left >= 1:
        power = found["kwh"] and found["kwh"] / found["seconds"]
        much = f", {_number(left * power)} kWh at the mean power" if power else ""
        lines.append(f"not counted: {ledger.duration(left)} after the last entry of a start{much}")
    return "\n".join(lines)


def _row(name: str, value: str, how: str) -> str:
    return f"  {name:<10}{value:>16}   {how}".rstrip()


def _mass(tonnes: float) -> str:
    for size, unit in ((1.0, "t"), (1e-3, "kg")):
        if tonnes >= size:
            return f"{tonnes / size:,.2f} {unit}"
    return f"{tonnes * 1e6:.3g} g"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def carbon() -> None:
    """Prints what the flags ask for."""
    if (_MODEL_DIR.value is None) == (_HOURS.value is None):
        raise BadInput(
            "give the MODEL_DIR of a run, or --device_hours and --device: carbon.py MODEL_DIR"
        )
    given = None
    if _WATTS.value is not None:
        given = energy.given_power(_WATTS.value, _IDLE_WATTS.value)
    elif _IDLE_WATTS.value is not None:
        raise BadInput("--idle_device_watts needs --device_watts")
    if _MODEL_DIR.value is None:
        found = of_hours(_HOURS.value or 0.0, _DEVICE.value, given)
    elif _DEVICE.value is not None:
        raise BadInput("--device is for --device_hours; a run has said what it ran on")
    else:
        found = of_run(Path(_MODEL_DIR.value), given)
    print(json.dumps(found, ensure_ascii=False) if _JSON.value else table(found))
    for warning in found["warnings"]:
        print(f"bloomjax: {warning}", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    """The command, also with the arguments of a test."""
    program, *arguments = sys.argv if argv is None else argv
    if arguments and not arguments[0].startswith("-"):
        arguments[0] = f"--model_dir={arguments[0]}"
    config.call(carbon, [program, *arguments], _FLAGS)


if __name__ == "__main__":
    main()
