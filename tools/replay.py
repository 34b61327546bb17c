"""Takes steps of a run again from a checkpoint: do loss and gradient norm come out bit-equal, and which sample was it?

    python tools/replay.py --checkpoint=runs/tiny/checkpoints/20 --step=23
    python tools/replay.py --checkpoint=runs/tiny --step=23 --worst=5
    python tools/replay.py --checkpoint=runs/tiny --step=23 --without_samples=176-179,183
    python tools/replay.py --checkpoint=runs/tiny --step=23 --before_rollback

--checkpoint is a checkpoint, or MODEL_DIR: the newest before --step. MODEL_DIR/checkpoints/0 means the weights before
step 1. The configuration is MODEL_DIR/config.gin, which the last start has written, unless --gin_file is given;
--gin.NAME=VALUE changes it. Steps up to --step are taken as `train` takes them and compared with metrics.jsonl (with
journal.jsonl or metrics.superseded.jsonl where that has no such step). Nothing in MODEL_DIR is changed, a run may go on
in it. Exit code: 0; 3 if a step differs from its record, or no step has one; 1 for input that cannot be used.

--worst=N lists the samples of the last step with the highest loss of their own (without dropout).
--without_samples gives these samples of the last step weight 0, and the exit code is 0.
--before_rollback takes samples that a roll back has deleted since the checkpoint was written.
"""

import contextlib
import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import show_sample
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import bloomjax
from bloomjax import config, job, partitioning
from bloomjax.checkpoints import Checkpoints
from bloomjax.data import OpenTrainData
from bloomjax.errors import BadInput
from bloomjax.fault import Fault
from bloomjax.guard import SpikeGuard
from bloomjax.journal import Journal, read_lines
from bloomjax.model import Bloom
from bloomjax.position import Position
from bloomjax.preflight import check_model
from bloomjax.schedules import BatchSchedule, CosineSchedule
from bloomjax.skips import Skips
from bloomjax.startup import claim_gpu_memory, use_compilation_cache
from bloomjax.train_state import abstract_state
from bloomjax.train_step import Batch, StepOptions, jit_programs, make_train_step
from bloomjax.vocabulary import open_vocabulary

_FLAGS = flags.FlagValues()
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "MODEL_DIR/checkpoints/STEP, or MODEL_DIR.", flag_values=_FLAGS
)
_STEP = flags.DEFINE_integer(
    "step", None, "The last one to take; that after the checkpoint.", flag_values=_FLAGS
)
_WITHOUT = flags.DEFINE_string(
    "without_samples", None, "Such as 176-183,190: weight 0 in the last step.", flag_values=_FLAGS
)
_WORST = flags.DEFINE_integer(
    "worst", 0, "List so many samples of the last step.", lower_bound=0, flag_values=_FLAGS
)
_BEFORE_ROLLBACK = flags.DEFINE_bool(
    "before_rollback", False, "Take samples that were deleted since.", flag_values=_FLAGS
)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.", flag_values=_FLAGS)

EXIT_DIFFERENT = 3


# ---- what was recorded ----


@dataclasses.dataclass(frozen=True)
class Recorded:
    """Loss and gradient norm of a step, as float32 numbers; None: only that it was not finite. `source`: the file."""

    source: str
    loss: float | None
    grad_norm: float | None

    def is_equal(self, loss: float, grad_norm: float) -> bool:
        """To the bit; one NaN is as good as another."""

        def same(there: float | None, here: float) -> bool:
            if there is None:
                return not math.isfinite(here)
            return here == there or (math.isnan(here) and math.isnan(there))

        return same(self.loss, loss) and same(self.grad_norm, grad_norm)


