"""Prints batch size, samples, tokens and learning rate at chosen steps of a configuration.

    python tools/schedule_table.py --gin_file=176b.gin --steps=1,100,12695

One JSON object a line: `step`, `batch_size` (samples that step takes), then `samples`, `tokens`
and `learning_rate` after it, which is how BLOOM's logs count. With a curriculum also `length`, the
tokens that step sees of each sample, and `padded_length`, those of its batch; where it cuts its
samples (mode "phases") the last of each block is shorter, so there are `tokens_at_most`.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from absl import flags

from bloomjax import config
from bloomjax.curriculum import LengthCurriculum
from bloomjax.errors import BadInput
from bloomjax.schedules import BatchSchedule

_FLAGS = flags.FlagValues()
_STEPS = flags.DEFINE_string("steps", None, "Steps, such as 1,100,12695.", flag_values=_FLAGS)


def schedule_table(
    batch_schedule: BatchSchedule,
    learning_rate: Callable[[int], float],
    sequence_length: int,
    steps: Iterable[int],
    curriculum: LengthCurriculum | None = None,
) -> Iterator[dict[str, Any]]:
    """One row for each of `steps`; `learning_rate` is a function of consumed samples."""
    for step in steps:
        samples = batch_schedule.samples_after(step)
        row: dict[str, Any] = {"step": step, "batch_size": batch_schedule.batch_size(step)}
        tokens = samples * sequence_length
        if curriculum:
            row["length"] = curriculum.length(step)
            row["padded_length"] = curriculum.bucket(row["length"])
            tokens = curriculum.tokens_after(samples)
        is_cut = curriculum is not None and curriculum.mode == "phases"
        name = "tokens_at_most" if is_cut else "tokens"
        yield row | {"samples": samples, name: tokens, "learning_rate": learning_rate(samples)}


def parse_steps(text: str) -> list[int]:
    """The steps in `text`, such as "1,100,12695". BadInput unless all are whole and above 0."""
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if not (word.isascii() and word.isdecimal() and int(word) > 0):
            raise BadInput(
                f"--steps={text}: {word!r} is no step; give whole numbers from 1, separated by "
                "commas, such as --steps=1,100,12695"
            )
    return [int(word) for word in words]


def _curriculum() -> LengthCurriculum | None:
    try:
        return config.build("TrainData.curriculum")
    except BadInput as error:
        if str(error).endswith("does not bind TrainData.curriculum"):
            return None
        raise


def main() -> None:
    steps = parse_steps(_STEPS.value or "")
    rows = schedule_table(
        config.build("train.batch_schedule"),
        config.build("train.learning_rate"),
        config.build("TrainData.sequence_length"),
        steps,
        _curriculum(),
    )
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    config.call(main, own_flags=_FLAGS)
