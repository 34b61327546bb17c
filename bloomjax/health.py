"""What watches over a run: one object with a part for each thing that can go wrong."""

import contextlib
from typing import Any

from bloomjax.drift import ReplicaCheck
from bloomjax.energy_meter import Energy
from bloomjax.fault import Fault
from bloomjax.guard import SpikeGuard
from bloomjax.predicted_loss import PredictedLoss
from bloomjax.stops import StopConditions
from bloomjax.stragglers import Stragglers
from bloomjax.watchdog import Watchdog


class Health:
    """The parts that are bound; what is None does not happen.

    Attributes:
      stops: what ends the run from outside.
      guard: which steps are not taken; without it a step that is not finite ends the run.
      watchdog: ends a process in which nothing moves.
      stragglers: names slow hosts and devices.
      replicas: compares copies.
      fault: faults on purpose.
      energy: books joules in the journal.
      predicted_loss: compares the loss with what a sweep predicts.
    """

    def __init__(
        self,
        *,
        stops: StopConditions | None = None,
        guard: SpikeGuard | None = None,
        watchdog: Watchdog | None = None,
        stragglers: Stragglers | None = None,
        replicas: ReplicaCheck | None = None,
        fault: Fault | None = None,
        energy: Energy | None = None,
        predicted_loss: PredictedLoss | None = None,
    ):
        self.stops = stops or StopConditions()
        self.guard = guard
        self.watchdog = watchdog
        self.stragglers = stragglers
        self.replicas = replicas
        self.fault = fault
        self.energy = energy
        self.predicted_loss = predicted_loss

    def beat(self, step: int | None = None) -> None:
        """Something has moved: `step`, or a batch of evaluation, is finished."""
        if self.watchdog:
            self.watchdog.beat(step)

    def setup(self, what: str) -> contextlib.AbstractContextManager[Any]:
        """Around what takes longer than a step, such as "compile" or "save"."""
        return self.watchdog.setup(what) if self.watchdog else contextlib.nullcontext()
