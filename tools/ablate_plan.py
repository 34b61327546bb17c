"""The runs of an ablation: one gin file an overlay and seed, all on the same data in the same order."""

import dataclasses
import inspect
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bloomjax import config
from bloomjax.errors import BadInput
from bloomjax.files import write_whole
from bloomjax.schedules import BatchSchedule, CosineSchedule, run_length_steps

BASE = "base"  # in place of an overlay: none
# What an overlay must leave as it is: which tokens are trained on, in which order and batches, and which are held out.
_DATA = (
    "train.train_data", "train.eval_data", "train.batch_schedule", "train.train_steps", "train.train_samples",
    "train.vocabulary_path",
)  # fmt: skip
# What is predicted from the same samples, how much of each is seen, and how many are a batch at first may differ.
_NOT_DATA = (
    "objective", "_curriculum", "ramp_start_samples", "ramp_increment_samples", "ramp_length_samples", "_stages",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """One overlay (or several at once) with one seed; `text` is its gin file, which runs alone."""

    overlay: str
    seed: int
    folder: Path
    text: str

    @property
    def name(self) -> str:
        return f"{self.overlay}-{self.seed}"

    @property
    def model_dir(self) -> Path:
        return self.folder / self.name

    @property
    def gin_file(self) -> Path:
        return self.folder / f"{self.name}.gin"


def parse_overlays(text: str) -> dict[str, list[str]]:
    """{name: gin files} of "a.gin,b.gin+c.gin,base". BadInput for one that does not exist, or a name twice."""
    found: dict[str, list[str]] = {}
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise BadInput(
            "--overlays needs gin files, such as ablations/alibi.gin,ablations/rotary.gin"
        )
    for word in words:
        files = [] if word == BASE else word.split("+")
        for file in files:
            config.find(file)
        name = "+".join(Path(file).stem for file in files) or BASE
        if name in found:
            there = "+".join(found[name]) or BASE
            raise BadInput(
                f"--overlays has two with the name {name}: {there} and {word}; give one of them another file name"
            )
        found[name] = files
    return found


def parse_numbers(flag: str, text: str) -> list[int]:
    """Of "1,2". BadInput unless they are different whole numbers, 0 or more."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdecimal() for word in words) or len(set(words)) < len(words):
        raise BadInput(f"--{flag}={text}: give different whole numbers, such as 1,2")
    return [int(word) for word in words]


def plan(
    overlays: Mapping[str, Sequence[str]], seeds: Sequence[int], folder: Path, tokens: int | None
) -> list[Run]:
    """A run for each overlay and seed, seeds of one overlay together.

    `tokens` is the length of each, with schedules as long; None for that of the gin files. BadInput where an overlay
    changes the data, or has a ramp or curriculum that such a run does not get through.
    """
    # The store is made before the first of them.
    shared: dict[str, Any] = {
        "train.model_dir": str(folder), "train.sample_prompts": (), "train.prepare": None, "train.text_dir": None,
    }  # fmt: skip
    text = config.combined("train", bindings=_bindings(shared))
    factor = 1.0
    if tokens is not None:
        factor, shared["train.train_steps"] = _scale(text, tokens)
        shared["train.train_samples"] = None
    shared["TrainData.seed"] = _build(text, ["train.train_data"])[0].seed
    base = _build(config.combined("train", bindings=_bindings(shared)), _DATA)
    runs = []
    for name, files in overlays.items():
        own = shared | {"train.model_dir": str(folder / name)}
        text = config.combined("train", files, _bindings(own))
        *found, _ = _build(text, [*_DATA, "train.model"])  # that it is one
        _check_data(name, base, found)
        own |= _schedules(name, text, factor, base)
        for seed in seeds:
            own |= {"train.seed": seed, "train.model_dir": str(folder / f"{name}-{seed}")}
            text = config.combined("train", files, _bindings(own))
            head = f"# {' and '.join(files) or 'No overlay'}, initial weights and dropout of seed {seed}.\n"
            runs.append(Run(name, seed, folder, head + text))
    return runs


def _bindings(values: Mapping[str, Any]) -> list[str]:
    return [f"{name} = {value!r}" for name, value in values.items()]


def _build(text: str, names: Sequence[str]) -> list[Any]:
    """What a gin file binds to `names`; None for what it does not bind."""
    with tempfile.TemporaryDirectory() as folder:
        gin_file = Path(folder) / "run.gin"
        gin_file.write_text(text, encoding="utf-8")
        return [config.build(name, gin_file) for name in names]


def _scale(text: str, tokens: int) -> tuple[float, int]:
    """How many times as long as the gin file's a run of about `tokens` tokens is, and its steps."""
    batches, length, *old = _build(
        text,
        ["train.batch_schedule", "TrainData.sequence_length", "train.train_steps", "train.train_samples"],
    )  # fmt: skip
    assert isinstance(batches, BatchSchedule)
    size = batches.batch_size_samples
    samples = tokens // length // size * size
    if samples < 1:
        raise BadInput(
            f"--tokens={tokens:,} do not fill a batch of {size} samples of {length} tokens"
        )
    factor = samples / batches.samples_after(run_length_steps(batches, *old))
    return factor, _scaled_ramp(batches, factor).steps_within(samples)


def _scaled_ramp(batches: BatchSchedule, factor: float) -> BatchSchedule:
    ramp = batches.ramp_length_samples
    if ramp is None:
        return batches
    return dataclasses.replace(batches, ramp_length_samples=max(1, round(ramp * factor)))


def _schedules(name: str, text: str, factor: float, base: Sequence[Any]) -> dict[str, Any]:
    """Bindings that make the schedules of an overlay's run `factor` times as long, and it as long in samples as the
    base. BadInput where a ramp or curriculum does not come to its end within it."""
    names = ["train.batch_schedule", "train.learning_rate", "train.train_data"]
    batches, rate, data = _build(text, names)
    assert isinstance(batches, BatchSchedule) and isinstance(rate, CosineSchedule)
    base_batches, *length = base[2:5]  # of _DATA
    found: dict[str, Any] = {}
    if factor != 1:
        decay = max(2, round(rate.decay_samples * factor))
        found["CosineSchedule.decay_samples"] = decay
        warmup = round(rate.warmup_samples * factor)
        found["CosineSchedule.warmup_samples"] = min(warmup, decay - 1)
    scaled = _scaled_ramp(batches, factor)
    if scaled != batches:
        found["BatchSchedule.ramp_length_samples"] = scaled.ramp_length_samples
    base_batches = _scaled_ramp(base_batches, factor)
    samples = base_batches.samples_after(run_length_steps(base_batches, *length))
    if scaled != base_batches:
        found |= {"train.train_steps": None, "train.train_samples": samples}
    num_steps = scaled.steps_within(samples)
    ends = {"batch-size ramp": scaled.stages()[-1].first_step}
    if curriculum := data._curriculum:
        steps = max(1, round(curriculum.num_steps * factor))
        curriculum = dataclasses.replace(curriculum, num_steps=steps, batch_schedule=scaled)
        if factor != 1:
            found["LengthCurriculum.num_steps"] = steps
        ends["length curriculum"] = curriculum.stages[-1].first_step
    for kind, end in ends.items():
        if end > num_steps:
            raise BadInput(
                f"overlay {name}: its {kind} ends at step {end:,}, the run after {num_steps:,} steps; make it shorter, "
                "or leave the base as long as it is meant for and give --tokens, which shortens both"
            )
    return found


def _check_data(name: str, base: Sequence[Any], found: Sequence[Any]) -> None:
    for label, before, after in zip(_DATA, base, found, strict=True):
        for where, was, is_ in _differences(label, before, after):
            raise BadInput(
                f"overlay {name} changes the data ({where}: {was!r}, now {is_!r}); runs are compared on the same "
                "tokens in the same order: train it by itself, or put that change into the gin files of all"
            )


def _differences(where: str, before: Any, after: Any) -> Iterator[tuple[str, Any, Any]]:
    """Places in which two objects differ that gin has built."""
    same_type = type(before) is type(after)
    if same_type and hasattr(before, "__dict__") and not inspect.isroutine(before):
        names = [n for n in {**vars(before), **vars(after)} if n not in _NOT_DATA]
        for name in names:
            parts = vars(before).get(name), vars(after).get(name)
            yield from _differences(f"{where}.{name.strip('_')}", *parts)
    elif isinstance(before, tuple | list) and isinstance(after, tuple | list):
        if len(before) != len(after):
            yield where, before, after
            return
        for number, parts in enumerate(zip(before, after, strict=True)):
            yield from _differences(f"{where}[{number}]", *parts)
    elif before != after:
        yield where, before, after


def write(runs: Sequence[Run]) -> None:
    """The gin files. BadInput, before any is written, where one is there that says something else."""
    for run in runs:
        if not run.gin_file.exists():
            continue
        old = run.gin_file.read_text(encoding="utf-8").splitlines()[1:]
        new = run.text.splitlines()[1:]
        changed = sorted(set(new) ^ set(old))
        if changed:
            now = "now" if changed[0] in new else "no longer"
            raise BadInput(
                f"{run.gin_file} is there and differs: {changed[0].strip()!r} is {now} so; take another --out"
            )
    for run in runs:
        if not run.gin_file.exists():
            write_whole(run.gin_file, run.text.encode())
