"""Which steps are refused, compared with numpy's median, and what follows."""

import numpy as np
import pytest

from bloomjax.errors import BadInput
from bloomjax.guard import SpikeGuard

NO_LIMIT = np.finfo(np.float32).max


def fed(steps, **options):
    rng = np.random.default_rng(1)
    losses = 5 - 0.01 * np.arange(400) + rng.normal(0, 0.02, 400)
    norms = rng.gamma(9, 0.1, 400)
    guard = SpikeGuard(**options)
    for step in range(steps):
        assert guard.judge(step + 1, losses[step], norms[step], True) is None
    return guard, losses, norms


def test_limits_are_those_of_the_definition():
    guard, losses, norms = fed(300, window_steps=100, loss_deviations=6.0, grad_norm_deviations=9.0)
    expected = []
    for values, deviations in ((losses, 6.0), (norms, 9.0)):
        # Step 301 does not wait for step 300.
        window = values[199:299]
        median = np.median(window[-16:])
        spread = 1.4826 / 2**0.5 * np.median(np.abs(np.diff(window)))
        expected.append(median + deviations * max(spread, 0.01 * median))
    np.testing.assert_allclose(guard.limits(301), expected, rtol=1e-6)


def test_they_do_not_depend_on_when_a_step_was_heard_of():
    early, losses, norms = fed(50)
    late, *_ = fed(49)
    assert (early.limits(51) == late.limits(51)).all()
    assert (early.limits(52) != late.limits(52)).any()


def test_a_falling_loss_does_not_widen_the_limit():
    """The spread is that of the noise, 0.05, whether the loss falls by 4 over the window or not at all."""
    rng = np.random.default_rng(2)
    noise = rng.normal(0, 0.05, 128)
    limits = []
    for slope in (0.0, 4 / 128):
        guard = SpikeGuard(loss_deviations=10.0)
        for step in range(128):
            guard.judge(step + 1, 4 + slope * (127 - step) + noise[step], 1.0, True)
        limits.append(guard.limits(130)[0] - 4)
    assert 0.4 < limits[0] < 0.7 and limits[1] - limits[0] == pytest.approx(slope * 8, abs=0.1)


def test_too_few_steps_make_no_limits():
    guard, *_ = fed(32, min_steps=32)
    assert guard.limits(33).tolist() == [NO_LIMIT] * 2  # 31 count
    assert (guard.limits(34) < NO_LIMIT).all()
    guard, *_ = fed(60, loss_deviations=None)
    assert guard.limits(62)[0] == NO_LIMIT > guard.limits(62)[1]


def test_a_plateau_without_noise_has_room():
    guard = SpikeGuard(loss_deviations=15.0)
    for step in range(1, 101):
        guard.judge(step, 2.0, 1.0, True)
    assert guard.limits(102)[0] == pytest.approx(2.0 + 15 * 0.02)


def test_blooms_spike_of_april_12():
    """2.2 -> 5.1 with a gradient norm of 960; before it the norm was about 0.15 (chronicles of tr11)."""
    rng = np.random.default_rng(0)
    guard = SpikeGuard()
    for step in range(1, 200):
        guard.judge(step, 2.2 + rng.normal(0, 0.02), 0.15 + rng.normal(0, 0.02), True)
    loss, norm = guard.limits(200)
    assert 2.3 < loss < 5.1 and 0.2 < norm < 960


def test_what_follows():
    guard = SpikeGuard(policy="skip", max_in_a_row=2)
    first = guard.judge(5, float("nan"), 1.0, False)
    assert (first.cause, first.action, first.in_a_row) == ("not_finite", "skip", 1)
    assert guard.judge(6, 9.0, 1.0, False).cause == "spike"
    third = guard.judge(7, 9.0, 1.0, False)
    assert (third.action, third.in_a_row) == ("stop", 3)
    assert guard.num_refused == 3
    assert guard.judge(8, 9.0, 1.0, True) is None
    assert guard.judge(9, 9.0, 1.0, False).in_a_row == 1
    assert SpikeGuard(policy="rollback").judge(1, 1.0, np.inf, False).action == "rollback"
    assert SpikeGuard(policy="stop").judge(1, 1.0, np.inf, False).action == "stop"


def test_going_back_again_and_again_ends():
    """Steps that are done again are no sign that it got better."""
    guard = SpikeGuard(policy="rollback", max_in_a_row=2)
    for _ in range(2):
        guard.restore({"taken": [[1, 3.0, 1.0]], "num_refused": 0})
        assert guard.judge(2, 3.0, 1.0, True) is None
        assert guard.judge(3, np.nan, 1.0, False).action == "rollback"
    guard.restore(None)
    assert guard.judge(1, 3.0, 1.0, True) is None
    assert guard.judge(3, np.nan, 1.0, False).action == "stop"


def test_a_checkpoint_keeps_the_limits():
    guard, *_ = fed(77)
    again = SpikeGuard()
    again.restore(guard.state())
    assert again.state() == guard.state()
    assert (again.limits(78) == guard.limits(78)).all() and (
        again.limits(90) == guard.limits(90)
    ).all()


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "ignore"}, {"loss_deviations": 0}, {"grad_norm_deviations": -1.0}, {"min_steps": 1},
        {"min_steps": 9, "window_steps": 8}, {"rollback_steps": 0}, {"max_in_a_row": 0},
    ],
)  # fmt: skip
def test_bad_input(options):
    with pytest.raises(BadInput, match="SpikeGuard"):
        SpikeGuard(**options)
