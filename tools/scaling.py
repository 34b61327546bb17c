"""Scaling laws before, during and after runs: what to train, and whether a run is on its curve.

    python tools/scaling.py optimal --flops=5.76e23 [--law=chinchilla|chinchilla_rounded|besiroglu|kaplan|law.json]
    python tools/scaling.py sweep --gin_file=tiny.gin --flops=1e15 --out=runs/sweep
    python tools/scaling.py collect runs/sweep/*/ --out=runs.csv
    python tools/scaling.py fit runs.csv --approach=3 --plot=fit.png [--json > law.json]
    python tools/scaling.py check runs/big --law=law.json
    python tools/scaling.py table

Each verb takes --json. docs/scaling_laws.md goes through all of them.
"""

import csv
import dataclasses
import io
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import scaling_collect
import scaling_plots
import scaling_sweep
from absl import flags

from bloomjax import config, language_laws, loss_curves, scaling_fits
from bloomjax import flops as flop_counts
from bloomjax.errors import BadInput
from bloomjax.files import write_whole
from bloomjax.frontier_fits import fit_envelope, fit_isoflop
from bloomjax.scaling_fits import Fit
from bloomjax.scaling_laws import (
    CHINCHILLA,
    CHINCHILLA_FLOPS,
    CHINCHILLA_TABLE,
    DATA_CONSTRAINED,
    FLOPS_PER_PARAM_TOKEN,
    KAPLAN_BATCH,
    DataConstrainedLaw,
    KaplanLaw,
    Optimum,
    ParametricLaw,
    ShareLaw,
    named_laws,
    table_law,
)
from bloomjax.scaling_runs import (
    NON_EMBEDDING,
    Curve,
    final_runs,
    read_curves,
    text_of_run,
)

_FLAGS = flags.FlagValues()
_APPROACH = flags.DEFINE_string(
    "approach", "3", "fit: 1, 2, 3, kaplan or repeated.", flag_values=_FLAGS
)
_COLUMNS = flags.DEFINE_string(
    "columns", "", "fit: OLD:NEW[,...], to rename columns of the table.", flag_values=_FLAGS
)
_STARTS = flags.DEFINE_integer(
    "starts", 4500, "fit --approach=3: 4500 or 1125 starts.", flag_values=_FLAGS
)
_BOOTSTRAP = flags.DEFINE_integer("bootstrap", 400, "fit: replicates.", flag_values=_FLAGS)
_PLOT = flags.DEFINE_string(
    "plot", None, "fit, check: a picture, .png, .svg or .pdf.", flag_values=_FLAGS
)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.", flag_values=_FLAGS)
_LAW = flags.DEFINE_string(
    "law", "chinchilla", "A published law, or a file of fit --json.", flag_values=_FLAGS
)
_FLOPS = flags.DEFINE_float(
    "flops", None, "optimal: budget; sweep: of all its runs together.", flag_values=_FLAGS
)
_PARAMS = flags.DEFINE_float(
    "params", None, "optimal: a size; fit: of the run to advise.", flag_values=_FLAGS
)
_TOKENS = flags.DEFINE_float(
    "tokens", None, "optimal: a length; fit: of the run to advise.", flag_values=_FLAGS
)
_WEIGHTS = flags.DEFINE_string(
    "weights",
    "",
    "fit by language: LANGUAGE:NUMBER[,...], what a nat is worth.",
    flag_values=_FLAGS,
)
_UNIQUE = flags.DEFINE_float(
    "unique_tokens", None, "optimal: text there is; more is repeated.", flag_values=_FLAGS
)
_GPU_HOURS = flags.DEFINE_float(
    "gpu_hours", None, "optimal: budget in hours of --device.", flag_values=_FLAGS
)
_DEVICE = flags.DEFINE_string(
    "device", "A100", "For --gpu_hours; as jax names it.", flag_values=_FLAGS
)
_MFU = flags.DEFINE_float(
    "mfu", 0.36, "Share of the peak for --gpu_hours; 0.36 is BLOOM-176B's.", flag_values=_FLAGS
)
_OUT = flags.DEFINE_string(
    "out", None, "collect: a new .csv; sweep: a new folder.", flag_values=_FLAGS
)
_LOSS = flags.DEFINE_enum(
    "loss",
    "train",
    scaling_collect.LOSS_KINDS,
    "collect, check: which loss.",
    flag_values=_FLAGS,
)
_BY_LANGUAGE = flags.DEFINE_bool(
    "by_language", False, "collect: a curve a language.", flag_values=_FLAGS
)
_BUDGETS = flags.DEFINE_integer(
    "budgets", 4, "sweep: isoFLOP curves, each 3 times the one before.", flag_values=_FLAGS
)
_SIZES = flags.DEFINE_integer("sizes", 5, "sweep: sizes on each.", flag_values=_FLAGS)
_SPAN = flags.DEFINE_float(
    "span", 4.0, "sweep: sizes from 1/span to span times the best.", flag_values=_FLAGS
)