class Records:
    """What metrics.jsonl, metrics.superseded.jsonl and journal.jsonl say about steps.

    Attributes:
      notes: a line about each file with lines that cannot be read.
    """

    def __init__(self, model_dir: Path):
        self.notes: list[str] = []
        self._current = self._read(model_dir / "metrics.jsonl")
        self._superseded = self._read(model_dir / "metrics.superseded.jsonl")
        self._journal = self._read(model_dir / "journal.jsonl")

    def _read(self, path: Path) -> list[dict[str, Any]]:
        records, unreadable = read_lines(path)
        if unreadable:
            numbers = ", ".join(map(str, unreadable[:5]))
            self.notes.append(f"{path}: cannot read {len(unreadable)} lines, the first: {numbers}")
        return records

    def events(self, *names: str) -> list[dict[str, Any]]:
        return [event for event in self._journal if event.get("event") in names]

    def of(self, step: int, ranges: list[list[int]], is_todays: bool) -> list[Recorded]:
        """All records of a step that took these samples, the one that counts first.

        `is_todays`: whether the run as it stands now takes them in this and all steps since the checkpoint.
        """
        incidents = [
            event for event in self.events("not_finite", "spike")
            if event.get("step") == step and event.get("samples") == ranges
        ][::-1]  # fmt: skip
        current, superseded = (
            [r for r in records if r.get("step") == step and "loss" in r]
            for records in (self._current, self._superseded)
        )
        from_journal = [_recorded("journal.jsonl", event) for event in incidents]
        old = [_recorded("metrics.superseded.jsonl", r, incidents) for r in superseded[::-1]]
        if not is_todays:
            return from_journal + old
        return [_recorded("metrics.jsonl", r, incidents) for r in current] + from_journal + old

    def producer(self, step: int) -> dict[str, Any] | None:
        """The start that wrote the record of this step in metrics.jsonl."""
        starts = [event for event in self.events("start") if event.get("step", step) < step]
        return starts[-1] if starts else None


def _recorded(
    source: str, record: dict[str, Any], incidents: Sequence[dict[str, Any]] = ()
) -> Recorded:
    # What is not finite is null in the metrics, and "nan" or "inf" in the journal.
    values = [record["loss"], record.get("grad_norm")]
    if None in values and incidents:
        values = [incidents[0]["loss"], incidents[0]["grad_norm"]]
        source = f"{source} and journal.jsonl"
    return Recorded(source, *(None if value is None else float(value) for value in values))


# ---- the run ----


class Configuration:
    """Builds what the run was built from: of config.gin in `model_dir`, or of the gin files among the flags."""

    def __init__(self, model_dir: Path):
        arguments = config.arguments()
        prefix = "--gin_bindings="
        self._bindings = [x.removeprefix(prefix) for x in arguments if x.startswith(prefix)]
        self._file = None if len(self._bindings) < len(arguments) else model_dir / "config.gin"
        if self._file and not self._file.is_file():
            raise BadInput(f"{model_dir} is no MODEL_DIR of a run: it has no config.gin")

    def build(self, binding: str) -> Any:
        if self._file is None:
            return config.build(binding)
        return config.build(binding, self._file, self._bindings)

    def build_if_bound(self, binding: str) -> Any:
        """None where nothing is: runs of earlier versions know nothing of it."""
        try:
            return self.build(binding)
        except BadInput as error:
            if str(error).endswith(f"does not bind {binding}"):
                return None
            raise


def find_checkpoint(given: str | None) -> tuple[Path, int | None]:
    """MODEL_DIR, and the step if a checkpoint is named. BadInput if there is no such folder."""
    if not given or "://" in given:
        raise BadInput("--checkpoint=MODEL_DIR or MODEL_DIR/checkpoints/STEP is needed, a folder")
    path = Path(given).resolve()
    model_dir, step = path, None
    if path.parent.name == "checkpoints":
        if not path.name.isdecimal():
            raise BadInput(f"--checkpoint={given}: {path.name} is not the number of a step")
        model_dir, step = path.parent.parent, int(path.name)
    elif path.name == "checkpoints":
        model_dir = path.parent
    if not model_dir.is_dir():
        raise BadInput(f"--checkpoint={given}: there is no folder {model_dir}")
    return model_dir, step


