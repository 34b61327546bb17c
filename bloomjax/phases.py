"""A mixture whose weights, sources or window length change at given samples: no window is lost, none is repeated.

One phase is mixture.py's order, to the bit. In a later phase each source goes on where the phase before left it.
Windows of several lengths come out of one order of blocks: an epoch of a source is a permutation of its blocks of
`block_tokens`, and a block is read from its beginning to its end, in windows of the length of the phase.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bloomjax.errors import BadInput
from bloomjax.mixture import Interleave, mix, permute, source_key


@dataclasses.dataclass(frozen=True)
class Stretch:
    """What holds from sample `first_sample` on: token shares by source (they sum to 1), and tokens a window."""

    first_sample: int
    shares: dict[str, float]
    sequence_length: int


class PhasedMixture:
    """Sample number -> (source, epoch, window), through all phases.

    Attributes:
      names: of the sources; those of the first phase in alphabetical order, later ones after them.
      skipped_tokens: by phase, how many tokens of begun blocks no window of the new length fits in.
    """

    def __init__(
        self,
        stretches: Sequence[Stretch],
        num_tokens: Mapping[str, int],
        *,
        seed: int,
        block_tokens: int,
    ):
        """`num_tokens` of every source. BadInput for phases out of order, or a length that does not divide a block."""
        _check(stretches, block_tokens)
        self.stretches = tuple(stretches)
        self.seed = seed
        self.block_tokens = block_tokens
        self.names: tuple[str, ...] = ()
        for stretch in self.stretches:
            self.names += tuple(sorted(set(stretch.shares) - set(self.names)))
        self._firsts = np.array([stretch.first_sample for stretch in self.stretches], np.int64)
        self._interleaves = [
            Interleave([stretch.shares[name] for name in sorted(stretch.shares)])
            for stretch in self.stretches
        ]
        self._numbers = [
            np.array([self.names.index(name) for name in sorted(stretch.shares)], np.int64)
            for stretch in self.stretches
        ]
        num_blocks = {name: (num_tokens[name] - 1) // block_tokens for name in self.names}
        empty = [name for name, num in num_blocks.items() if num < 1]
        if empty:
            raise BadInput(
                f"no training window in: {', '.join(empty)} (fewer tokens than one sequence)"
            )
        self._num_blocks = np.array([num_blocks[name] for name in self.names], np.int64)
        self.skipped_tokens = [0] * len(self.stretches)
        self._starts = self._start_positions()

    def _start_positions(self) -> list[np.ndarray]:
        """For each phase, at which token of its endless row of blocks a source begins."""
        position = np.zeros(len(self.names), np.int64)
        found = []
        for p, stretch in enumerate(self.stretches):
            length = stretch.sequence_length
            aligned = -(-position // length) * length
            self.skipped_tokens[p] = int((aligned - position).sum())
            found.append(aligned)
            position = aligned.copy()
            if p + 1 < len(self.stretches):
                num = self.stretches[p + 1].first_sample - stretch.first_sample
                counts = self._interleaves[p].counts(num)
                position[self._numbers[p]] += np.array(counts, np.int64) * length
        return found

    @property
    def shares(self) -> dict[str, float]:
        """Of the first phase."""
        return self.stretches[0].shares

    def phase_of(self, samples: np.ndarray | int) -> np.ndarray:
        """Number of the phase of each sample."""
        return np.searchsorted(self._firsts, samples, side="right") - 1

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source number into `names`, epoch, window) of each sample number; int64 arrays.

        Window w is the tokens from w * L on, L the length of the sample's phase.
        """
        samples = np.asarray(samples, np.int64)
        source, epoch, window = (np.zeros(samples.shape, np.int64) for _ in range(3))
        phases = self.phase_of(samples)
        for p in np.unique(phases).tolist():
            at = phases == p
            source[at], epoch[at], window[at] = self._locate_in(p, samples[at] - self._firsts[p])
        return source, epoch, window

    def _locate_in(self, p: int, samples: np.ndarray):
        length = self.stretches[p].sequence_length
        local, occurrence = self._interleaves[p].locate(samples)
        source = self._numbers[p][local]
        position = self._starts[p][source] + occurrence * length
        block, offset = np.divmod(position, self.block_tokens)
        size = self._num_blocks[source]
        epoch, place = np.divmod(block, size)
        key = source_key(source, epoch, self.seed)
        start = permute(place, size, key) * self.block_tokens + offset
        return source, epoch, start // length

    def counts(self, num_samples: int) -> dict[str, int]:
        """Samples of each source among the first `num_samples`."""
        found = dict.fromkeys(self.names, 0)
        for p, numbers in enumerate(self._numbers):
            first = int(self._firsts[p])
            after = int(self._firsts[p + 1]) if p + 1 < len(self._firsts) else num_samples
            num = max(0, min(num_samples, after) - first)
            for number, count in zip(numbers, self._interleaves[p].counts(num), strict=True):
                found[self.names[number]] += count
        return found

    def tokens_after(self, num_samples: int) -> int:
        """Tokens predicted in the first `num_samples` samples."""
        total = 0
        for p, stretch in enumerate(self.stretches):
            after = int(self._firsts[p + 1]) if p + 1 < len(self._firsts) else num_samples
            num = max(0, min(num_samples, after) - stretch.first_sample)
            total += num * stretch.sequence_length
        return total

    def tokens_by_source(self, num_samples: int) -> dict[str, int]:
        """Tokens of each source predicted in the first `num_samples` samples."""
        found = dict.fromkeys(self.names, 0)
        firsts = [min(stretch.first_sample, num_samples) for stretch in self.stretches]
        for stretch, first, last in zip(
            self.stretches, firsts, [*firsts[1:], num_samples], strict=True
        ):
            before, after = self.counts(first), self.counts(last)
            for name in found:
                found[name] += (after[name] - before[name]) * stretch.sequence_length
        return found

    def chain(self, value: int, first_sample: int, num_samples: int) -> int:
        """The hash chain after `num_samples` more samples, 64 bits; it does not depend on how they were batched.

        H -> H * P + h(sample number, source, epoch, window) modulo 2^64, P odd; 0 before the first sample.
        """
        if num_samples == 0:
            return value
        samples = np.arange(first_sample, first_sample + num_samples)
        words = samples.astype(np.uint64)
        for column in self.locate(samples):
            words = mix(words, column.astype(np.uint64))
        powers = np.multiply.accumulate(np.full(num_samples, _CHAIN_FACTOR, np.uint64))
        rest = (words[:-1] * powers[-2::-1]).sum(dtype=np.uint64) if num_samples > 1 else 0
        return (value * int(powers[-1]) + int(rest) + int(words[-1])) % 2**64


_CHAIN_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def _check(stretches: Sequence[Stretch], block_tokens: int) -> None:
    firsts = [stretch.first_sample for stretch in stretches]
    if firsts[0] != 0 or any(b <= a for a, b in zip(firsts, firsts[1:], strict=False)):
        raise BadInput(f"phases must begin at increasing samples above 0, got {firsts[1:]}")
    for stretch in stretches:
        if block_tokens % stretch.sequence_length:
            raise BadInput(
                f"a phase has sequence_length {stretch.sequence_length}, which does not divide "
                f"block_tokens {block_tokens}; set TrainData.block_tokens to a common multiple of all "
                "lengths before the run begins"
            )


def phases_identity(mixture: PhasedMixture, num_samples: int) -> list[dict[str, Any]]:
    """What decides the samples up to `num_samples`, of the phases after the first that have begun by then."""
    return [
        dataclasses.asdict(stretch)
        for stretch in mixture.stretches[1:]
        if stretch.first_sample < num_samples
    ]
