"""The figures of `plan` for a person: at most 40 lines a target."""

from collections.abc import Sequence
from typing import Any

from bloomjax.targets import GPU_LIBRARIES_BYTES, GPU_MEMORY_FRACTION

_MAX_COLLECTIVES = 9
_MAX_LINT = 4


def lines(found: dict[str, Any]) -> list[str]:
    """Everything that `plan_measure` found, or that it could not look at."""
    parts = [_head(found), _memory(found), _flops(found)]
    if found["collectives"] is not None:
        parts.append(_collectives(found))
    parts.append(_time(found))
    return [line for part in parts for line in part]


def suggestion_lines(target: str, tried: Sequence[Any], seconds: float) -> list[str]:
    """Of the candidates that `plan_suggest.search` returns, best first."""
    compiled = any(each.peak_gib is not None for each in tried)
    how = f"{len(tried)} layouts compiled" if compiled else "no layout compiled, by formulas alone"
    text = [f"{target}: {how}, {seconds:.0f} s"]
    if not tried:
        return [*text, "no layout fits"]
    text.append(
        f"  {'step s':>8}{'no overlap':>12}{'peak GiB':>10}{'data':>6}{'fsdp':>6}{'tensor':>7}{'microbatch':>12}  remat"
    )
    for each in tried:
        layout, peak = each.layout, each.peak_gib or each.guessed_gib
        step = each.step_seconds if compiled else each.guessed_seconds
        serial = each.serial_seconds if compiled else each.guessed_serial_seconds
        times = "".join(f"{f'{t:.1f}' if t else '-':>{n}}" for t, n in ((step, 8), (serial, 12)))
        text.append(
            f"  {times}{peak:>10.1f}{layout.data:>6}{layout.fsdp:>6}{layout.tensor:>7}"
            f"{layout.microbatch or 'all':>12}  {layout.remat_policy}{'' if each.fits else '   does not fit'}"
        )
    return [*text, *(tried[0].layout.bindings() if tried[0].fits else ["none of them fits"])]


def _number(value: float) -> str:
    """One decimal, or two digits of what is smaller."""
    return f"{value:,.1f}" if value >= 1 or value == 0 else f"{value:.2g}"


def _head(found: dict[str, Any]) -> list[str]:
    mesh = " ".join(f"{axis}={size}" for axis, size in found["mesh"].items())
    rows, batch = found["num_rows"], found["batch_size_samples"]
    filled = f" (run as {rows:,} rows)" if rows != batch else ""
    micro = found["num_microbatches"]
    compiled = found["compile_seconds"]
    billions = found["params"] / 1e9
    size = f"{billions:.2f}B" if billions >= 0.1 else f"{billions * 1000:.2f}M"
    how = f"compiled in {compiled:.0f} s" if compiled else "from shapes alone, nothing was compiled"
    return [
        f"{found['target']}: {found['num_devices']} devices, {found['num_hosts']} hosts; {how}",
        f"{size} parameters, mesh {mesh}; batch {batch:,} x {found['sequence_length_tokens']:,} "
        f"tokens{filled} in {micro} microbatch{'es' * (micro > 1)}; remat {found['remat_policy']}, "
        f"attention {found['attention_kernel']}",
        *(f"{line}; what follows is of the longest" for line in found["curriculum"]),
    ]  # fmt: skip


def _memory(found: dict[str, Any]) -> list[str]:
    names = {"parameters": "params_gib", "optimizer": "optimizer_gib", "batch": "batch_gib",
             "temporaries": "temporaries_gib", "peak": "peak_gib", "available": "limit_gib"}  # fmt: skip
    shown = [
        f"{name} {_number(found[key])}" for name, key in names.items() if found[key] is not None
    ]
    title = "memory, GiB a device"
    if found["target"].startswith("cuda"):
        title += (
            f"; available: {GPU_MEMORY_FRACTION:.0%} of it (XLA_PYTHON_CLIENT_MEM_FRACTION) less "
            f"{GPU_LIBRARIES_BYTES / 2**30:g} for libraries"
        )
    return [title, "  " + "   ".join(shown), f"  {verdict(found)}"]


def verdict(found: dict[str, Any]) -> str:
    """Whether it fits, in one line."""
    limit, peak = found["limit_gib"], found["peak_gib"]
    state = found["params_gib"] + found["optimizer_gib"] + found["batch_gib"]
    if limit is None:
        return "approximate: a CPU computes bf16 in f32 and has no limit of its own; no verdict"
    if peak is None:
        if found["fits"] is False:
            return f"DOES NOT FIT: parameters, optimizer and batch alone take {state:.1f} of {limit:.1f}"
        return f"parameters, optimizer and batch take {state:.1f} of {limit:.1f}; for the rest: --mode=compile"
    if found["fits"]:
        return f"FITS: headroom {limit - peak:.1f} ({1 - peak / limit:.0%})"
    return f"DOES NOT FIT: needs {peak:.1f}, has {limit:.1f}"


