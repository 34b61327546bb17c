"""Samples that are deleted from the sequence of a run: what remains is counted anew, and later samples move up.

A sample's number never changes, nor what it holds. A *position* counts the samples that are trained on, from 0: batch
sizes, learning rates and the length of a run are functions of it.
"""

import dataclasses
import itertools
import operator
from collections.abc import Iterable, Sequence

import numpy as np

from bloomjax.errors import BadInput
from bloomjax.phases import PhasedMixture, Stretch


@dataclasses.dataclass(frozen=True)
class Skips:
    """Deleted samples, as sorted ranges [first, end) of sample numbers that do not touch."""

    ranges: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, ranges: Iterable[Sequence[int]]) -> "Skips":
        """The union of ranges in any order. BadInput for one that is none."""
        merged: list[list[int]] = []
        pairs = []
        for given in ranges:
            try:
                first, end = map(operator.index, given)
            except (TypeError, ValueError):
                first = end = -1
            if not 0 <= first < end:
                raise BadInput(
                    f"samples to skip are ranges (first, end), 0 <= first < end, such as ((8, 16),), got {given!r}"
                )
            pairs.append([first, end])
        for given in sorted(pairs):
            if merged and given[0] <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], given[1])
            else:
                merged.append(given)
        return cls(tuple((first, end) for first, end in merged))

    def below(self, sample: int) -> "Skips":
        """What is deleted of the samples before this one."""
        return Skips(tuple((a, min(b, sample)) for a, b in self.ranges if a < sample))

    def position_of(self, sample: int) -> int:
        """How many samples before this one are kept."""
        return sample - sum(b - a for a, b in self.below(sample).ranges)

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """The sample number at each position, int64."""
        positions = np.asarray(positions, np.int64)
        if not self.ranges:
            return positions
        starts = np.array([self.position_of(a) for a, _ in self.ranges], np.int64)
        deleted = np.cumsum([0] + [b - a for a, b in self.ranges])
        return positions + deleted[np.searchsorted(starts, positions, side="right")]

    def runs(self, first: int, num: int) -> list[tuple[int, int]]:
        """(sample number, how many) of the unbroken rows of samples at the positions [first, first + num)."""
        if num == 0:
            return []
        cuts = [first, *(self.position_of(a) for a, _ in self.ranges), first + num]
        cuts = sorted({cut for cut in cuts if first <= cut <= first + num})
        firsts = self.samples(np.array(cuts[:-1])).tolist()
        return [(s, b - a) for s, (a, b) in zip(firsts, itertools.pairwise(cuts), strict=True)]


class KeptSamples:
    """A PhasedMixture as a run sees it, that skips some samples: everything is counted in positions."""

    def __init__(self, mixture: PhasedMixture, skips: Skips):
        self._mixture = mixture
        self.skips = skips
        self.names = mixture.names
        self.block_tokens = mixture.block_tokens
        self.stretches: tuple[Stretch, ...] = tuple(
            dataclasses.replace(stretch, first_sample=skips.position_of(stretch.first_sample))
            for stretch in mixture.stretches
        )

    def samples(self, first: int, num: int) -> np.ndarray:
        """Sample numbers at the positions [first, first + num), int64."""
        return self.skips.samples(np.arange(first, first + num))

    def end(self, num: int) -> int:
        """The number after that of the last of the first `num` samples."""
        return int(self.skips.samples(np.array([num - 1]))[0]) + 1 if num else 0

    def counts(self, num: int) -> dict[str, int]:
        """Samples of each source among the first `num`."""
        end = self.end(num)
        found = self._mixture.counts(end)
        for first, last in self.skips.below(end).ranges:
            before, after = self._mixture.counts(first), self._mixture.counts(last)
            found = {name: n - (after[name] - before[name]) for name, n in found.items()}
        return found

    def tokens_after(self, num: int) -> int:
        """Tokens predicted in the first `num` samples."""
        end, tokens = self.end(num), self._mixture.tokens_after
        skipped = self.skips.below(end).ranges
        return tokens(end) - sum(tokens(b) - tokens(a) for a, b in skipped)

    def tokens_by_source(self, num: int) -> dict[str, int]:
        """Tokens of each source predicted in the first `num` samples."""
        end, tokens = self.end(num), self._mixture.tokens_by_source
        found = tokens(end)
        for first, last in self.skips.below(end).ranges:
            before, after = tokens(first), tokens(last)
            found = {name: n - (after[name] - before[name]) for name, n in found.items()}
        return found

    def chain(self, value: int, first: int, num: int) -> int:
        """PhasedMixture.chain over the positions [first, first + num)."""
        for sample, count in self.skips.runs(first, num):
            value = self._mixture.chain(value, sample, count)
        return value

    def sources(self, first: int, num: int) -> dict[str, int]:
        """Samples of each source at the positions [first, first + num), those that occur."""
        numbers, counts = np.unique(
            self._mixture.locate(self.samples(first, num))[0], return_counts=True
        )
        return {self.names[n]: int(c) for n, c in zip(numbers, counts, strict=True)}
