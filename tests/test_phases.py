"""Phases: one is mixture.py's order, several lose and repeat nothing."""

import numpy as np
import pytest

from bloomjax.errors import BadInput
from bloomjax.mixture import Interleave, permute, source_key
from bloomjax.phases import PhasedMixture, Stretch, phases_identity

SIZES = {"aa": 1000, "bb": 333, "cc": 77, "dd": 500}  # blocks
SHARES = {"aa": 0.6, "bb": 0.3, "cc": 0.1}


def phased(*stretches, block_tokens=16, seed=5):
    tokens = {name: num * block_tokens + 3 for name, num in SIZES.items()}
    return PhasedMixture(stretches, tokens, seed=seed, block_tokens=block_tokens)


def test_one_phase_is_the_mixture():
    names = sorted(SHARES)
    interleave = Interleave([SHARES[name] for name in names])
    new = phased(Stretch(0, SHARES, 16))
    samples = np.concatenate([np.arange(5000), np.arange(2 * 10**8, 2 * 10**8 + 100)])
    source, occurrence = interleave.locate(samples)
    size = np.array([SIZES[name] for name in names])[source]
    epoch, position = np.divmod(occurrence, size)
    window = permute(position, size, source_key(source, epoch, 5))
    for a, b in zip((source, epoch, window), new.locate(samples), strict=True):
        np.testing.assert_array_equal(a, b)
    assert new.names == tuple(names) and list(new.counts(12345).values()) == interleave.counts(
        12345
    )
    assert new.shares == SHARES and new.skipped_tokens == [0]


def tokens_of(mixture, num_samples):
    """{source: [(epoch, token)]} in the order of samples, by brute force."""
    samples = np.arange(num_samples)
    lengths = [mixture.stretches[p].sequence_length for p in mixture.phase_of(samples)]
    found = {name: [] for name in mixture.names}
    for source, epoch, window, length in zip(*mixture.locate(samples), lengths, strict=True):
        start = int(window) * length
        found[mixture.names[source]] += [(int(epoch), t) for t in range(start, start + length)]
    return found


@pytest.mark.parametrize(
    "stretches",
    [
        [Stretch(0, SHARES, 16), Stretch(700, {"aa": 0.1, "bb": 0.1, "cc": 0.8}, 16)],
        [
            Stretch(0, SHARES, 16),
            Stretch(700, {"bb": 0.5, "dd": 0.5}, 16),
            Stretch(1500, SHARES, 16),
        ],
        [Stretch(0, SHARES, 16), Stretch(701, SHARES, 4), Stretch(1502, SHARES, 8)],
        [Stretch(0, SHARES, 4), Stretch(703, SHARES, 8), Stretch(1501, {"cc": 1.0}, 16)],
    ],
)
def test_no_token_is_lost_and_none_is_repeated(stretches):
    mixture = phased(*stretches)
    num = 3000
    found = tokens_of(mixture, num)
    assert sum(map(len, found.values())) == mixture.tokens_after(num)
    seen = 0
    for name, pairs in found.items():
        assert len(set(pairs)) == len(pairs), name  # each token once an epoch
        whole = SIZES[name] * 16
        epochs = [epoch for epoch, _ in pairs]
        assert epochs == sorted(epochs)
        for epoch in range(max(epochs, default=0)):  # an epoch that is over had all of them
            seen += whole - epochs.count(epoch)
    # What is missing is what no window of the new length could take.
    assert seen <= sum(mixture.skipped_tokens)
    assert all(s < len(SIZES) * 16 for s in mixture.skipped_tokens)


def test_longer_windows_may_skip_a_remainder_and_say_so():
    growing = phased(Stretch(0, SHARES, 4), Stretch(703, SHARES, 16))
    assert growing.skipped_tokens[0] == 0 and 0 < growing.skipped_tokens[1] <= 3 * 12
    shrinking = phased(Stretch(0, SHARES, 16), Stretch(703, SHARES, 4))
    assert shrinking.skipped_tokens == [0, 0]