def _flops(found: dict[str, Any]) -> list[str]:
    shown = {
        name: f"{value:.3g}".replace("e+", "e") for name, value in found["flops_per_step"].items()
    }
    ratio = found["flops_per_step"]["hardware"] / found["flops_per_step"]["causal"]
    uncounted = found["uncounted_calls"]
    note = f"; without what {', '.join(uncounted)} does inside" if uncounted else ""
    return [
        "FLOPs of a step (the model's: of real tokens)",
        f"  causal {shown['causal']}   Megatron {shown['megatron_model']} (hardware {shown['megatron_hardware']})   "
        f"6ND {shown['six_n']}   traced {shown['hardware']} = {ratio:.2f} x causal{note}",
    ]  # fmt: skip


def _collectives(found: dict[str, Any]) -> list[str]:
    rows, largest = found["collectives"], found["largest"]
    total = f"collectives, {_number(found['wire_gib'])} GiB sent by each device in a step"
    text = [f"{total:<56}{'times':>9}{'GiB':>9}"]
    for row in rows[:_MAX_COLLECTIVES]:
        name = f"{row['kind']:<20}{row['axes']:<18}{row['dtype']:<6}"
        text.append(f"  {name:<54}{row['executed']:>9,}{_number(row['wire_gib']):>9}")
    rest = rows[_MAX_COLLECTIVES:]
    if rest:
        times, gib = sum(r["executed"] for r in rest), sum(r["wire_gib"] for r in rest)
        text.append(f"  {f'{len(rest)} other kinds':<54}{times:>9,}{_number(gib):>9}")
    text.append("largest:")
    for row in largest:
        where = ", ".join(part for part in (row["op"], row["source"]) if part)
        name = f"{row['kind']} {row['axes']} {row['shape']} of {_tail(where, 70)}"
        text.append(f"  {_number(row['wire_gib']):>8} {row['executed']:>7,} x {name}")
    lint = found["lint"]
    for each in lint[:_MAX_LINT]:
        text.append(f"lint: {_head_of(each, 150)}")
    if len(lint) > _MAX_LINT:
        text.append(f"lint: and {len(lint) - _MAX_LINT} more (--json)")
    return text


def _head_of(text: str, size: int) -> str:
    return text if len(text) <= size else text[: size - 3] + "..."


def _tail(text: str, size: int) -> str:
    return text if len(text) <= size else "..." + text[3 - size :]


def _time(found: dict[str, Any]) -> list[str]:
    checkpoint = (
        f"checkpoint {_number(found['checkpoint_gib'])} GiB, {found['checkpoint_seconds']:,.0f} s at 1.2 GB/s a host"
    )  # fmt: skip
    e = found["estimate"]
    if e is None:
        return [
            f"{checkpoint}; step time needs the compiled program"
            if found["limit_gib"]
            else checkpoint
        ]
    network = "   ".join(
        f"{axes} {_number(s)}" for axes, s in e["network_seconds"].items() if s >= 0.01
    )
    exposed = (
        f" (compute + {_number(e['exposed_seconds'])} of tensor)" if e["exposed_seconds"] else ""
    )
    days = f"{_number(found['days'])} days for {_number(found['planned_tokens'] / 1e9)}B tokens"
    power = "energy unknown: nobody publishes this chip's power (--device_watts)"
    if found["kwh"] is not None:
        power = (
            f"{_number(found['kwh'] / 1000)} MWh at {e['watts']:.0f} W a device; {_number(found['co2_tonnes'])} t CO2 "
            f"with PUE {e['pue']} and {e['grams_co2_per_kwh']:g} g/kWh, {_number(found['embodied_tonnes'])} t embodied"
        )
    compute, memory, serial = (
        _number(e[f"{name}_seconds"]) for name in ("compute", "memory", "no_overlap")
    )
    return [
        f"estimate, not measured: seconds of a step, bound by {e['bound']}",
        f"  compute {compute}   memory {memory}   network: {network or '0'}",
        f"  step {_number(found['step_seconds'])}{exposed}, {serial} if nothing overlapped;   "
        f"{found['tokens_per_second']:,.0f} tokens/s, MFU {found['mfu']:.1%} (causal)",
        f"  {days};   {checkpoint}",
        f"  {power}",
        f"  assumed: matrix products at {e['sustained_fraction']:.1%} of peak ({e['sustained_source']}), links at "
        f"{e['link_fraction']:.0%}, {e['network_gbit_per_second_and_host']:,.0f} Gb/s a host, TDP, full batches",
    ]
