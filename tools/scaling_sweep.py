"""The runs of an isoFLOP sweep as gin overlays: sizes around the best one, cosine as long as each run."""

import csv
import dataclasses
import io
import math
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from bloomjax import config
from bloomjax.activations import Gelu
from bloomjax.errors import BadInput
from bloomjax.files import write_whole
from bloomjax.model import BloomConfig
from bloomjax.scaling_laws import FLOPS_PER_PARAM_TOKEN, Law
from bloomjax.scaling_runs import num_params_of
from bloomjax.schedules import BatchSchedule, CosineSchedule

# Of BLOOM's own sizes: peak 3e-4 at 1,024 wide, 6e-5 at 14,336 (BigScience train/tr11-176B-ml), which is width^-0.61.
PEAK_EXPONENT = -0.61
# Fewer steps than this tell more of the warm-up than of the size; the batch shrinks first.
MIN_STEPS = 200
_WARMUP = (0.02, 0.1)  # share of a run, at least and at most


@dataclasses.dataclass(frozen=True)
class Shape:
    """A BLOOM of a wanted size. params: exact count."""

    num_layers: int
    emb_dim: int
    num_heads: int
    params: int


def find_shape(
    params: float,
    *,
    vocab_size: int,
    head_dim: int,
    aspect: float,
    max_layers: int = 160,
    like: BloomConfig | None = None,
    details: Mapping[str, Any] = MappingProxyType({}),
) -> Shape:
    """Of the BLOOMs within 5 % of `params` the one nearest to `aspect` (emb_dim / num_layers), else the nearest one.

    Widths are multiples of `head_dim`, of 16 where heads are small. `like` says which positions, activation, norms and
    head they have; None for BLOOM's. `details` of a law say which parameters count (`num_params_of`). BadInput if none
    comes within 30 %: the embedding alone may be larger.
    """
    activation = Gelu() if like is None else like.activation
    parts = {} if like is None else {k: like.shape[k] for k in like.shape if k.startswith("num_")}
    parts.pop("num_layers", None)
    step = head_dim if head_dim >= 64 else 16
    width = step * np.arange(1, 513)[:, None]
    layers = np.arange(1, max_layers + 1)[None, :]
    mlp_dim: Any = np.array([[activation.default_mlp_dim(int(each))] for each in width[:, 0]])
    parts["vocab_size"] = vocab_size
    arrays = {"emb_dim": width, "num_layers": layers, "mlp_dim": mlp_dim}
    count = num_params_of(arrays | parts, details)
    off = np.abs(np.log(count / params))
    penalty = 10 * np.maximum(off - 0.05, 0) + np.abs(np.log(width / layers / aspect))
    row, column = np.unravel_index(np.argmin(penalty), penalty.shape)
    num_layers, emb_dim = int(layers[0, column]), int(width[row, 0])
    divisors = [n for n in range(1, emb_dim // 8 + 1) if emb_dim % n == 0]
    mlp_dim = activation.default_mlp_dim(emb_dim)
    shape = {"emb_dim": emb_dim, "num_layers": num_layers, "mlp_dim": mlp_dim, **parts}
    num = num_params_of(shape, details)
    if abs(math.log(num / params)) > math.log(1.3):
        raise BadInput(
            f"no BLOOM with heads of {head_dim} and a vocabulary of {vocab_size:,} has about {params:.3g} parameters; "
            f"the nearest has {num:,}"
        )
    heads = min(divisors, key=lambda n: abs(math.log(emb_dim / n / head_dim)))
    return Shape(num_layers, emb_dim, heads, num_params_of(shape, {}))


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep; `overlay` is its gin file."""

    name: str
    shape: Shape
    budget_flops: float
    tokens: int
    num_steps: int
    batch_size_samples: int
    overlay: dict[str, Any]

    @property
    def flops(self) -> float:
        return FLOPS_PER_PARAM_TOKEN * self.shape.params * self.tokens

    def text(self, base: str) -> str:
        """The gin file."""
        head = (
            f"# isoFLOP sweep at {self.budget_flops:.3g} FLOPs: {self.shape.params:,} parameters on {self.tokens:,} "
            f"tokens,\n# cosine as long as the run. After the files of the base:\n#   {base}\n"
        )
        return head + "".join(f"{name} = {value!r}\n" for name, value in self.overlay.items())


@dataclasses.dataclass(frozen=True)
class Base:
    """What the sweep varies: read from the gin files on the command line."""

    model: BloomConfig
    batches: BatchSchedule
    learning_rate: CosineSchedule
    sequence_length: int


def read_base() -> Base:
    """Of the gin flags of this process. BadInput where they lack something."""
    return Base(
        config.build("Bloom.config"),
        config.build("train.batch_schedule"),
        config.build("train.learning_rate"),
        config.build("TrainData.sequence_length"),
    )


def budgets_of(total_flops: float, num_budgets: int, num_sizes: int, step: float) -> list[float]:
    """Budgets a factor `step` apart, cheapest first, of which `num_sizes` runs each cost `total_flops` together."""
    weights = [step**-number for number in range(num_budgets)]
    largest = total_flops / (num_sizes * sum(weights))
    return [largest * weight for weight in reversed(weights)]


def plan(
    base: Base,
    law: Law,
    budgets: Sequence[float],
    num_sizes: int,
    span: float,
    runs_dir: str,
    details: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[list[PlannedRun], list[str]]:
    """Runs of `num_sizes` sizes from 1/span to span times the best one by `law`, at each budget; and remarks.

    `details` of the law say which parameters it counts. Sizes that fall on the same shape are one run.
    """
    runs, remarks = [], []
    for budget in budgets:
        best = law.optimum(budget).params
        there = set()
        for params in np.geomspace(best / span, best * span, num_sizes).tolist():
            try:
                shape = find_shape(
                    params,
                    vocab_size=base.model.vocab_size,
                    head_dim=base.model.head_dim,
                    aspect=base.model.emb_dim / base.model.num_layers,
                    like=base.model,
                    details=details,
                )
            except BadInput as error:
                remarks.append(f"{budget:.3g} FLOPs: {error}; left out")
                continue
            if shape.params in there:
                continue
            there.add(shape.params)
            runs.append(_plan_run(base, shape, budget, runs_dir))
        if len(there) < 4:
            remarks.append(f"{budget:.3g} FLOPs: {len(there)} sizes; a parabola needs 4")
    short = [run for run in runs if run.num_steps < MIN_STEPS]
    if short:
        remarks.append(
            f"{len(short)} runs have fewer than {MIN_STEPS} steps (such as {short[0].name} with {short[0].num_steps})"
        )
    return runs, remarks


def _plan_run(base: Base, shape: Shape, budget: float, runs_dir: str) -> PlannedRun:
    wanted = budget / (FLOPS_PER_PARAM_TOKEN * shape.params * base.sequence_length)  # samples
    batch = base.batches.batch_size_samples
    while batch > 1 and wanted / batch < MIN_STEPS:
        batch = -(-batch // 2)
    num_steps = max(1, round(wanted / batch))
    samples = num_steps * batch
    rate = base.learning_rate
    exponent = 0.0 if base.model.mup else PEAK_EXPONENT  # with muP one peak is for all widths
    peak = rate.peak * (shape.emb_dim / base.model.emb_dim) ** exponent
    warmup = min(max(rate.warmup_samples / rate.decay_samples, _WARMUP[0]), _WARMUP[1])
    name = f"c{budget:.2g}-n{shape.params}".replace("+", "")
    overlay: dict[str, Any] = {
        "MODEL_DIR": f"{runs_dir}/{name}",
        "NUM_LAYERS": shape.num_layers,
        "EMB_DIM": shape.emb_dim,
        "NUM_HEADS": shape.num_heads,
        "BloomConfig.expected_params": shape.params,
        "BATCH_SIZE": batch,
        "TRAIN_STEPS": num_steps,
        "TRAIN_SAMPLES": None,
        "CosineSchedule.peak": float(f"{peak:.4g}"),
        "CosineSchedule.end": float(f"{peak * rate.end / rate.peak:.4g}"),
        "CosineSchedule.warmup_samples": min(max(1, round(warmup * samples)), samples - 1),
        "CosineSchedule.decay_samples": samples,
        "EVAL_EVERY_STEPS": max(1, num_steps // 4),
        "SAVE_EVERY_STEPS": num_steps,
        "train.sample_prompts": (),
    }
    if base.model.mlp_dim is not None:
        overlay["BloomConfig.mlp_dim"] = None
    if base.batches.ramp_start_samples is not None:
        for part in ("start", "increment", "length"):
            overlay[f"BatchSchedule.ramp_{part}_samples"] = None
    return PlannedRun(
        name, shape, budget, samples * base.sequence_length, num_steps, batch, overlay
    )


def check_builds(run: PlannedRun) -> None:
    """BadInput unless the base with this overlay gives the model and the schedule that were planned."""
    bindings = [f"{name} = {value!r}" for name, value in run.overlay.items()]
    model = config.build("Bloom.config", bindings=bindings)
    rate = config.build("train.learning_rate", bindings=bindings)
    batches = config.build("train.batch_schedule", bindings=bindings)
    num = num_params_of(model.shape, {})
    samples = batches.samples_after(config.build("train.train_steps", bindings=bindings))
    if num != run.shape.params or samples != rate.decay_samples:
        raise BadInput(
            f"{run.name}: the gin files override the overlay: {num:,} parameters for {run.shape.params:,}, "
            f"{samples:,} samples for a cosine of {rate.decay_samples:,}; does the base use NUM_LAYERS, EMB_DIM, "
            "BATCH_SIZE and TRAIN_STEPS?"
        )


def write(runs: Sequence[PlannedRun], folder: Path) -> None:
    """FOLDER with an overlay a run, runs.csv, and runs.sh, which trains them all. BadInput if it is there."""
    if folder.exists():
        raise BadInput(f"{folder} exists; a sweep is written into a new folder (--out)")
    base = f"python -m bloomjax.train {shlex.join(config.arguments())}".rstrip()
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(
        ["run", "params", "tokens", "flops", "steps", "batch_size", "num_layers", "emb_dim"]
    )
    commands = []
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        for run in runs:
            command = f"{base} --gin_file={shlex.quote(str(folder / run.name))}.gin"
            commands.append(command)
            write_whole(partial / f"{run.name}.gin", run.text(command).encode())
            shape = run.shape
            writer.writerow(
                [
                    run.overlay["MODEL_DIR"], shape.params, run.tokens, f"{run.flops:.6g}", run.num_steps,
                    run.batch_size_samples, shape.num_layers, shape.emb_dim,
                ]
            )  # fmt: skip
        write_whole(partial / "runs.csv", table.getvalue().encode())
        write_whole(partial / "runs.sh", ("set -e\n" + "\n".join(commands) + "\n").encode())
        partial.chmod(0o755)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