def parse_samples(text: str) -> set[int]:
    """ "176-183,190" -> {176, ..., 183, 190}. BadInput for anything else."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(x) for x in (match[1], match[2] or match[1])) if match else (1, 0)
        if not first <= last < first + 1_000_000:
            raise BadInput(
                f"--without_samples={text}: write numbers and ranges, such as 176-183,190"
            )
        found.update(range(first, last + 1))
    return found


class Replay:
    """The parts of a run that its steps are made of.

    Attributes:
      todays: samples that the run skips as it stands now.
    """

    def __init__(self, model_dir: Path):
        settings = Configuration(model_dir)
        claim_gpu_memory()
        cluster = settings.build_if_bound("train.cluster")
        if cluster is not None:
            cluster.start()
        use_compilation_cache(settings.build_if_bound("train.compilation_cache_dir"))
        self.model_dir = model_dir
        self.mesh: Mesh = settings.build("train.mesh").build()
        self.model: Bloom = settings.build("train.model")
        self.options: StepOptions = settings.build("train.step")
        self.schedule: BatchSchedule = settings.build("train.batch_schedule")
        self.learning_rate: CosineSchedule = settings.build("train.learning_rate")
        self.seed: int = settings.build("train.seed")
        self._vocabulary_path: str = settings.build("train.vocabulary_path")
        self.checkpoints: Checkpoints = settings.build("train.checkpoints")
        self.optimizer = settings.build("train.optimizer")
        self._needs_checkpoint = settings.build_if_bound("train.needs_checkpoint")
        health = settings.build_if_bound("train.health")
        self.guard: SpikeGuard | None = health and health.guard
        self.fault: Fault | None = health and health.fault
        if settings.build_if_bound("train.reweighting"):
            raise BadInput(
                f"{model_dir} is a proxy run of DoReMi: the weights of its rows are not replayed"
            )
        train_data = settings.build("train.train_data")
        check_model(self.model, self.mesh, train_data.sequence_lengths)
        self.data: OpenTrainData = train_data.open()
        self._configured = self.data.kept.skips
        self._position = Position(model_dir, self.model, self.data, self.schedule)
        self.todays: Skips = self.data.kept.skips
        if self.fault:
            self.fault.open(Journal(model_dir, enabled=False))
        # Before a mesh is set, as in `train`: under one it would be spread over it, and the program another.
        self._dropout_key = jax.random.key(self.seed + 1)
        self._abstract = abstract_state(self.model, self.optimizer, self.mesh)
        self._programs = jit_programs(
            self.model, self.optimizer, self.options, self.mesh, self._abstract
        )
        self.checkpoints.open(model_dir / "checkpoints", read_only=True)

    def newest_before(self, step: int | None) -> int:
        """Step of the newest checkpoint, or of the newest before `step`. BadInput if there is none."""
        steps = self.checkpoints.steps()
        found = max((each for each in steps if step is None or each < step), default=None)
        if found is None:
            before = "" if step is None else f" before step {step}"
            raise BadInput(
                f"no checkpoint{before} in {self.checkpoints.directory}; there are: {_listed(steps)} "
                f"({self.model_dir / 'checkpoints' / '0'} means the weights before step 1)"
            )
        return found

    def restore(self, step: int, before_rollback: bool) -> Any:
        """The state after `step`, verified, and the guard and the skipped samples with it. BadInput for damage."""
        if before_rollback:
            self.data.skip(self._configured)  # `Position.check` adds what the checkpoint knew of
        init, from_params, *_ = self._programs
        if step == 0 and 0 not in self.checkpoints.steps() and not self._needs_checkpoint:
            self._restore_guard({})
            return init(self.seed)
        self.checkpoints.read_position(step)  # BadInput names those that are there

        def check(position: dict[str, Any]) -> None:
            if position["step"] != step:  # it was damaged, and no other will do
                raise BadInput(self.checkpoints.problems[0])
            self._position.check(position)

        restored = self.checkpoints.restore(
            self._abstract, check, from_params, before_step=step + 1
        )
        if restored is None:
            raise BadInput(f"checkpoint {step} in {self.checkpoints.directory} was just deleted")
        state, position = restored
        self._restore_guard(position)
        self.todays = Skips.of([*self.todays.ranges, *self.data.kept.skips.ranges])
        return state

    def _restore_guard(self, position: dict[str, Any]) -> None:
        if self.guard:
            self.guard.restore(position.get("guard"))

    def arguments(self, step: int) -> tuple[Any, ...]:
        """Of the train step, after state and batch; the same that `Run` gives it."""
        before = self.schedule.samples_after(step - 1)
        limits = None
        if self.guard:
            limits = self.guard.limits(step, self.data.first_step_like(step, self.schedule))
        return np.float32(self.learning_rate(before)), self._dropout_key, limits

    def take(self, state: Any, step: int) -> tuple[Any, dict[str, Any]]:
        """The next state, and the numbers of this step."""
        num_rows = functools.partial(self.options.num_rows, mesh=self.mesh)
        batch = self.data.batch(step, self.schedule, self.mesh, num_rows)
        rate, key, limits = self.arguments(step)
        if self.fault:
            batch = self.fault.on_batch(batch, self.data.samples_of(step, self.schedule))
        state, metrics = self._programs[2](state, batch, rate, key, limits)
        found = _numbers(metrics)
        if self.guard:
            self.guard.judge(step, **found)
        return state, {**found, "limits": None if limits is None else limits.tolist()}

    def ranges(self, step: int) -> list[list[int]]:
        """Sample numbers [first, end) of a step."""
        first, num = self.schedule.samples_after(step - 1), self.schedule.batch_size(step)
        return [[s, s + n] for s, n in self.data.kept.skips.runs(first, num)]

    def takes_todays(self, step: int) -> bool:
        """Whether the run as it stands now would take the same samples in this step."""
        first, num = self.schedule.samples_after(step - 1), self.schedule.batch_size(step)
        return self.todays.runs(first, num) == self.data.kept.skips.runs(first, num)

    # The last step.

    def _batch_of(self, step: int, samples: np.ndarray, num_rows: int) -> Batch:
        """Row i holds samples[i]; it fills the mesh where that is below 0."""
        batch = self.data.batch_of(step, samples, self.mesh, num_rows)
        return self.fault.on_batch(batch, samples) if self.fault else batch

    def check_in_step(self, step: int, left_out: set[int]) -> None:
        """BadInput unless these are samples of this step, and not all."""
        samples = set(self.data.samples_of(step, self.schedule).tolist())
        has = f"step {step} has the samples {_spans(self.ranges(step))}"
        if absent := sorted(left_out - samples):
            raise BadInput(f"--without_samples: {_brief(absent)} is not in step {step}; {has}")
        if left_out == samples:
            raise BadInput(f"--without_samples: nothing would be left; {has}")

    def without(self, state: Any, step: int, left_out: set[int]) -> dict[str, Any]:
        """The numbers of this step if these samples weighed nothing; the state stays as it is."""
        samples = self.data.samples_of(step, self.schedule)
        kept = np.where(np.isin(samples, sorted(left_out)), -1, samples)
        train_step = make_train_step(self.model, self.optimizer, self.options, self.mesh)
        # Only the numbers, so that the compiler leaves the update out and the state can be used again.
        program = jax.jit(
            lambda *arguments: train_step(*arguments)[1],
            out_shardings=NamedSharding(self.mesh, PartitionSpec()),
            compiler_options=dict(self.options.compiler_options or {}) or None,
        )
        batch = self._batch_of(step, kept, self.options.num_rows(len(samples), self.mesh))
        return _numbers(program(state, batch, *self.arguments(step)))

    def worst(self, state: Any, step: int, num: int) -> list[dict[str, Any]]:
        """The samples of this step with the highest loss, and where they come from."""
        samples = self.data.samples_of(step, self.schedule)
        num_shards = partitioning.num_batch_shards(self.mesh)
        size = self.options.microbatch_size_samples or -(-len(samples) // num_shards)
        num_rows = size * num_shards
        eval_step = self._programs[3]

        def row_means(params, batch):
            sums_B, weights_B = eval_step(params, batch)
            # Weights of rows are 1, or NaN on purpose; one of padding alone has no target.
            return sums_B / jnp.maximum(weights_B, 1e-6) * batch["weights"]

        program = jax.jit(row_means, out_shardings=NamedSharding(self.mesh, PartitionSpec()))
        losses: list[float] = []
        for first in range(0, len(samples), num_rows):
            part = samples[first : first + num_rows]
            batch = self._batch_of(step, part, num_rows)
            losses += np.asarray(program(state.params, batch))[: len(part)].tolist()
        order = sorted(
            range(len(losses)),
            key=lambda i: -losses[i] if math.isfinite(losses[i]) else -math.inf,
        )
        copies = sorted((self.model_dir / "vocabulary").glob("*"))
        vocabulary = open_vocabulary(copies[0] if len(copies) == 1 else self._vocabulary_path)
        return [
            {"loss": losses[i], **show_sample.describe(self.data, vocabulary, int(samples[i]))}
            for i in order[:num]
        ]


def _numbers(metrics: dict[str, jax.Array]) -> dict[str, Any]:
    return {
        "loss": float(metrics["loss"]),
        "grad_norm": float(metrics["grad_norm"]),
        "is_taken": bool(metrics.get("is_taken", True)),
    }


# ---- all of it ----


def replay() -> int:
    """Prints what the flags ask for; the exit code."""
    model_dir, checkpoint = find_checkpoint(_CHECKPOINT.value)
    last, left_out = _STEP.value, parse_samples(_WITHOUT.value) if _WITHOUT.value else set()
    if last is not None and last <= (checkpoint or 0):
        after = "steps are numbered from 1"
        if checkpoint:
            after = f"the first step after checkpoint {checkpoint} is {checkpoint + 1}"
        raise BadInput(f"--step={last}: {after}")
    run = Replay(model_dir)
    with contextlib.closing(run.checkpoints):
        if checkpoint is None:
            checkpoint = run.newest_before(last)
        last = checkpoint + 1 if last is None else last
        state = run.restore(checkpoint, _BEFORE_ROLLBACK.value)
    run.check_in_step(last, left_out)
    records = Records(model_dir)
    found: dict[str, Any] = {
        "model_dir": str(model_dir), "checkpoint": checkpoint, "device": run.mesh.devices.flat[0].device_kind,
        "num_devices": run.mesh.devices.size, "processes": jax.process_count(), "jax": jax.__version__,
        "bloomjax": bloomjax.__version__, "steps": [], "notes": records.notes,
    }  # fmt: skip
    say = print if job.is_main() and not _JSON.value else lambda *_: None
    say(f"{model_dir}: from checkpoint {checkpoint} to step {last}")
    say(f"{'step':>8}  {'loss':<14}{'gradient norm':<15}{'':9}recorded")
    is_todays = True
    with jax.set_mesh(run.mesh):
        for step in range(checkpoint + 1, last + 1):
            is_todays = is_todays and run.takes_todays(step)
            ranges = run.ranges(step)
            if step == last and left_out:
                found["without"] = {
                    "samples": sorted(left_out), **run.without(state, step, left_out)
                }  # fmt: skip
            if step == last and _WORST.value:
                found["worst"] = run.worst(state, step, _WORST.value)
            state, numbers = run.take(state, step)
            row = compared(step, ranges, numbers, records.of(step, ranges, is_todays))
            found["steps"].append(row)
            say(line_of(row))
    found["notes"] += notes_of(found, records)
    equal = [row["equal"] for row in found["steps"] if row["equal"] is not None]
    found["equal"] = all(equal) if equal else None
    if job.is_main() and _JSON.value:
        print(json.dumps(plain(found), ensure_ascii=False))
    for line in closing_lines(found):
        say(line)
    return 0 if left_out or found["equal"] else EXIT_DIFFERENT


def compared(
    step: int, ranges: list[list[int]], numbers: dict[str, Any], recorded: Sequence[Recorded]
) -> dict[str, Any]:
    """A row of the output: the numbers of a step beside those recorded, and whether the first of these are equal."""
    known = [
        {**dataclasses.asdict(each), "equal": each.is_equal(numbers["loss"], numbers["grad_norm"])}
        for each in recorded
    ]
    return {
        "step": step, "samples": ranges, **numbers, "equal": known[0]["equal"] if known else None,
        "recorded": known,
    }  # fmt: skip


def line_of(row: dict[str, Any]) -> str:
    """For a person."""
    if not row["recorded"]:
        verdict = "no record"
    else:
        first, *others = row["recorded"]
        verdict = f"bit-equal in {first['source']}"
        if not row["equal"]:
            verdict = f"DIFFERENT in {first['source']}: {_nine(first['loss'])}, {_nine(first['grad_norm'])}"
        for other in others:
            if other["equal"] != row["equal"]:
                kind = "bit-equal" if other["equal"] else "different"
                verdict += f"; {kind} in {other['source']}"
    taken = "" if row["is_taken"] else "refused"
    return (
        f"{row['step']:>8}  {_nine(row['loss']):<14}{_nine(row['grad_norm']):<15}{taken:9}{verdict}"
    )


def notes_of(found: dict[str, Any], records: Records) -> Iterator[str]:
    """What a reader of the comparison should know."""
    steps = [row["step"] for row in found["steps"]]
    here = _machine(found, found["processes"])
    there = {}
    for step in steps:
        start = records.producer(step)
        if start is not None:
            there[_machine(start, len(start.get("processes") or [0]))] = step
    for machine, step in there.items():
        if machine != here:
            yield f"step {step} was recorded on {machine}, this is {here}: equal bits cannot be expected"
    for event in records.events("drift", "fault"):
        if event.get("step") in steps:
            yield f"journal.jsonl: {event['event']} {event.get('kind', '')} at step {event['step']}"
    if not _BEFORE_ROLLBACK.value:
        for event in records.events("rollback"):
            if set(steps) & set(range(event["first_step"], event["step"] + 1)):
                yield (
                    f"the steps {event['first_step']} to {event['step']} once had the samples "
                    f"{_spans(event['samples'])}, which were deleted: --before_rollback takes them"
                )


def _machine(x: dict[str, Any], num_processes: int) -> str:
    return (
        f"{x.get('num_devices')} x {x.get('device')} in {num_processes} "
        f"process{'es' if num_processes > 1 else ''} with jax {x.get('jax')} and bloomjax {x.get('bloomjax')}"
    )


def closing_lines(found: dict[str, Any]) -> Iterator[str]:
    """For a person: what was left out, the worst samples, notes, the verdict."""
    last = found["steps"][-1]
    if "without" in found:
        for what, x in (("with", last), ("without", found["without"])):
            refused = "" if x["is_taken"] else "refused"
            yield f"{what:>8}  {_nine(x['loss']):<14}{_nine(x['grad_norm']):<15}{refused}".rstrip()
    if "worst" in found:
        yield f"samples of step {last['step']} with the highest loss:"
        for each in found["worst"]:
            yield f"{each['loss']:8.3f}  {next(show_sample.lines(each, whole=False))}"
    yield from dict.fromkeys(found["notes"])
    num = len(found["steps"])
    wrong = [row["step"] for row in found["steps"] if row["equal"] is False]
    unknown = sum(row["equal"] is None for row in found["steps"])
    if wrong:
        yield f"{len(wrong)} of {num} steps differ from their record, the first is {wrong[0]}"
    elif unknown == num:
        yield "there is no record to compare with"
    else:
        yield f"{num - unknown} of {num} steps are bit-equal to their record" + (
            f", {unknown} have none" if unknown else ""
        )


def plain(value: Any) -> Any:
    """With "nan" and "inf" for what JSON does not have."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _nine(value: float | None) -> str:
    """Digits enough to tell any two float32 numbers apart."""
    return "not finite" if value is None else f"{value:.9g}"


def _spans(ranges: Iterable[Sequence[int]]) -> str:
    return ", ".join(f"{a}-{b - 1}" for a, b in ranges)


def _brief(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (" ..." if len(numbers) > 5 else "")


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps)) or "none"


def main(argv: list[str] | None = None) -> None:
    """The command, also with the arguments of a test."""
    config.call(replay, argv, _FLAGS)


if __name__ == "__main__":
    main()
