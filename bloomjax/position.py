"""Where a run stands in its data, and whether a checkpoint belongs to this run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from bloomjax import job
from bloomjax.checkpoints import is_imported
from bloomjax.data import OpenTrainData
from bloomjax.errors import BadInput
from bloomjax.files import write_whole
from bloomjax.model import Bloom
from bloomjax.schedules import BatchSchedule
from bloomjax.skips import Skips

_SKIPPED = "skipped_samples.json"


class Position:
    """Steps and samples so far, the hash chain over these samples, and the samples that are skipped.

    Attributes:
      step: finished steps.
    """

    def __init__(self, model_dir: Path, model: Bloom, data: OpenTrainData, schedule: BatchSchedule):
        self.step = 0
        self._model_dir = model_dir
        self._model = model
        self._data = data
        self._schedule = schedule
        # The hash chain over the samples so far, and where it stood at the save before: (samples, value).
        self._chain, self._chain_before = (0, 0), (0, 0)
        data.skip(
            Skips.of([*data.kept.skips.ranges, *job.on_main(lambda: read_skipped(model_dir))])
        )

    @property
    def samples(self) -> int:
        """That were trained on, or consumed by a step that was not taken."""
        return self._schedule.samples_after(self.step)

    def reset(self) -> None:
        """To before step 1."""
        self.step = 0
        self._chain = self._chain_before = (0, 0)

    def advance(self) -> None:
        """By one step."""
        self.step += 1
        first, value = self._chain
        self._chain = self.samples, self._data.kept.chain(value, first, self.samples - first)

    def fields(self) -> dict[str, Any]:
        """What is saved of it (JSON) with the state after `step`."""
        chain = [self._chain_before, self._chain]
        skipped = self._data.kept.skips.ranges
        found = {"samples": self.samples, "chain": chain, "skipped_samples": skipped}
        return found | self._identity(self.samples)

    def saved(self) -> None:
        """`fields` is on its way to the disk."""
        self._chain_before = self._chain

    def check(self, position: dict[str, Any]) -> None:
        """Takes over where `position` of a checkpoint stands. BadInput if that is of another run."""
        self._check_skips(position)
        for kind, mine in self._identity(position["samples"]).items():
            theirs = position[kind]
            names = mine | theirs
            if is_imported(position):  # what it does not know it cannot contradict; it is a BLOOM
                names = [n for n in mine if theirs.get(n) is not None or n in self._departures()]
            changed = [name for name in names if mine.get(name) != theirs.get(name)]
            if changed:
                absent = "BLOOM's" if kind == "model" else None  # only departures from it are saved
                was = ", ".join(f"{n}={_brief(theirs.get(n, absent))}" for n in changed)
                now = ", ".join(f"{n}={_brief(mine.get(n, absent))}" for n in changed)
                raise BadInput(
                    f"MODEL_DIR {self._model_dir} holds a run with other {kind}: there {was}, here {now}; "
                    "take another MODEL_DIR"
                )
        step, samples = position["step"], position["samples"]
        if self._schedule.samples_after(step) != samples:
            raise BadInput(
                f"MODEL_DIR {self._model_dir} had consumed {samples} samples after step {step}; this batch schedule "
                f"says {self._schedule.samples_after(step)}"
            )
        self.reset()  # an imported one has no chain
        if "chain" in position:
            self._check_chain(*map(tuple, position["chain"]))
        self.step = step

    def delete(self, first_step: int, last_step: int) -> list[list[int]]:
        """Skips the samples that these steps took, for good: in MODEL_DIR, on all processes. What is new."""
        first = self._schedule.samples_after(first_step - 1)
        num = self._schedule.samples_after(last_step) - first
        before = self._data.kept.skips
        skips = self._data.without(first, num, self._schedule)
        ranges = []
        for a, b in skips.ranges:
            at = before.position_of(a)
            ranges += [[s, s + n] for s, n in before.runs(at, before.position_of(b) - at)]
        text = json.dumps({"ranges": skips.ranges}) + "\n"
        job.on_main(lambda: write_whole(self._model_dir / _SKIPPED, text.encode()))
        self._data.skip(skips)
        return ranges

    # What a checkpoint must agree with.
    def _identity(self, num_samples: int) -> dict[str, Any]:
        shape = dataclasses.asdict(self._model.config)
        names = ("vocab_size", "num_layers", "emb_dim", "num_heads", "mlp_dim")
        return {
            "model": {name: shape[name] for name in names} | self._departures(),
            "data": self._data.identity(num_samples),
        }

    def _departures(self) -> dict[str, str]:
        config = self._model.config
        return config.departures | ({"mup": str(config.mup)} if config.mup else {})

    def _check_chain(self, before: tuple[int, int], now: tuple[int, int]) -> None:
        """Whether this program deals the samples since the save before as the one did that trained on them."""
        (first, value), (samples, expected) = before, now
        if self._data.kept.chain(value, first, samples - first) != expected:
            raise BadInput(
                f"MODEL_DIR {self._model_dir} was trained on other samples between {first} and {samples} than this "
                "program and configuration would take: their order has changed; use the version that began the run"
            )
        self._chain_before, self._chain = now, now

    def _check_skips(self, position: dict[str, Any]) -> None:
        theirs = Skips.of(position.get("skipped_samples", ()))
        skips = Skips.of([*self._data.kept.skips.ranges, *theirs.ranges])
        num = position["samples"]
        end = int(theirs.samples(np.array([num - 1]))[0]) + 1 if num else 0
        extra = [each for each in skips.below(end).ranges if each not in theirs.below(end).ranges]
        if extra:
            raise BadInput(
                f"checkpoint {position['step']} of MODEL_DIR {self._model_dir} was trained on samples up to {end - 1}, "
                f"some of which are to be skipped now: {', '.join(f'{a}..{b - 1}' for a, b in extra)}; go back to a "
                "checkpoint before them (tools/checkpoint.py rollback), or do not skip them"
            )
        self._data.skip(skips)


def read_skipped(model_dir: Path) -> list[list[int]]:
    """Ranges of sample numbers that roll backs of this run have deleted. BadInput for a file that cannot be read."""
    path = model_dir / _SKIPPED
    if not path.exists():
        return []
    try:
        return [list(each) for each in Skips.of(json.loads(path.read_bytes())["ranges"]).ranges]
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:  # BadInput is a ValueError, too
        raise BadInput(f"{path} holds no ranges of samples: {error}") from error


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