# Exit code of `check` for a run that is slow; 1 is bad input.
EXIT_SLOW = 2
_VOCAB_SIZE, _HEAD_DIM = 250_880, 128  # of the shapes that `optimal` proposes
# Below this many times the least compute of its runs a law is not asked: tokens were given for FLOPs.
_FAR_BELOW = 1e4


# ---- fit ----


def fit(words: Sequence[str]) -> Any:
    """`fit TABLE`: constants, intervals, residuals, warnings."""
    path = _one(words, "fit", "a table of runs, such as runs.csv")
    if _PLOT.value:
        scaling_plots.check_path(_PLOT.value)
    if _BOOTSTRAP.value < 20:
        raise BadInput(f"--bootstrap={_BOOTSTRAP.value} is too few for intervals; give 20 or more")
    renaming = _renaming()
    curves, shared, remarks = read_curves(path, renaming)
    if any(curve.language for curve in curves):
        if _APPROACH.value != "3" or _PLOT.value:
            raise BadInput(
                f"{path} has languages: they are fitted by approach 3 with shares, without --plot"
            )
        return _fit_languages(curves, remarks)
    if _PLOT.value and _APPROACH.value == "repeated":
        raise BadInput("approach repeated has no picture; leave --plot out")
    found = fit_curves(curves, _APPROACH.value, _STARTS.value, _BOOTSTRAP.value)
    details = found.details | {"text": shared}
    details["params_column"] = {new: old for old, new in renaming.items()}.get("params", "params")
    found = dataclasses.replace(
        found, details=details, warnings=(*found.warnings, *(f"{path}: {r}" for r in remarks))
    )
    if _PLOT.value:
        scaling_plots.plot_fit(found, curves, _PLOT.value)
    _show(found.record(), lambda: _print_fit(found))
    return None


def fit_curves(curves: Sequence[Curve], approach: str, starts: int, bootstrap: int) -> Fit:
    """The fit of one approach. Laws of the loss get the profile of the curves, which `check` needs."""
    runs = final_runs(curves)
    if approach == "1":
        return fit_envelope(curves, num_bootstrap=bootstrap)
    if approach == "2":
        return fit_isoflop(runs, num_bootstrap=bootstrap)
    if approach == "repeated":
        base, warnings = _base_of_repetition()
        found = scaling_fits.fit_repetition(runs, base, num_bootstrap=bootstrap)
        return dataclasses.replace(found, warnings=(*found.warnings, *warnings))
    if approach == "3":
        found = scaling_fits.fit_parametric(runs, num_starts=starts, num_bootstrap=bootstrap)
    elif approach == "kaplan":
        found = scaling_fits.fit_kaplan(runs, num_bootstrap=bootstrap)
    else:
        raise BadInput(f"--approach={approach}: there are 1, 2, 3, kaplan and repeated")
    law = found.law
    assert isinstance(law, ParametricLaw | KaplanLaw)
    try:
        profile = loss_curves.fit_profile(curves, law).record()
    except BadInput:
        return found
    return dataclasses.replace(found, details=found.details | {"profile": profile})


def _base_of_repetition() -> tuple[ParametricLaw, list[str]]:
    """The law of unrepeated text that --law names, and what is to be said of it."""
    name = _LAW.value
    if not _FLAGS["law"].present:
        return DATA_CONSTRAINED.base, [
            "on top of the law of arXiv 2305.16264, of other text: give --law=FILE, of runs that repeat nothing"
        ]
    laws = [Fit.read(name, "--law").law] if _is_file(name) else list(named_laws(name).values())
    bases = [law for law in laws if isinstance(law, ParametricLaw)]
    if not bases:
        raise BadInput(f"--law={name}: repetition is fitted on top of a law of approach 3")
    return bases[-1], []


