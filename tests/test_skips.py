"""Samples that are deleted: compared with a plain list from which they were taken."""

import random

import numpy as np
import pytest

from bloomjax.errors import BadInput
from bloomjax.phases import PhasedMixture, Stretch
from bloomjax.skips import KeptSamples, Skips


def test_ranges_are_merged_and_sorted():
    assert Skips.of([(5, 8), (0, 2), (7, 9), (2, 3)]).ranges == ((0, 3), (5, 9))
    assert Skips.of([]).ranges == () and Skips.of([[1, 2]]).below(1).ranges == ()
    assert Skips.of([(0, 3), (5, 9)]).below(7).ranges == ((0, 3), (5, 7))


@pytest.mark.parametrize("bad", [(3, 3), (4, 2), (-1, 2), (1,), (1, 2, 3)])
def test_what_is_no_range(bad):
    with pytest.raises(BadInput, match="ranges \\(first, end\\)"):
        Skips.of([bad])


@pytest.fixture(params=range(20))
def skips(request):
    rng = random.Random(request.param)
    found = []
    for _ in range(rng.randrange(6)):
        first = rng.randrange(200)
        found.append((first, first + rng.randint(1, 30)))
    return Skips.of(found)


def test_positions_count_what_is_left(skips):
    left = [k for k in range(400) if not any(a <= k < b for a, b in skips.ranges)]
    assert skips.samples(np.arange(len(left))).tolist() == left
    for sample in range(400):
        assert skips.position_of(sample) == sum(k < sample for k in left)
    rng = random.Random(7)
    for _ in range(30):
        first = rng.randrange(150)
        num = rng.randrange(60)
        runs = skips.runs(first, num)
        assert [k for s, n in runs for k in range(s, s + n)] == left[first : first + num]
        assert all(a + n < b for (a, n), (b, _) in zip(runs, runs[1:], strict=False))


def test_what_a_run_counts(skips):
    shares = {"aa": 0.5, "bb": 0.3, "cc": 0.2}
    stretches = [Stretch(0, shares, 16), Stretch(120, {"aa": 0.1, "bb": 0.9}, 8)]
    mixture = PhasedMixture(stretches, dict.fromkeys(shares, 2000), seed=3, block_tokens=16)
    kept = KeptSamples(mixture, skips)
    left = [k for k in range(400) if not any(a <= k < b for a, b in skips.ranges)]
    source = mixture.locate(np.array(left))[0]
    for num in (0, 1, 17, 100, 150, 155):
        names = [mixture.names[s] for s in source[:num]]
        assert kept.counts(num) == {name: names.count(name) for name in mixture.names}
        tokens = sum(16 if k < 120 else 8 for k in left[:num])
        assert kept.tokens_after(num) == tokens
        assert kept.end(num) == (left[num - 1] + 1 if num else 0)
        # The chain does not depend on how the samples were batched, nor does it hide which were taken.
        half = kept.chain(0, 0, num // 2)
        assert kept.chain(half, num // 2, num - num // 2) == kept.chain(0, 0, num)
    if skips.ranges and skips.ranges[0][0] < 100:
        assert kept.chain(0, 0, 150) != KeptSamples(mixture, Skips()).chain(0, 0, 150)
    assert [s.first_sample for s in kept.stretches] == [0, sum(k < 120 for k in left)]
    assert kept.sources(3, 40) == {
        name: names.count(name)
        for names in [[mixture.names[s] for s in source[3:43]]]
        for name in set(names)
    }
