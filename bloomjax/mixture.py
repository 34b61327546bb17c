"""Sample number -> (source, epoch, window), in closed form.

The state of the data is one integer: how many samples were consumed. Everything here is exact integer arithmetic on
numpy arrays, so that sample k is the same on every machine, host count and batch size. NEVER CHANGE THE ORDER THIS FILE
MAKES: a run of three months depends on it, and tests/test_mixture.py freezes it.
"""

import dataclasses
import heapq
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from bloomjax.errors import BadInput

MAX_SAMPLES = 2**31  # sample numbers below this keep every product within 64 bits
_ONE = 1 << 32  # shares of a split are integers over 2^32


@dataclasses.dataclass(frozen=True)
class _Split:
    """A node of the tree: sample m of the node goes left iff round((m+1)p) > round(mp), p = left_share / 2^32."""

    left_share: int
    left: "_Split | int"
    right: "_Split | int"


def _huffman(weights: list[float]) -> "_Split | int":
    """The tree that joins the two lightest nodes first (Huffman 1952); leaves are source numbers."""
    heap: list[tuple[float, int, _Split | int]] = [(w, i, i) for i, w in enumerate(weights)]
    heapq.heapify(heap)
    order = len(weights)  # ties go to the older node
    while len(heap) > 1:
        (light, _, right), (heavy, _, left) = heapq.heappop(heap), heapq.heappop(heap)
        share = round(heavy / (heavy + light) * _ONE)
        heapq.heappush(heap, (heavy + light, order, _Split(share, left, right)))
        order += 1
    return heap[0][2]


def _left_count(m, share: int):
    """How many of a node's first m samples go left: round(m * share / 2^32), for ints or uint64 arrays."""
    if isinstance(m, np.ndarray):
        return (m * np.uint64(share) + np.uint64(_ONE // 2)) >> np.uint64(32)
    return (m * share + _ONE // 2) >> 32


def _check_weights(weights: Mapping[Any, float]) -> None:
    bad = {name: w for name, w in weights.items() if not 0 < w < math.inf}
    if bad or not weights:
        raise BadInput(f"mixture weights must be positive numbers, got {bad or 'none'}")


class Interleave:
    """Deals sample numbers to sources so that after any k samples each source has its share of k.

    A tree of two-way splits, each rounding to the nearest integer: counts are off by at most 1/2 a level, halved or
    better at every second level of a Huffman tree, so |count - k * share| < 2 for every source and every k. A lookup
    costs the entropy of the mixture in levels (3.2 for ROOTS) instead of one step a source.
    """

    def __init__(self, weights: list[float]):
        """`weights` are positive shares in any unit."""
        _check_weights(dict(enumerate(weights)))
        self.num_sources = len(weights)
        self._tree = _huffman([float(w) for w in weights])

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source number and occurrence number (how many earlier samples that source had) of each sample, int64."""
        samples = np.asarray(samples, np.int64)
        if samples.size and (samples.min() < 0 or samples.max() >= MAX_SAMPLES):
            raise BadInput(
                f"sample numbers must lie in [0, {MAX_SAMPLES}), got {samples.min()}..{samples.max()}"
            )
        source = np.zeros(samples.shape, np.int64)
        occurrence = np.zeros(samples.shape, np.int64)
        stack = [(self._tree, np.arange(samples.size), samples.astype(np.uint64))]
        while stack:
            node, rows, m = stack.pop()
            if not rows.size:
                continue
            if isinstance(node, int):
                source[rows], occurrence[rows] = node, m
                continue
            before = _left_count(m, node.left_share)
            left = _left_count(m + np.uint64(1), node.left_share) > before
            stack.append((node.left, rows[left], before[left]))
            stack.append((node.right, rows[~left], (m - before)[~left]))
        return source, occurrence

    def counts(self, num_samples: int) -> list[int]:
        """How many of the first `num_samples` samples each source has."""
        counts = [0] * self.num_sources
        stack: list[tuple[_Split | int, int]] = [(self._tree, int(num_samples))]
        while stack:
            node, m = stack.pop()
            if isinstance(node, int):
                counts[node] = m
                continue
            left = int(_left_count(m, node.left_share))
            stack.append((node.left, left))
            stack.append((node.right, m - left))
        return counts


def permute(index: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """A keyed permutation of [0, size), elementwise: six Feistel rounds, walked until the value falls inside.

    `index` < `size` <= 2^40; arrays of one shape, int64. Equal (size, key) give one permutation.
    """
    x = np.asarray(index).astype(np.uint64)
    size = np.asarray(size).astype(np.uint64)
    half = np.maximum(np.ceil(np.log2(np.maximum(size, 2).astype(np.float64)) / 2), 1).astype(
        np.uint64
    )
    mask = (np.uint64(1) << half) - np.uint64(1)
    key = np.asarray(key).astype(np.uint64)
    todo = np.arange(x.size)
    while todo.size:
        h, low, k = half[todo], mask[todo], key[todo]
        left, right = x[todo] >> h, x[todo] & low
        for round_number in range(6):
            left, right = right, left ^ (mix(right, k + np.uint64(round_number)) & low)
        x[todo] = (left << h) | right
        todo = todo[x[todo] >= size[todo]]
    return x.astype(np.int64)


def mix(x: np.ndarray, key: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer (Steele et al. 2014) of x and key; uint64 arithmetic wraps."""
    z = x * np.uint64(0x9E3779B97F4A7C15) + key * np.uint64(0xD1B54A32D192ED03)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def source_key(source: np.ndarray, epoch: np.ndarray, seed: int) -> np.ndarray:
    """Key of the permutation of an epoch of a source, uint64."""
    seeds = np.full(source.shape, seed, np.int64).astype(np.uint64)
    return mix((source.astype(np.uint64) << np.uint64(40)) + epoch.astype(np.uint64), seeds)