def _print_fit(found: Fit) -> None:
    limits = found.limits
    print(
        f"approach {found.approach} on {found.num_runs} runs: {_count(limits['params'][0])} to "
        f"{_count(limits['params'][1])} parameters, {_count(limits['tokens'][0])} to "
        f"{_count(limits['tokens'][1])} tokens, {limits['flops'][0]:.3g} to {limits['flops'][1]:.3g} FLOPs"
    )
    for name, value in found.values.items():
        low, high = found.interval[name]
        print(
            f"  {name:<18}{value:>12.5g}   {low:.5g} .. {high:.5g}   ({found.level:.0%} bootstrap)"
        )
    details = found.details
    if "objective" in details:
        print(
            f"  objective {details['objective']:.6g} (sum of Huber losses, delta 1e-3), from {details['num_starts']} "
            f"starts, {details['starts_at_best']:.0%} of which ended there"
        )
    if "params_exponent" in details:
        ends = details.get("params_exponent_interval") or found.interval.get("a")
        span = f" ({ends[0]:.3f} .. {ends[1]:.3f})" if ends else ""
        exponent = details["params_exponent"]
        print(f"  best use of compute: N ~ C^{exponent:.3f}{span}, D ~ C^{1 - exponent:.3f}")
    for budget in details.get("budgets", ()):
        low, high = budget["params_interval"]
        print(
            f"  {budget['flops']:.3g} FLOPs: best size {_count(budget['params'])} ({_count(low)} .. {_count(high)}) on "
            f"{_count(budget['tokens'])} tokens, loss {budget['loss']:.4f}"
        )
    largest = max(found.residuals.tolist(), key=abs)
    what = "best size" if found.approach in ("1", "2") else "loss"
    print(f"  residuals of the {what}: {found.residual_std:.2%} rms, {largest:+.2%} the largest")
    for warning in found.warnings:
        print(f"  warning: {warning}")


def _fit_languages(curves: Sequence[Curve], remarks: Sequence[str]) -> None:
    """A law for each language, and the shares they advise for --params and --tokens (default: the largest run)."""
    for name, value in (("params", _PARAMS.value), ("tokens", _TOKENS.value)):
        if value is not None:
            _check_above_0(name, value)
    fits = language_laws.fit_languages(curves, num_bootstrap=min(_BOOTSTRAP.value, 200))
    weights = _weights(fits)
    runs = final_runs(curves)
    place = int(runs.flops.argmax())
    params = _PARAMS.value or float(runs.params[place])
    tokens = _TOKENS.value or float(runs.tokens[place])
    remarks = list(remarks)
    unique = {c.language: c.unique_tokens for c in curves if c.language and c.unique_tokens}
    try:
        advice = language_laws.advise(
            fits, params, tokens, weights=weights, unique_tokens=unique or None
        )
    except BadInput as error:
        advice = {}
        remarks.append(str(error))
    try:
        rates = language_laws.transfers(curves)
    except BadInput as error:
        rates = {}
        remarks.append(f"no transfer rates: {error}")
    remarks += [f"{name}: {line}" for name, each in rates.items() for line in each.warnings]
    last = {curve.language: curve for curve in curves}
    record = {
        "languages": {name: each.record() for name, each in fits.items()},
        "params": params,
        "tokens": tokens,
        "mixture": {name: each._asdict() for name, each in advice.items()},
        "transfer": {
            name: {"rates": each.rates, "interval": each.interval} for name, each in rates.items()
        },
        "remarks": remarks,
    }

    def show() -> None:
        print(
            f"{len(fits)} languages; shares for {_count(params)} parameters and {_count(tokens)} tokens"
        )
        print(
            f"{'language':<16}{'E':>7}{'alpha':>8}{'beta':>7}{'gamma':>8}{'share now':>11}{'advised':>9}   interval"
        )
        for name, each in fits.items():
            values = each.values
            line = f"{name:<16}{values['E']:>7.3f}{values['alpha']:>8.3f}{values['beta']:>7.3f}"
            line += f"{values['gamma']:>8.3f}" if "gamma" in values else f"{'?':>8}"
            line += f"{last[name].share or math.nan:>11.4f}"
            if name in advice:
                item = advice[name]
                line += f"{item.share:>9.4f}   {item.interval[0]:.4f} .. {item.interval[1]:.4f}"
                line += f"   transfer {_count(item.transferred_tokens)} tokens"
                line += "   (all its text allows)" if item.is_capped else ""
            print(line)
        for name, each in rates.items():
            for other, rate in each.rates.items():
                low, high = each.interval[other]
                print(
                    f"  a token of {other} is worth {rate:.3f} of {name} ({low:.3f} .. {high:.3f})"
                )
        for name, each in fits.items():
            for warning in each.warnings:
                print(f"  warning: {name}: {warning}")
        for remark in remarks:
            print(f"  warning: {remark}")

    _show(record, show)


