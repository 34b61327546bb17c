"""The spike guard: which steps are refused because of their loss or gradient, and what follows from that."""

import collections
import dataclasses
import itertools
import math
import statistics
from typing import Any

import numpy as np

from bloomjax.errors import BadInput

_POLICIES = ("skip", "rollback", "stop")
# Of a normal distribution the median absolute deviation times this is the standard deviation; and the differences of
# neighbours have sqrt(2) times that of the values.
_MAD_TO_DEVIATION = 1.4826
_LEAST_RELATIVE_DEVIATION = 0.01  # of the median: a plateau without noise is no reason to be strict
_CENTRE_STEPS = 16
_NO_LIMIT = float(np.finfo(np.float32).max)


class RollBack(Exception):
    """The run goes back to before `first_step` and trains without the samples of the steps first_step .. step."""

    def __init__(self, first_step: int, step: int):
        super().__init__(f"roll back to before step {first_step}")
        self.first_step, self.step = first_step, step


@dataclasses.dataclass(frozen=True)
class Verdict:
    """On a step that was not taken. cause: "not_finite" or "spike". action: "skip", "rollback" or "stop"."""

    cause: str
    action: str
    in_a_row: int


class SpikeGuard:
    """Refuses steps that are not finite, or far above the steps before them.

    The compiled step compares its loss and gradient norm with `limits` and, beyond them, leaves parameters and
    optimizer as they were. A limit is median + deviations * max(spread, 1 % of the median): the median of the last 16
    steps that were taken, and the spread from one step to the next over the last `window_steps`, which a falling loss
    does not widen: 1.4826 / sqrt(2) * median |x_i - x_(i-1)|. The newest step that counts for the limits of step s is
    s - 2: then no step waits for the result of the one before it.
    """

    def __init__(
        self,
        *,
        loss_deviations: float | None = 15.0,
        grad_norm_deviations: float | None = 50.0,
        window_steps: int = 128,
        min_steps: int = 32,
        policy: str = "skip",
        rollback_steps: int = 1,
        max_in_a_row: int = 8,
    ):
        """
        Args:
          loss_deviations, grad_norm_deviations: how far above the median is too far; None: only what is not finite.
          window_steps, min_steps: at most so many steps make the limits, and with fewer there are none.
          policy: what follows. "skip": nothing more, the samples count as consumed. "rollback": the last checkpoint
            before is restored and the samples of the step are deleted from the sequence. "stop": the run ends with 1.
          rollback_steps: the samples of so many steps are deleted, the refused one being the last.
          max_in_a_row: steps refused, or times rolled back, without a step taken in between (or beyond the last
            refused one) after which the run ends with 1 whatever the policy.
        """
        for name, value in (
            ("loss_deviations", loss_deviations),
            ("grad_norm_deviations", grad_norm_deviations),
        ):
            if value is not None and not value > 0:
                raise BadInput(f"SpikeGuard.{name} must be above 0 or None, got {value}")
        if policy not in _POLICIES:
            raise BadInput(
                f"SpikeGuard.policy must be one of {', '.join(_POLICIES)}, got {policy!r}"
            )
        if not 2 <= min_steps <= window_steps or rollback_steps < 1 or max_in_a_row < 1:
            raise BadInput(
                "SpikeGuard needs 2 <= min_steps <= window_steps, rollback_steps >= 1 and max_in_a_row >= 1, got "
                f"{min_steps}, {window_steps}, {rollback_steps}, {max_in_a_row}"
            )
        self.rollback_steps = rollback_steps
        self._deviations = loss_deviations, grad_norm_deviations
        self._window_steps, self._min_steps = window_steps, min_steps
        self._policy, self._max_in_a_row = policy, max_in_a_row
        self._taken: collections.deque[tuple[int, float, float]] = collections.deque()
        self._num_refused = self._in_a_row = self._furthest_step = 0

    @property
    def num_refused(self) -> int:
        """Steps of this run that were not taken."""
        return self._num_refused

    def limits(self, step: int, first_step: int = 1) -> np.ndarray:
        """float32 [2]: the largest loss and gradient norm with which `step` is taken.

        Steps before `first_step` do not count: with it other data begin, whose loss may be another.
        """
        before = [each for each in self._taken if first_step <= each[0] <= step - 2]
        before = before[-self._window_steps :]
        found = []
        for column, deviations in enumerate(self._deviations, 1):
            limit = _NO_LIMIT
            if deviations is not None and len(before) >= self._min_steps:
                values = [each[column] for each in before]
                median = statistics.median(values[-_CENTRE_STEPS:])
                jumps = [abs(b - a) for a, b in itertools.pairwise(values)]
                spread = _MAD_TO_DEVIATION / math.sqrt(2) * statistics.median(jumps)
                limit = median + deviations * max(spread, _LEAST_RELATIVE_DEVIATION * abs(median))
            found.append(min(limit, _NO_LIMIT))
        return np.array(found, np.float32)

    @property
    def in_a_row(self) -> int:
        """Steps refused since the last that was taken (or, after a roll back, was new)."""
        return self._in_a_row

    def judge(self, step: int, loss: float, grad_norm: float, is_taken: bool) -> Verdict | None:
        """Hears of each step once, in order; a verdict if it was not taken."""
        if is_taken:
            self._taken.append((step, loss, grad_norm))
            # Two more than the window: the newest do not count yet.
            while len(self._taken) > self._window_steps + 2:
                self._taken.popleft()
            if step > self._furthest_step:
                self._in_a_row = 0
            return None
        self._num_refused += 1
        self._in_a_row += 1
        self._furthest_step = max(step, self._furthest_step)
        is_finite = bool(np.isfinite(loss) and np.isfinite(grad_norm))
        action = "stop" if self._in_a_row > self._max_in_a_row else self._policy
        return Verdict("spike" if is_finite else "not_finite", action, self._in_a_row)

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to keep (JSON) so that the limits after it are the same again."""
        return {"taken": [list(each) for each in self._taken], "num_refused": self._num_refused}

    def restore(self, state: dict[str, Any] | None) -> None:
        """From `state` of a checkpoint; None before step 1. How many were refused in a row stays known."""
        state = state or {"taken": [], "num_refused": 0}
        self._taken = collections.deque((int(s), float(x), float(g)) for s, x, g in state["taken"])
        self._num_refused = state["num_refused"]
