import hashlib
import time

import numpy as np
import pytest

from bloomjax.errors import BadInput
from bloomjax.mixture import MAX_SAMPLES, Interleave, permute
from bloomjax.phases import PhasedMixture, Stretch
from bloomjax.tasks.languages import ROOTS_WEIGHTS


def Mixture(weights, num_windows, seed):
    """Of one phase, with windows of one token."""
    shares = {name: w / sum(weights.values()) for name, w in weights.items()}
    num_tokens = {name: num_windows.get(name, 0) + 1 for name in weights}
    return PhasedMixture([Stretch(0, shares, 1)], num_tokens, seed=seed, block_tokens=1)


LANGUAGES = {f"language{i:02}": float((46 - i) ** 4) for i in range(46)}
WINDOWS = {name: 10 ** (1 + i % 7) + 7 * i for i, name in enumerate(LANGUAGES)}


def lognormal(num, sigma, seed):
    return np.exp(np.random.default_rng(seed).normal(0, sigma, num)).tolist()


WEIGHTS = {
    "roots": list(ROOTS_WEIGHTS.values()),
    "one": [3.0],
    "equal 2": [1.0] * 2,
    "equal 46": [1.0] * 46,
    "equal 47": [0.1] * 47,
    "powers of 2": [2.0**-i for i in range(40)],
    "golden": [1.618**-i for i in range(60)],
    "one giant": [1e12, *range(1, 20)],
    **{f"lognormal {s} {n}": lognormal(n, s, n) for s in (0.5, 1, 3, 6) for n in (3, 46, 300)},
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_counts_stay_within_two_of_the_share(name):
    weights = np.array(WEIGHTS[name])
    shares = weights / weights.sum()
    interleave = Interleave(WEIGHTS[name])
    rng = np.random.default_rng(0)
    some = [int(2 ** rng.uniform(0, 31)) for _ in range(100)] + [0, 1, 2, 1000, 2**31 - 1, 2**31]
    for k in some:
        counts = np.array(interleave.counts(k))
        assert counts.sum() == k and counts.min() >= 0
        assert np.abs(counts - k * shares).max() < 2, k
    # Every k of a stretch at the beginning and of one at the very end.
    for first in (0, MAX_SAMPLES - 10_000):
        source, _ = interleave.locate(np.arange(first, first + 10_000))
        counts = np.array(interleave.counts(first), float)
        error = counts - first * shares
        for k, s in enumerate(source, first + 1):
            error[s] += 1
            error -= shares
            assert np.abs(error).max() < 2, k


def test_roots_holds_the_rarest_language():
    assert min(ROOTS_WEIGHTS.values()) < 2e-7  # Tumbuka
    counts = Interleave(list(ROOTS_WEIGHTS.values())).counts(220_000_000)  # BLOOM's samples
    total = sum(ROOTS_WEIGHTS.values())
    for (name, weight), count in zip(ROOTS_WEIGHTS.items(), counts, strict=True):
        assert abs(count - 220_000_000 * weight / total) < 2, name
    assert 35 <= counts[list(ROOTS_WEIGHTS).index("tum")] <= 39


@pytest.mark.parametrize("name", ["roots", "equal 47", "lognormal 3 46"])
def test_locate_agrees_with_counts(name):
    interleave = Interleave(WEIGHTS[name])
    rng = np.random.default_rng(1)
    samples = np.concatenate([np.arange(200), rng.integers(0, MAX_SAMPLES, 200), [MAX_SAMPLES - 1]])
    source, occurrence = interleave.locate(samples)
    for k, s, n in zip(samples.tolist(), source, occurrence, strict=True):
        before, after = interleave.counts(k), interleave.counts(k + 1)
        assert before[s] == n
        assert [a - b for a, b in zip(after, before, strict=True)] == [
            i == s for i in range(len(before))
        ]


@pytest.mark.parametrize("name", ["roots", "equal 46", "powers of 2", "lognormal 1 300"])
def test_occurrences_count_up_from_zero(name):
    source, occurrence = Interleave(WEIGHTS[name]).locate(np.arange(50_000))
    for s in np.unique(source):
        mine = occurrence[source == s]
        np.testing.assert_array_equal(mine, np.arange(len(mine)))


def test_locate_keeps_order_and_shape_of_what_it_is_asked():
    interleave = Interleave(WEIGHTS["roots"])
    source, occurrence = interleave.locate(np.arange(1000))
    shuffled = np.random.default_rng(2).permutation(1000)
    again_source, again_occurrence = interleave.locate(shuffled)
    np.testing.assert_array_equal(again_source, source[shuffled])
    np.testing.assert_array_equal(again_occurrence, occurrence[shuffled])
    assert interleave.locate(np.array([], np.int64))[0].shape == (0,)


def test_every_epoch_is_another_permutation():
    windows = {"a": 1, "b": 2, "c": 7, "d": 30, "e": 1000}
    mixture = Mixture({name: 1.0 for name in windows}, windows, seed=5)
    source, epoch, window = mixture.locate(np.arange(15_000))
    for number, name in enumerate(mixture.names):
        size, at = windows[name], source == number
        num_epochs = at.sum() // size
        orders = window[at][: num_epochs * size].reshape(num_epochs, size)
        np.testing.assert_array_equal(np.sort(orders, 1), np.tile(np.arange(size), (num_epochs, 1)))
        np.testing.assert_array_equal(epoch[at], np.arange(at.sum()) // size)
        if size > 20:  # of so many orders no two are equal by chance
            assert len({tuple(order) for order in orders}) == num_epochs
            assert tuple(range(size)) not in {tuple(order) for order in orders}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 64, 65, 1000, 4096, 100_003])
