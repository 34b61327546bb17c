"""Prints batch size, samples, tokens and learning rate at chosen steps of a configuration.

    python tools/schedule_table.py --gin_file=176b.gin --steps=1,100,12695

One JSON object a line: `step`, `batch_size` (samples that step takes), then `samples`, `tokens`
and `learning_rate` after it, which is how BLOOM's logs count.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from bloomjax.errors import BadInput
from bloomjax.schedules import BatchSchedule


def schedule_table(
    batch_schedule: BatchSchedule,
    learning_rate: Callable[[int], float],
    sequence_length: int,
    steps: Iterable[int],
) -> Iterator[dict[str, Any]]:
    """One row for each of `steps`; `learning_rate` is a function of consumed samples."""
    for step in steps:
        samples = batch_schedule.samples_after(step)
        yield {
            "step": step,
            "batch_size": batch_schedule.batch_size(step),
            "samples": samples,
            "tokens": samples * sequence_length,
            "learning_rate": learning_rate(samples),
        }


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


def configured_objects(
    config_arguments: list[str],
) -> tuple[BatchSchedule, Callable[[int], float], int]:
    """Batch schedule, learning rate and sequence length (tokens) that the gin files bind."""
    # CONFIG HOOKUP: build train.batch_schedule, train.learning_rate and train.sequence_length with
    # bloomjax.config from `config_arguments` (--gin_file=..., --gin.NAME=VALUE).
    raise NotImplementedError(f"config hookup: {config_arguments}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--steps", required=True, metavar="1,100,12695")
    parsed, config_arguments = parser.parse_known_args(arguments)
    try:
        steps = parse_steps(parsed.steps)
        batch_schedule, learning_rate, sequence_length = configured_objects(config_arguments)
        for row in schedule_table(batch_schedule, learning_rate, sequence_length, steps):
            print(json.dumps(row))
    except BadInput as error:
        print(f"schedule_table: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