def _weights(languages: Mapping[str, Any]) -> dict[str, float] | None:
    """--weights. BadInput unless it has a number above 0 for every language."""
    if not _WEIGHTS.value:
        return None
    pairs = [pair.rpartition(":") for pair in _WEIGHTS.value.split(",")]
    try:
        found = {name: float(number) for name, _, number in pairs}
    except ValueError:
        raise BadInput(
            f"--weights={_WEIGHTS.value}: write LANGUAGE:NUMBER, separated by commas"
        ) from None
    for name, number in found.items():
        _check_above_0(f"weights {name}", number)
    if found.keys() != languages.keys():
        raise BadInput(f"--weights has {', '.join(found)}; the table has {', '.join(languages)}")
    return found


# ---- optimal ----


def optimal(words: Sequence[str]) -> Any:
    """`optimal --flops= | --gpu_hours= | --params= | --tokens=`: what to train."""
    _none(words, "optimal")
    given = {
        "flops": _FLOPS.value, "gpu_hours": _GPU_HOURS.value, "params": _PARAMS.value, "tokens": _TOKENS.value,
    }  # fmt: skip
    asked = {name: value for name, value in given.items() if value is not None}
    if len(asked) != 1:
        raise BadInput(
            f"optimal needs exactly one of --flops, --gpu_hours, --params, --tokens; got {', '.join(asked) or 'none'}"
        )
    ((name, value),) = asked.items()
    _check_above_0(name, value)
    rate = _device_rate()
    if name == "gpu_hours":
        name, value = "flops", value * 3600 * rate
    answers = advise(name, value, _LAW.value, _UNIQUE.value)
    for answer in answers:
        answer["gpu_hours"] = answer["flops"] / rate / 3600
    record = {"asked": asked, "device": _DEVICE.value, "mfu": _MFU.value, "answers": answers}
    _show(record, lambda: _print_optimal(asked, answers))
    return None


