"""DoReMi's weights of domains, from how much more a proxy model loses than a reference. Numbers only, in float64.

Xie et al. 2023 (arXiv 2305.10429), algorithm 1. A proxy model is trained on the loss sum_i a_i * (mean loss over the
tokens of domain i), while the weights a rise where the proxy is worse than a reference model that was trained in the
ordinary way. What cannot be learnt is no better known to the reference, and what is learnt at once soon is not worse:
both lose weight to what can be learnt but has not been. The mean of a over the steps is the mixture to train on.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bloomjax.errors import BadInput


def next_weights(
    weights: np.ndarray, excess: np.ndarray, step_size: float, smoothing: float
) -> np.ndarray:
    """The weights of the next step: a * exp(step_size * excess), made to sum to 1, then mixed with even ones.

    Args:
      weights: of the step before, [k]; positive, they sum to 1.
      excess: excess loss of each domain in nats a token, [k], not negative.
      step_size: eta.
      smoothing: c, the part of the even weights 1/k.
    """
    # Without the largest the quotient is the same and nothing overflows.
    raised = weights * np.exp(step_size * (excess - np.max(excess)))
    return (1 - smoothing) * raised / np.sum(raised) + smoothing / len(weights)


class DomainWeights:
    """The weights through a run of the proxy.

    Attributes:
      names: of the domains.
      weights: of the newest step, float64 [k]; 1/k each before the first.
      excess: the last excess loss that is known of each domain in nats a token, float64 [k].
      num_steps: that went into the mean.
    """

    def __init__(self, names: Sequence[str], *, step_size: float = 1.0, smoothing: float = 1e-3):
        """BadInput for fewer than two domains, a step size that is not positive, smoothing outside of (0, 1)."""
        if len(names) < 2:
            raise BadInput(f"DoReMi weighs several languages; the mixture has {', '.join(names)}")
        if not (0 < step_size < np.inf and 0 < smoothing < 1):
            raise BadInput(
                f"DoReMi needs step_size > 0 and 0 < smoothing < 1, got {step_size} and {smoothing}"
            )
        self.names = tuple(names)
        self._step_size, self._smoothing = float(step_size), float(smoothing)
        self.reset()

    def reset(self) -> None:
        """To before the first step."""
        k = len(self.names)
        self.weights, self.excess, self._total = np.full(k, 1 / k), np.zeros(k), np.zeros(k)
        self.num_steps = 0
        self._before = self._all()

    def update(self, row_excess: np.ndarray, row_domains: np.ndarray) -> None:
        """Takes one step.

        Args:
          row_excess: mean over the tokens of each row of max(0, loss - loss of the reference), in nats; [B]. Rows have
            the same number of tokens.
          row_domains: number of each row's domain, int [B]. A domain without a row, or with one that is not finite,
            keeps the excess that it had when it was seen last, as in the authors' own program; the paper does not say.
        """
        k = len(self.names)
        num_rows = np.bincount(row_domains, minlength=k)
        total = np.bincount(row_domains, np.asarray(row_excess, np.float64), minlength=k)
        is_known = (num_rows > 0) & np.isfinite(total)
        self._before = self._all()
        self.excess = np.where(is_known, total / np.maximum(num_rows, 1), self.excess)
        self.weights = next_weights(self.weights, self.excess, self._step_size, self._smoothing)
        self._total = self._total + self.weights
        self.num_steps += 1

    def undo(self) -> None:
        """The newest step was not taken. Twice in a row is once."""
        self.weights, self.excess, self._total, self.num_steps = self._before

    def row_weights(self, row_domains: np.ndarray) -> np.ndarray:
        """How much each row counts in the loss of the proxy, float64 [B]: the rows of a domain share its weight."""
        num_rows = np.bincount(row_domains, minlength=len(self.names))
        return self.weights[row_domains] / num_rows[row_domains]

    def state(self) -> dict[str, Any]:
        """What has to be kept (JSON) so that all goes on to the bit. `found_shares` makes the result of it."""
        return {
            "step_size": self._step_size,
            "smoothing": self._smoothing,
            "num_steps": self.num_steps,
            "weights": self.by_name(self.weights),
            "total": self.by_name(self._total),
            "excess": self.by_name(self.excess),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """From `state`. BadInput if that is of other domains, or another step size or smoothing."""
        here = self.state()
        for name in ("step_size", "smoothing"):
            if state[name] != here[name]:
                raise BadInput(
                    f"DoReMi.{name} was {state[name]} when the run began, and is {here[name]} now"
                )
        if sorted(state["weights"]) != sorted(self.names):
            raise BadInput(
                f"the run weighs {', '.join(state['weights'])}; here are {', '.join(self.names)}"
            )
        self.weights, self._total, self.excess = (
            np.array([state[key][name] for name in self.names], np.float64)
            for key in ("weights", "total", "excess")
        )
        self.num_steps = state["num_steps"]
        self._before = self._all()

    def by_name(self, values: np.ndarray) -> dict[str, float]:
        """Values [k] by domain."""
        return dict(zip(self.names, values.tolist(), strict=True))

    def _all(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        return self.weights, self.excess, self._total, self.num_steps


def found_shares(state: Mapping[str, Any]) -> dict[str, float]:
    """The result so far, of a `DomainWeights.state`: the mean of the weights over all steps; they sum to 1.

    BadInput before the first step.
    """
    if not state["num_steps"]:
        raise BadInput("DoReMi has taken no step yet")
    return {name: total / state["num_steps"] for name, total in state["total"].items()}
