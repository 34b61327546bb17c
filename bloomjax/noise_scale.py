"""The gradient noise scale: at which batch size noise and signal of the gradient are equally large.

McCandlish et al. 2018 (arXiv 1812.06162), appendix A.1. The squared norm of the mean gradient of n samples has the
expectation |G|^2 + tr(S) / n, S the covariance of one sample's gradient. Two batch sizes give both terms, and their
ratio B_simple = tr(S) / |G|^2 is in samples. The terms of one step are far noisier than their means: they
are averaged apart, and the ratio is that of the averages.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from bloomjax.errors import BadInput


def noise_and_signal(
    small_norm_squared: float,
    large_norm_squared: float,
    small_batch_samples: float,
    large_batch_samples: float,
) -> tuple[float, float]:
    """tr(S) and |G|^2, each without bias (and so possibly negative), from squared norms of two mean gradients.

    `small_norm_squared` is best the mean over the parts that the large batch is made of.

    Raises:
      BadInput: the batch sizes do not differ.
    """
    b, B = small_batch_samples, large_batch_samples
    if not 0 < b < B:
        raise BadInput(f"the noise scale needs two batch sizes, got {b} and {B} samples")
    signal = (B * large_norm_squared - b * small_norm_squared) / (B - b)
    noise = (small_norm_squared - large_norm_squared) / (1 / b - 1 / B)
    return noise, signal


@dataclasses.dataclass
class NoiseScale:
    """Averages of both terms over steps.

    Attributes:
      decay: weight of the past in the averages, a step; their memory is about 1 / (1 - decay) steps.
    """

    decay: float = 0.99
    noise: float = 0.0
    signal: float = 0.0
    weight: float = (
        0.0  # 1 - decay^steps; the averages, which begin at zero, are to be divided by it
    )

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise BadInput(f"decay of the noise scale must lie in [0, 1), got {self.decay}")

    def add(self, noise: float, signal: float) -> None:
        """The terms of one step; those of a step that was no good (NaN) are left out."""
        if not (math.isfinite(noise) and math.isfinite(signal)):
            return
        keep = self.decay
        self.noise = keep * self.noise + (1 - keep) * noise
        self.signal = keep * self.signal + (1 - keep) * signal
        self.weight = keep * self.weight + (1 - keep)

    @property
    def samples(self) -> float | None:
        """B_simple; None before the first step, or while the average of either term is not above zero."""
        if self.noise <= 0 or self.signal <= 0:
            return None
        return self.noise / self.signal


class NoiseRecorder:
    """Puts the noise scale into the records of a run, which hold all of its state.

    `gradient_noise` and `gradient_signal` are the terms of one step (of one microbatch and the whole batch),
    `noise_scale_samples` the ratio of their averages so far. `noise_by_language` has both terms of the language that
    was measured at this step (language_noise.py), if one was.
    """

    def __init__(self, decay: float = 0.99):
        self._decay, self._scale = decay, NoiseScale(decay)

    def begin(self, records: Iterable[Mapping[str, Any]]) -> None:
        """From the records of the steps before, at each start and after a roll back."""
        self._scale = NoiseScale(self._decay)
        for record in records:
            if record.get("gradient_noise") is not None:
                self._scale.add(record["gradient_noise"], record["gradient_signal"])

    def note(self, record: dict[str, Any]) -> None:
        """Replaces the norms that the programs returned; waits for them."""
        norm, samples = record["grad_norm"], record["batch_size"]
        terms = _terms(record, "", norm, samples)
        if terms is not None:
            self._scale.add(*terms)
            record |= {"gradient_noise": terms[0], "gradient_signal": terms[1]}
            record["noise_scale_samples"] = self._scale.samples
        if (language := record.pop("language", None)) is not None:
            norm, samples = record.pop("language_norm"), record.pop("language_samples")
            terms = _terms(record, "language_", float(norm), samples)
            if terms is not None:
                record["noise_by_language"] = {language: {"noise": terms[0], "signal": terms[1]}}


def _terms(record, prefix, norm, samples) -> tuple[float, float] | None:
    part_norm = record.pop(f"{prefix}part_norm", None)
    part_samples = record.pop(f"{prefix}part_samples", None)
    if part_norm is None:
        return None
    part_norm, part_samples = float(part_norm), float(part_samples)
    if not 0 < part_samples < samples or not math.isfinite(part_norm) or not math.isfinite(norm):
        return None
    return noise_and_signal(part_norm**2, norm**2, part_samples, samples)


def averaged(
    terms: Iterable[tuple[int, float, float]], decay: float = 0.99
) -> list[tuple[int, float]]:
    """(step, noise scale in samples) from (step, noise, signal), where there are both."""
    scale, found = NoiseScale(decay), []
    for step, noise, signal in terms:
        scale.add(noise, signal)
        if scale.samples is not None:
            found.append((step, scale.samples))
    return found


def verdict(noise_scale_samples: float, batch_size_samples: float) -> str:
    """What a batch of this size costs, by McCandlish et al., equations 5.1 and 5.2 (their section 2.3).

    With B samples a step, training takes (1 + scale / B) of the fewest possible steps and (1 + B / scale) of the fewest
    possible samples. BadInput for a noise scale or a batch that is not above 0.
    """
    if not min(noise_scale_samples, batch_size_samples) > 0:
        raise BadInput(
            f"no verdict on a noise scale of {noise_scale_samples} and a batch of {batch_size_samples} samples"
        )
    steps = 1 + noise_scale_samples / batch_size_samples
    samples = 1 + batch_size_samples / noise_scale_samples
    cost = f"{steps:.2f} x the fewest steps, {samples:.2f} x the fewest samples"
    if batch_size_samples > 2 * noise_scale_samples:
        return f"wasteful: {cost}"
    if batch_size_samples < noise_scale_samples / 2:
        return f"small: {cost}"
    return f"about right: {cost}"