def test_counts_and_shares_of_each_phase():
    later = {"aa": 0.2, "dd": 0.8}
    mixture = phased(Stretch(0, SHARES, 16), Stretch(10_000, later, 16))
    assert mixture.names == ("aa", "bb", "cc", "dd")
    for num in (0, 1, 9_999, 10_000, 10_001, 25_000):
        source, _, _ = mixture.locate(np.arange(num))
        assert list(mixture.counts(num).values()) == np.bincount(source, minlength=4).tolist()
        first, second = min(num, 10_000), max(0, num - 10_000)
        for name in mixture.names:
            expected = first * SHARES.get(name, 0) + second * later.get(name, 0)
            assert abs(mixture.counts(num)[name] - expected) < 4


def test_a_phase_leaves_what_was_before_it_alone():
    alone = phased(Stretch(0, SHARES, 16))
    two = phased(Stretch(0, SHARES, 16), Stretch(777, {"dd": 1.0}, 8))
    for a, b in zip(alone.locate(np.arange(777)), two.locate(np.arange(777)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert alone.chain(0, 0, 777) == two.chain(0, 0, 777)
    assert alone.chain(0, 0, 778) != two.chain(0, 0, 778)


def test_the_chain_does_not_depend_on_batches_and_sees_everything():
    mixture = phased(Stretch(0, SHARES, 16))
    whole = mixture.chain(0, 0, 5000)
    value, first = 0, 0
    for size in [1, 16, 17, 0, 700, 1000, 3266]:
        value, first = mixture.chain(value, first, size), first + size
    assert first == 5000 and value == whole
    others = [
        phased(Stretch(0, SHARES, 16), seed=6),
        phased(Stretch(0, SHARES | {"aa": 0.6001}, 16)),
        phased(Stretch(0, SHARES, 8)),
    ]
    values = {each.chain(0, 0, 5000) for each in [mixture, *others]} | {mixture.chain(0, 1, 5000)}
    assert len(values) == 5
    # A reference in whole numbers.
    from bloomjax.phases import _CHAIN_FACTOR, mix

    expected = 0
    columns = mixture.locate(np.arange(50))
    for k in range(50):
        word = np.array([k], np.uint64)
        for column in columns:
            word = mix(word, column[k : k + 1].astype(np.uint64))
        expected = (expected * int(_CHAIN_FACTOR) + int(word[0])) % 2**64
    assert mixture.chain(0, 0, 50) == expected


def test_only_phases_that_have_begun_count():
    mixture = phased(Stretch(0, SHARES, 16), Stretch(100, {"dd": 1.0}, 16))
    assert phases_identity(mixture, 100) == []
    assert phases_identity(mixture, 101) == [
        {"first_sample": 100, "shares": {"dd": 1.0}, "sequence_length": 16}
    ]


@pytest.mark.parametrize(
    "stretches, message",
    [
        ([Stretch(0, SHARES, 16), Stretch(0, SHARES, 16)], "increasing samples above 0, got .0"),
        ([Stretch(0, SHARES, 16), Stretch(9, SHARES, 16), Stretch(5, SHARES, 8)], "got .9, 5"),
        ([Stretch(0, SHARES, 16), Stretch(9, SHARES, 6)], "length 6, which does not divide block_tokens 16"),
        ([Stretch(0, SHARES, 32)], "length 32, which does not divide block_tokens 16"),
    ],
)  # fmt: skip
def test_phases_that_cannot_be(stretches, message):
    with pytest.raises(BadInput, match=message):
        phased(*stretches)


def test_too_little_text():
    with pytest.raises(BadInput, match="no training window in: aa"):
        PhasedMixture([Stretch(0, {"aa": 1.0}, 16)], {"aa": 16}, seed=0, block_tokens=16)