def _check_above_0(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise BadInput(f"--{name}={value} must be a number above 0")


def _device_rate() -> float:
    """FLOP/s of one device."""
    peak = flop_counts.peak_flops_per_second(_DEVICE.value)
    if peak is None:
        known = ", ".join(flop_counts.PEAK_FLOPS_PER_SECOND)
        raise BadInput(f"--device={_DEVICE.value}: its peak is not known; known: {known}")
    if not 0 < _MFU.value <= 1:
        raise BadInput(f"--mfu={_MFU.value} must lie between 0 and 1")
    return peak * _MFU.value


def advise(
    name: str, value: float, law_name: str, unique_tokens: float | None
) -> list[dict[str, Any]]:
    """What each law of `law_name` makes of a budget ("flops"), a size ("params") or a length ("tokens")."""
    found, laws, details = _read_law(law_name, unique_tokens)
    repeated = found if found and found.approach == "repeated" else None
    limits = found.limits["flops"] if found else CHINCHILLA_FLOPS  # Kaplan's lie no higher
    answers = []
    for label, law in laws.items():
        try:
            best = _solve(law, name, value)
        except ArithmeticError:
            raise BadInput(
                f"--{name}={value:.4g} is beyond all numbers; are the units mixed up?"
            ) from None
        if best.flops < limits[0] / _FAR_BELOW or best.params < 1:
            raise BadInput(
                f"--{name}={value:.4g} means {best.flops:.3g} FLOPs, far below the runs behind the law "
                f"({limits[0]:.3g} to {limits[1]:.3g}); are the units mixed up?"
            )
        if best.tokens > 1e18 or best.params > 1e17:
            raise BadInput(
                f"--{name}={value:.4g} means {best.params:.3g} parameters on {best.tokens:.3g} tokens; "
                "are the units mixed up?"
            )
        answer = {"law": label, **best._asdict()}
        answer["tokens_per_param"] = best.tokens / best.params
        answer["remarks"] = _remarks(law_name, best.flops, limits, details)
        if found and not repeated:
            answer["interval"] = {
                part: found.interval_of(
                    lambda each, part=part: getattr(_solve(each, name, value), part)
                )
                for part in ("params", "tokens", "flops", "loss")
                if getattr(best, part) is not None and part != name
            }
        if best.loss is not None:
            answer["critical_batch_tokens"] = KAPLAN_BATCH.inverse(best.loss)
        answer["shape"] = _shape(best.params, details)
        answers.append(answer)
    if unique_tokens:
        answers.append(_with_repetition(answers[-1]["flops"], unique_tokens, repeated))
    return answers


def _read_law(
    name: str, unique_tokens: float | None = None
) -> tuple[Fit | None, dict[str, Any], Mapping[str, Any]]:
    """The laws of --law that advise a size, by label, the fit if it is a file, and details: which parameters are N.

    A law of repetition needs `unique_tokens`; then its base is the law."""
    if not _is_file(name):
        details = {"params_column": NON_EMBEDDING} if name == "kaplan" else {}
        return None, {f"{name}, {label}": law for label, law in named_laws(name).items()}, details
    found = Fit.read(name, "--law")
    if isinstance(found.law, DataConstrainedLaw) and unique_tokens:
        return found, {f"base of {name}": found.law.base}, found.details
    if isinstance(found.law, DataConstrainedLaw | ShareLaw):
        raise BadInput(
            f"--law={name} is of approach {found.approach}, which says no best size; give 1, 2, 3 or kaplan "
            "(repeated: with optimal --unique_tokens)"
        )
    return found, {f"approach {found.approach} of {name}": found.law}, found.details


def _solve(law: Any, name: str, value: float) -> Optimum:
    solve = {"flops": law.optimum, "params": law.optimum_of_params, "tokens": law.optimum_of_tokens}
    return solve[name](value)


def _with_repetition(flops: float, unique_tokens: float, fit: Fit | None) -> dict[str, Any]:
    law = fit.law if fit else DATA_CONSTRAINED
    assert isinstance(law, DataConstrainedLaw)
    best = law.optimum(flops, unique_tokens)
    interval = {
        part: fit.interval_of(
            lambda each, part=part: getattr(each.optimum(flops, unique_tokens), part)
        )
        for part in ("params", "tokens", "loss")
        if fit
    }
    published = ["constants of arXiv 2305.16264: trust the trend, not the loss"]
    return {
        "law": f"data-constrained, {_count(unique_tokens)} unique tokens",
        **best._asdict(),
        "tokens_per_param": best.tokens / best.params,
        "epochs": best.tokens / unique_tokens,
        "remarks": [] if fit else published,
        "interval": interval,
        "shape": _shape(best.params, {}),
    }


def _remarks(
    law_name: str, flops: float, limits: tuple[float, float], details: Mapping[str, Any]
) -> list[str]:
    remarks = []
    if flops > 10 * limits[1] and law_name != "kaplan":
        remarks.append(
            f"{flops / limits[1]:,.0f} times the compute of the largest run behind the law"
        )
    if law_name == "chinchilla_rounded":
        remarks.append(
            "from the rounded constants of the paper: not what its fit says; take chinchilla"
        )
    if details.get("params_column") == NON_EMBEDDING:
        remarks.append("params, and the 6ND of them, are those outside the embedding")
    if law_name == "kaplan":
        remarks.append("superseded: learning rates were not fitted to the length of the runs")
    return remarks


def _shape(params: float, details: Mapping[str, Any]) -> dict[str, int] | None:
    """A BLOOM of about this size, as a law with `details` counts it, with BLOOM's vocabulary; None if that is more."""
    try:
        # emb_dim / num_layers of BLOOM: 43 at 560M, 205 at 176B.
        aspect = 43 * (params / 560e6) ** 0.27
        shape = scaling_sweep.find_shape(
            params, vocab_size=_VOCAB_SIZE, head_dim=_HEAD_DIM, aspect=min(max(aspect, 20), 400),
            details=details,
        )  # fmt: skip
    except BadInput:
        return None
    return dataclasses.asdict(shape)


def _print_optimal(asked: Mapping[str, float], answers: Sequence[dict[str, Any]]) -> None:
    ((name, value),) = asked.items()
    print(
        f"best run for {name} = {value:.4g} (C = 6ND; {_DEVICE.value} hours at {_MFU.value:.0%} of peak)"
    )
    print(
        f"{'law':<40}{'params':>9}{'tokens':>9}{'tokens/N':>10}{'FLOPs':>11}{'loss':>8}{'GPU hours':>12}"
    )
    for answer in answers:
        loss = "" if answer["loss"] is None else f"{answer['loss']:.3f}"
        hours = (
            f"{answer['gpu_hours']:,.0f}"
            if answer["gpu_hours"] >= 10
            else f"{answer['gpu_hours']:.2g}"
        )
        print(
            f"{answer['law']:<40}{_count(answer['params']):>9}{_count(answer['tokens']):>9}"
            f"{answer['tokens_per_param']:>10.3g}{answer['flops']:>11.3g}{loss:>8}{hours:>12}"
        )
        for part, (low, high) in answer.get("interval", {}).items():
            ends = (
                f"{low:.4g} .. {high:.4g}"
                if part in ("loss", "flops")
                else f"{_count(low)} .. {_count(high)}"
            )
            print(f"    {part}: {ends} (95% bootstrap)")
        if "epochs" in answer:
            print(f"    {answer['epochs']:.1f} epochs")
        shape = answer["shape"]
        if shape:
            print(
                f"    a BLOOM of that size: {shape['num_layers']} layers x {shape['emb_dim']}, "
                f"{shape['num_heads']} heads ({shape['params']:,} parameters, vocabulary {_VOCAB_SIZE:,})"
            )
        if "critical_batch_tokens" in answer:
            print(
                f"    critical batch at that loss: {_count(answer['critical_batch_tokens'])} tokens (Kaplan et al., on "
                "other text: an order of magnitude)"
            )
        for remark in answer["remarks"]:
            print(f"    {remark}")


# ---- table ----


def table_rows() -> list[dict[str, Any]]:
    """Tables 3 and A3 of Chinchilla beside our laws."""
    laws = {1: table_law(1), 2: table_law(2), 3: CHINCHILLA}
    rows = []
    for row in CHINCHILLA_TABLE:
        ours = laws[row.approach].optimum_of_params(row.params)
        ratio = row.flops / (FLOPS_PER_PARAM_TOKEN * row.params * row.tokens)
        remark = ""
        if not 0.9 < ratio < 1.1:
            remark = (
                f"C is {ratio:.2g} x 6ND: a slip in the paper, {row.flops / ratio:.3g} would fit"
            )
        elif abs(ratio - 1) > 0.03:
            remark = f"C is {ratio:.3f} x 6ND"
        rows.append(
            {
                "approach": row.approach,
                "params": row.params,
                "flops": row.flops,
                "tokens": row.tokens,
                "our_flops": ours.flops,
                "our_tokens": ours.tokens,
                "flops_deviation": ours.flops / row.flops - 1,
                "tokens_deviation": ours.tokens / row.tokens - 1,
                "flops_over_6ND": ratio,
                "remark": remark,
            }
        )
    return rows


def table(words: Sequence[str]) -> Any:
    """`table`: the published rows, ours, and where they differ."""
    _none(words, "table")
    rows = table_rows()
    source = "Hoffmann et al. 2022, arXiv 2203.15556: Table 3 (approach 1) and Table A3 (approaches 2, 3)"

    def show() -> None:
        print(f"published: {source}")
        print("ours: 1 and 2 are power laws through those rows, 3 has the unrounded constants")
        header = f"{'':<4}{'params':>8}{'FLOPs':>11}{'tokens':>9}   {'our FLOPs':>11}{'':>9}{'our tokens':>12}"
        print(header)
        for row in rows:
            print(
                f"A{row['approach']:<3}{_count(row['params']):>8}{row['flops']:>11.3g}{_count(row['tokens']):>9}   "
                f"{row['our_flops']:>11.3g}{row['flops_deviation']:>+9.1%}{_count(row['our_tokens']):>12}"
                f"{row['tokens_deviation']:>+9.1%}   {row['remark']}".rstrip()
            )

    _show({"source": source, "rows": rows}, show)
    return None


# ---- collect, sweep, check ----


def collect(words: Sequence[str]) -> Any:
    """`collect MODEL_DIR...`: a table of runs."""
    if not words:
        raise BadInput("collect needs the MODEL_DIRs of finished runs")
    if _OUT.value and Path(_OUT.value).exists():
        raise BadInput(f"--out={_OUT.value} exists; give a new file")
    rows: list[dict[str, Any]] = []
    for word in words:
        run = scaling_collect.read_run(word)
        if not run.is_finished:
            done = run.records[-1]["tokens"] / run.end_tokens
            print(f"{word}: {done:.0%} done, left out", file=sys.stderr)
            continue
        if run.unique_tokens is None:
            print(f"{word}: its token store is not there; unique_tokens unknown", file=sys.stderr)
        rows += scaling_collect.rows(run, _LOSS.value, _BY_LANGUAGE.value)
    if not rows:
        raise BadInput(f"none of the {len(words)} runs is finished")
    if _JSON.value:
        text = json.dumps(rows) + "\n"
    else:
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(scaling_collect.COLUMNS)
        writer.writerows([row[name] for name in scaling_collect.COLUMNS] for row in rows)
        text = file.getvalue()
    if _OUT.value:
        write_whole(Path(_OUT.value), text.encode())
        print(f"{_OUT.value}: {len(rows)} points of {len({row['run'] for row in rows})} runs")
    else:
        print(text, end="")
    return None


def sweep(words: Sequence[str]) -> Any:
    """`sweep --gin_file=BASE --flops=TOTAL --out=FOLDER`: gin overlays of an isoFLOP sweep."""
    _none(words, "sweep")
    if _FLOPS.value is None or not _OUT.value:
        raise BadInput("sweep needs --flops (of all runs together) and --out (a new folder)")
    is_positive = 0 < _FLOPS.value < math.inf and 1 < _SPAN.value < math.inf
    if _BUDGETS.value < 1 or _SIZES.value < 1 or not is_positive:
        raise BadInput(
            "sweep needs --budgets and --sizes of at least 1, --span above 1, --flops above 0"
        )
    _, laws, details = _read_law(_LAW.value)
    law = list(laws.values())[-1]
    budgets = scaling_sweep.budgets_of(_FLOPS.value, _BUDGETS.value, _SIZES.value, 3.0)
    runs, remarks = scaling_sweep.plan(
        scaling_sweep.read_base(), law, budgets, _SIZES.value, _SPAN.value, _OUT.value, details
    )
    if not runs:
        raise BadInput(f"no run fits into --flops={_FLOPS.value:.3g}: {remarks[0]}")
    for run in runs:
        scaling_sweep.check_builds(run)
    scaling_sweep.write(runs, Path(_OUT.value))
    record = {
        "folder": _OUT.value,
        "flops": sum(run.flops for run in runs),
        "runs": [
            {
                "name": run.name, "params": run.shape.params, "tokens": run.tokens, "flops": run.flops,
                "steps": run.num_steps, "batch_size": run.batch_size_samples,
            }
            for run in runs
        ],
        "remarks": remarks,
    }  # fmt: skip

    def show() -> None:
        for run in runs:
            shape = run.shape
            print(
                f"{run.name:<24}{shape.num_layers:>3} x {shape.emb_dim:<5}{_count(shape.params):>8} parameters"
                f"{_count(run.tokens):>9} tokens{run.num_steps:>8} steps of {run.batch_size_samples}"
            )
        for remark in remarks:
            print(f"warning: {remark}")
        print(
            f"{len(runs)} runs, {record['flops']:.3g} FLOPs; train them with: sh {_OUT.value}/runs.sh"
        )

    _show(record, show)
    return None


def check(words: Sequence[str]) -> Any:
    """`check MODEL_DIR --law=FILE`: is this run on its curve? Exit code 2 if it is slow."""
    path = _one(words, "check", "a MODEL_DIR")
    if not _is_file(_LAW.value):
        raise BadInput(
            f"check needs --law=FILE of `fit --json`: {_LAW.value} was fitted to other text with another vocabulary"
        )
    if _PLOT.value:
        scaling_plots.check_path(_PLOT.value)
    law = Fit.read(_LAW.value, "--law")
    loss_kind = loss_curves.loss_kind_of(law, _LOSS.value)
    run = scaling_collect.read_run(path)
    is_kaplan = law.details.get("params_column") == NON_EMBEDDING
    params = run.params_non_embedding if is_kaplan else run.params
    curve = dataclasses.replace(run.curve(loss_kind), params=params)
    verdict = loss_curves.check(curve, run.end_tokens, law)
    verdict = loss_curves.check_text(verdict, law, text_of_run(run.path, run.sequence_length))
    if _PLOT.value:
        scaling_plots.plot_check(verdict, curve, run.end_tokens, _PLOT.value)
    record = dataclasses.asdict(verdict) | {"params": params, "end_tokens": run.end_tokens}
    record["band"] = verdict.band.tolist()
    record["loss_kind"] = loss_kind
    size = f"{_count(params)} parameters" + (" outside the embedding" if is_kaplan else "")
    of = f"{path}: {size}, {verdict.fraction:.0%} of {_count(run.end_tokens)} tokens"
    _show(record, lambda: _print_check(of, verdict, loss_kind))
    return EXIT_SLOW if verdict.verdict == "slow" else 0


def _print_check(of: str, verdict: loss_curves.Verdict, loss_kind: str) -> None:
    print(f"{of}: {verdict.verdict}")
    if verdict.expected is not None and verdict.interval is not None:
        low, high = verdict.interval
        print(
            f"  {loss_kind} loss {verdict.loss:.4f}, expected now {verdict.expected:.4f} ({low:.4f} .. {high:.4f})"
        )
    low, high = verdict.end_interval
    print(f"  at the end: predicted {verdict.end_predicted:.4f} ({low:.4f} .. {high:.4f})", end="")
    print("" if verdict.end_projected is None else f", on course for {verdict.end_projected:.4f}")
    if verdict.effective_params is not None and verdict.hidden_params is not None:
        size = (
            "no size" if math.isinf(verdict.effective_params) else _count(verdict.effective_params)
        )
        print(
            f"  as good as {size} parameters trained well; the band would hide one of {_count(verdict.hidden_params)}"
        )
    for line in [*verdict.reasons, *verdict.remarks]:
        print(f"  {line}")


# ---- words, laws, printing ----


def _count(number: float) -> str:
    """1234567 as 1.23M."""
    if not math.isfinite(number):
        return str(number)
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            value = number / size
            return f"{value:.0f}{letter}" if abs(value) >= 99.95 else f"{value:.3g}{letter}"
    return f"{number:.3g}"


def _show(record: Mapping[str, Any], show: Callable[[], None]) -> None:
    if _JSON.value:
        print(json.dumps(_finite(record), allow_nan=False))
    else:
        show()


def _finite(value: Any) -> Any:
    """JSON knows no inf and no nan: null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _renaming() -> dict[str, str]:
    pairs = [pair.split(":") for pair in _COLUMNS.value.split(",") if pair]
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise BadInput(f"--columns={_COLUMNS.value}: write OLD:NEW, separated by commas")
    return dict(pairs)


def _is_file(law: str) -> bool:
    return "/" in law or law.endswith(".json") or Path(law).is_file()


def _one(words: Sequence[str], verb: str, what: str) -> str:
    if len(words) != 1:
        raise BadInput(f"{verb} needs {what}; got {' '.join(words) or 'nothing'}")
    return words[0]


def _none(words: Sequence[str], verb: str) -> None:
    if words:
        raise BadInput(f"{verb} takes flags only, got {words[0]!r}")


_VERBS = {
    "fit": fit, "optimal": optimal, "table": table, "collect": collect, "sweep": sweep, "check": check,
}  # fmt: skip


def split_words(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words and flags of a command line; `--flag value` is turned into `--flag=value`."""
    words, found = [], []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            words.append(word)
            continue
        name = word.lstrip("-")
        known = _FLAGS if name in _FLAGS else flags.FLAGS
        takes_value = name in known and not known[name].boolean
        if "=" not in word and takes_value and rest:
            word = f"{word}={rest.pop(0)}"
        found.append(word)
    return words, found


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the verb that `argv` (default: the command line) names."""
    program, *arguments = sys.argv if argv is None else argv
    words, found = split_words(arguments)

    def run() -> Any:
        if not words or words[0] not in _VERBS:
            raise BadInput(
                f"{words[0] if words else 'no verb'!r}: the verbs are {', '.join(_VERBS)}"
            )
        return _VERBS[words[0]](words[1:])

    config.call(run, [program, *found], _FLAGS)


if __name__ == "__main__":
    main()
