"""Was the batch of a run wasteful or too small? Its gradient noise scale against its batch size, as a table and a plot.

    python tools/noise_scale.py runs/tiny [--plot=noise.png] [--decay=0.99] [--json]

Reads metrics.jsonl, also while the run goes on. The terms of a step are there when it has at least two microbatches
(StepOptions.microbatch_size_samples), those of languages with --gin.train.language_noise=@LanguageNoise(). It loads no
JAX and writes nothing but the plot. docs/scaling_laws.md; bloomjax/noise_scale.py has the formulas.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import scaling_plots
from absl import flags

from bloomjax import config
from bloomjax.errors import BadInput
from bloomjax.journal import read_lines
from bloomjax.noise_scale import averaged, verdict

_FLAGS = flags.FlagValues()
_MODEL_DIR = flags.DEFINE_string(
    "model_dir", None, "MODEL_DIR of a run; may also be the first argument.", flag_values=_FLAGS
)
_DECAY = flags.DEFINE_float(
    "decay", 0.99, "Weight of the past in both averages, a step.", flag_values=_FLAGS
)
_PLOT = flags.DEFINE_string("plot", None, "A picture, .png, .svg or .pdf.", flag_values=_FLAGS)
_JSON = flags.DEFINE_bool("json", False, "One JSON object.", flag_values=_FLAGS)
_NUM_ROWS = 10  # of the table


def read(model_dir: Path, decay: float) -> dict[str, Any]:
    """`steps`, `batch_size_samples`, `noise_scale_samples` of the run, and `languages`: noise scale and how often
    measured.

    BadInput if nothing was measured.
    """
    path = model_dir / "metrics.jsonl"
    if not path.is_file():
        raise BadInput(f"{model_dir} is no MODEL_DIR of a run: it has no metrics.jsonl")
    records = [record for record in read_lines(path)[0] if record.get("step", 0) > 0]
    terms = [
        (r["step"], r["gradient_noise"], r["gradient_signal"])
        for r in records
        if r.get("gradient_noise") is not None
    ]
    languages: dict[str, list[tuple[int, float, float]]] = {}
    for record in records:
        for name, both in record.get("noise_by_language", {}).items():
            languages.setdefault(name, []).append((record["step"], both["noise"], both["signal"]))
    if not terms and not languages:
        raise BadInput(
            f"{path} has no gradient noise: the run needs two microbatches (StepOptions.microbatch_size_samples) "
            "or --gin.train.language_noise=@LanguageNoise()"
        )
    sizes = {record["step"]: record["batch_size"] for record in records if "batch_size" in record}
    scales = [(step, scale) for step, scale in averaged(terms, decay) if step in sizes]
    return {
        "model_dir": str(model_dir),
        "steps": [step for step, _ in scales],
        "batch_size_samples": [sizes[step] for step, _ in scales],
        "noise_scale_samples": [scale for _, scale in scales],
        "languages": {
            name: {"measured": len(found), "noise_scale_samples": _last(averaged(found, 0.9))}
            for name, found in sorted(languages.items())
        },
    }


def _last(scales: list[tuple[int, float]]) -> float | None:
    return scales[-1][1] if scales else None


def lines(found: Mapping[str, Any]) -> list[str]:
    """The table, for a person."""
    rows = list(
        zip(found["steps"], found["batch_size_samples"], found["noise_scale_samples"], strict=True)
    )
    out = []
    if rows:
        out.append(f"{'step':>8}  {'batch':>7}  {'noise scale':>11}  samples")
        every = max(1, len(rows) // _NUM_ROWS)
        for step, batch, scale in rows[every - 1 :: every]:
            out.append(f"{step:>8}  {batch:>7,}  {scale:>11,.4g}  {verdict(scale, batch)}")
    measured = {k: v for k, v in found["languages"].items() if v["noise_scale_samples"]}
    if measured:
        out.append(f"{'language':>16}  {'noise scale':>11}  measured")
        ranked = sorted(measured.items(), key=lambda item: -item[1]["noise_scale_samples"])
        out += [
            f"{name:>16}  {v['noise_scale_samples']:>11,.4g}  {v['measured']:>8}"
            for name, v in ranked
        ]
    if unknown := sorted(set(found["languages"]) - set(measured)):
        out.append(f"no signal seen yet in: {', '.join(unknown)}")
    if not rows and not measured and not unknown:
        out.append("no signal seen yet")
    return out


def noise_scale() -> None:
    """The tool. BadInput for a folder that is no run, or one that measured nothing."""
    if _MODEL_DIR.value is None:
        raise BadInput("give the MODEL_DIR of a run: noise_scale.py MODEL_DIR")
    if _PLOT.value:
        scaling_plots.check_path(_PLOT.value)
    found = read(Path(_MODEL_DIR.value), _DECAY.value)
    if _PLOT.value:
        if not found["steps"]:
            raise BadInput(f"--plot: no step of {_MODEL_DIR.value} has a noise scale yet")
        scaling_plots.plot_noise(found, _PLOT.value)
    print(json.dumps(found) if _JSON.value else "\n".join(lines(found)))


def main(argv: list[str] | None = None) -> None:
    """The command, also with the arguments of a test."""
    program, *arguments = sys.argv if argv is None else argv
    if arguments and not arguments[0].startswith("-"):
        arguments[0] = f"--model_dir={arguments[0]}"
    config.call(noise_scale, [program, *arguments], _FLAGS)


if __name__ == "__main__":
    main()