def test_permute_is_a_permutation(size):
    for key in (0, 1, 2**63):
        out = permute(np.arange(size), np.full(size, size), np.full(size, key, np.uint64))
        np.testing.assert_array_equal(np.sort(out), np.arange(size))


def test_permute_holds_for_the_largest_sizes():
    size = np.array([2**40, 2**40 - 1, 2**39 + 1])
    index = size - 1
    out = permute(index, size, np.zeros(3, np.uint64))
    assert (out >= 0).all() and (out < size).all()


def test_permute_is_uniform():
    """Every value lands on every position equally often: chi-square over 4,000 keys."""
    size, num_keys = 9, 4000
    index = np.tile(np.arange(size), num_keys)
    keys = np.repeat(np.arange(num_keys), size).astype(np.uint64)
    out = permute(index, np.full(index.shape, size), keys * np.uint64(977))
    table = np.zeros((size, size))
    np.add.at(table, (index, out), 1)
    expected = num_keys / size
    chi_square = ((table - expected) ** 2 / expected).sum()
    assert chi_square < 110  # 64 degrees of freedom: 1 of 3,000 uniform tables is above


def digest(mixture, first, num):
    columns = mixture.locate(np.arange(first, first + num))
    return hashlib.sha256(np.stack(columns, 1).astype("<i8").tobytes()).hexdigest()


def test_order_is_frozen():
    # NEVER change these values. A run that is resumed by a newer version must see the samples it
    # would have seen; if this test fails, the code is wrong, whatever the reason for the change was.
    mixture = Mixture(LANGUAGES, WINDOWS, seed=1234)
    assert (
        digest(mixture, 0, 10_000)
        == "2e8a87bf2f0a7773d55381f9ef7bffc60016adc3679dd104dfe4cb685e92df22"
    )
    assert (
        digest(mixture, 200_000_000, 1_000)
        == "5ecb0503097f1149afa5be8e77b26be170f5b237c4ea8c52897f3ea62eb0bdae"
    )


def test_seek_takes_no_time():
    start = time.perf_counter()
    Mixture(LANGUAGES, WINDOWS, seed=0).locate(np.arange(2 * 10**8, 2 * 10**8 + 2048))
    assert time.perf_counter() - start < 1


def test_order_does_not_depend_on_the_dict():
    reverse = Mixture(dict(reversed(LANGUAGES.items())), dict(reversed(WINDOWS.items())), seed=7)
    assert digest(reverse, 0, 5000) == digest(Mixture(LANGUAGES, WINDOWS, seed=7), 0, 5000)
    assert reverse.counts(12345) == Mixture(LANGUAGES, WINDOWS, seed=7).counts(12345)


def test_order_depends_on_seed_but_not_the_shares_of_any_stretch():
    one, other = (Mixture(LANGUAGES, WINDOWS, seed=s).locate(np.arange(5000)) for s in (1, 2))
    np.testing.assert_array_equal(one[0], other[0])
    big = np.array([WINDOWS[name] for name in sorted(LANGUAGES)])[one[0]] > 100
    assert (one[2] != other[2])[big].mean() > 0.95


def test_scale_of_weights_does_not_matter():
    scaled = {name: 1e-9 * w for name, w in LANGUAGES.items()}
    one, other = Mixture(LANGUAGES, WINDOWS, 0), Mixture(scaled, WINDOWS, 0)
    for name, share in one.shares.items():
        assert other.shares[name] == pytest.approx(share, rel=1e-12)
    assert sum(one.shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    "weights", [[], [0.0, 1.0], [-1.0, 2.0], [float("nan"), 1.0], [float("inf")]]
)
def test_weights_must_be_positive_numbers(weights):
    with pytest.raises(BadInput, match="mixture weights must be positive numbers"):
        Interleave(weights)
    with pytest.raises(BadInput, match="mixture weights must be positive numbers"):
        Mixture({str(i): w for i, w in enumerate(weights)}, {"0": 9, "1": 9}, seed=0)


@pytest.mark.parametrize("sample", [-1, MAX_SAMPLES])
def test_sample_numbers_have_a_range(sample):
    with pytest.raises(BadInput, match="sample numbers must lie in"):
        Interleave([1.0, 2.0]).locate(np.array([5, sample]))


def test_a_source_without_windows_is_named():
    with pytest.raises(BadInput, match="no training window in: b, c "):
        Mixture({"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 3, "b": 0}, seed=0)
