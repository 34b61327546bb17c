"""The predicted loss of a run that goes on: the numbers of `check`, one alarm an excursion, none after a restart."""

import dataclasses
import importlib
import json
import math
import sys

import numpy as np
import pytest
import tiny_run
from simulated_runs import best_params, sweep, training_loss
from tiny_run import REPOSITORY

from bloomjax import flops
from bloomjax.errors import BadInput
from bloomjax.health import Health
from bloomjax.journal import Journal, read_lines
from bloomjax.loss_curves import check, fit_profile, smooth, thin
from bloomjax.predicted_loss import PredictedLoss
from bloomjax.scaling_fits import Fit, fit_parametric
from bloomjax.scaling_runs import Curve, final_runs
from bloomjax.schedules import CosineSchedule
from bloomjax.stops import StopConditions

NUM_STEPS = 1000


@pytest.fixture(scope="module")
def law(tmp_path_factory):
    """The file that `fit --json` would write of a simulated sweep."""
    curves = sweep(0)
    found = fit_parametric(final_runs(curves), num_starts=1125, num_bootstrap=50)
    details = found.details | {"profile": fit_profile(curves, found.law).record()}
    path = tmp_path_factory.mktemp("law") / "law.json"
    path.write_text(json.dumps(dataclasses.replace(found, details=details).record()))
    return path


def changed(law, path, **text):
    """The same law, with other details."""
    record = json.loads(law.read_text())
    record["details"]["text"] = text
    path.write_text(json.dumps(record))
    return path


class Run:
    """What a run does with it: records in metrics.jsonl, cut back by a restart."""

    def __init__(self, folder, law, number=0, num_steps=NUM_STEPS, **arguments):
        folder.mkdir()
        rng = np.random.default_rng(1000 + number)
        compute = 8.1e19 * 5 ** rng.uniform(0, 1)
        self.params = best_params(compute) * np.exp(rng.uniform(-0.7, 0.7))
        self.tokens = compute / 6 / self.params
        self.folder, self.rng = folder, rng
        self.num_steps = num_steps
        self.journal = Journal(folder)
        self.arguments = {"law": str(law), "every_steps": 20, "patience_steps": 100} | arguments
        self.start(0)

    def losses(self, **schedule):
        return training_loss(
            self.params, self.tokens, self.rng, num_steps=self.num_steps, **schedule
        )

    def start(self, step):
        """Of a process that goes on after `step`."""
        path = self.folder / "metrics.jsonl"
        kept = [r for r in read_lines(path)[0] if r["step"] <= step]
        path.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self.step = step
        self.part = PredictedLoss(**self.arguments)
        self.part.begin(
            model_dir=self.folder, journal=self.journal, params=self.params, end_tokens=self.tokens,
            schedule_tokens=self.tokens, sequence_length=2048,
        )  # fmt: skip

    def take(self, losses, upto):
        """Steps up to `upto`, each with its loss of `losses` [steps]; the record of the last one."""
        record = {}
        with (self.folder / "metrics.jsonl").open("a") as file:
            for step in range(self.step + 1, upto + 1):
                tokens = int(self.tokens * step / self.num_steps)
                record = {"step": step, "tokens": tokens, "loss": float(losses[step - 1])}
                record |= self.part.note(record)
                print(json.dumps(record), file=file)
        self.step = upto
        return record

    def events(self, event="off_curve"):
        lines = read_lines(self.folder / "journal.jsonl")[0]
        return [line for line in lines if line["event"] == event]


def test_the_size_that_the_law_counts(law, tmp_path):
    shape = dict(vocab_size=320, emb_dim=32, num_layers=2, mlp_dim=128)
    inner = flops.num_non_embedding_params(emb_dim=32, num_layers=2, mlp_dim=128)
    assert PredictedLoss(law=str(law)).params_of(shape) == inner + 320 * 32
    record = json.loads(law.read_text())
    record["details"]["params_column"] = "params_non_embedding"
    (tmp_path / "kaplan.json").write_text(json.dumps(record))
    assert PredictedLoss(law=str(tmp_path / "kaplan.json")).params_of(shape) == inner


# ---- what is written ----


def test_records_have_the_band_of_check(law, tmp_path):
    run = Run(tmp_path / "run", law)
    losses = run.losses()
    record = run.take(losses, 700)
    seen = run.tokens * np.arange(1, 701) // run.num_steps
    curve = thin(Curve("x", run.params, seen, smooth(losses[:700]), run.tokens))
    expected = check(curve, run.tokens, Fit.read(str(law), "law"))
    assert record["curve_verdict"] == expected.verdict == "on its curve"
    assert record["smoothed_loss"] == pytest.approx(expected.loss, abs=1e-6)
    assert record["predicted_loss"] == pytest.approx(expected.expected, abs=1e-6)
    low, high = record["predicted_loss_low"], record["predicted_loss_high"]
    assert (low, high) == pytest.approx(expected.interval, abs=1e-6)
    assert low < record["loss"] * 1.03 and high > record["loss"] * 0.97
    records = read_lines(run.folder / "metrics.jsonl")[0]
    # The law says nothing before 5 % of a run.
    assert [r["step"] for r in records if "predicted_loss" in r] == list(range(51, 701))
    assert [r["step"] for r in records if "curve_verdict" in r] == list(range(20, 701, 20))


@pytest.mark.slow
def test_the_tool_says_the_same_of_the_same_run(tiny_text, tmp_path, law, capsys, monkeypatch):
    """A whole run, whose law is made from its own curve; `check` on its MODEL_DIR, and its last record."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    scaling = importlib.import_module("scaling")
    size = flops.num_params(vocab_size=320, emb_dim=32, num_layers=2, mlp_dim=128)
    fake, model_dir = fitting_law(law, tmp_path / "law.json", size), tmp_path / "run"
    line = tiny_run.command(
        tiny_text, model_dir, f"--gin.PredictedLoss.law='{fake}'", "--gin.PredictedLoss.every_steps=10",
        "--gin.Health.predicted_loss=@PredictedLoss()", "--gin.PredictedLoss.patience_steps=15",
    )  # fmt: skip
    done = tiny_run.execute(line)
    assert done.returncode == 0, done.stderr
    last = tiny_run.records(model_dir)[-1]
    with pytest.raises(SystemExit) as end:
        scaling.main(["scaling.py", "check", str(model_dir), f"--law={fake}", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert last["step"] == 40
    assert last["curve_verdict"] == found["verdict"]
    assert last["smoothed_loss"] == pytest.approx(found["loss"], abs=1e-6)
    assert last["predicted_loss"] == pytest.approx(found["expected"], abs=1e-6)
    assert end.value.code == (2 if found["verdict"] == "slow" else 0)
    assert {r["step"] for r in tiny_run.records(model_dir) if "curve_verdict" in r} == {10, 20, 30, 40}  # fmt: skip


def fitting_law(law, path, params, factor=1.0, end_loss=5.5):
    """A law by which a tiny run of `params` parameters ends at `end_loss`; its profile stays."""
    record = json.loads(law.read_text())
    size_term = (end_loss * factor - 1.0) * params**0.34
    values = {"E": 1.0, "A": size_term, "B": 1e-3, "alpha": 0.34, "beta": 0.35}
    record |= values
    record["bootstrap"] = [
        [values["E"], values["A"] * x, *list(values.values())[2:]] for x in (0.999, 1.001)
    ]
    record["limits"]["flops"] = [1.0, 1e30]
    path.write_text(json.dumps(record))
    return path


# ---- alarms ----


def test_good_runs_are_never_an_incident(law, tmp_path, capsys):
    """20 of 20, although each is looked at 50 times."""
    for number in range(20):
        run = Run(tmp_path / f"run{number}", law, number)
        run.take(run.losses(), NUM_STEPS)
        assert not run.events() and not run.events("on_curve")
    assert not capsys.readouterr().err


@pytest.mark.parametrize("number", range(3))
def test_a_slow_run_is_one_incident_whatever_restarts(law, tmp_path, capsys, number):
    """A fifth of the learning rate. Killed at random, and set back by up to 150 steps; one line all the same."""
    run = Run(tmp_path / "run", law, number)
    losses = run.losses(peak=0.2)
    rng = np.random.default_rng(number)
    while run.step < NUM_STEPS:
        run.take(losses, min(run.step + int(rng.integers(1, 200)), NUM_STEPS))
        if rng.random() < 0.7 and run.step < NUM_STEPS:
            run.start(max(run.step - int(rng.integers(0, 150)), 0))
    (event,) = run.events()
    assert event["verdict"] == "slow" and event["step"] - event["since_step"] >= 100
    assert event["loss"] > event["high"] > event["expected"] > event["low"]
    assert event["end_projected"] > event["end_predicted"] and event["law"] == str(law)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith(f"bloomjax: step {event['step']}: the training loss ")  # fmt: skip
    assert f"is above what {law} predicts" in err and "off_curve in journal.jsonl" in err
    # Without a restart it is said at the same step.
    again = Run(tmp_path / "again", law, number)
    again.take(losses, NUM_STEPS)
    assert [e["since_step"] for e in again.events()] == [event["since_step"]]


def test_patience(law, tmp_path):
    """No incident before the verdict has been the same for so long; half of the patience is none."""
    run = Run(tmp_path / "run", law, patience_steps=200)
    losses = run.losses()
    losses[600:720] *= 1.3
    run.take(losses, NUM_STEPS)
    assert not run.events() and not run.events("on_curve")
    records = read_lines(run.folder / "metrics.jsonl")[0]
    verdicts = [r["curve_verdict"] for r in records if "curve_verdict" in r]
    assert "slow" in verdicts and verdicts[-1] == "on its curve"


def test_back_on_its_curve_and_off_again(law, tmp_path, capsys):
    run = Run(tmp_path / "run", law)
    losses = run.losses()
    losses[300:450] *= 1.3
    losses[700:] *= 0.8
    run.take(losses, 560)
    run.start(400)  # before it came back: said once all the same
    run.take(losses, NUM_STEPS)
    off, back = run.events(), run.events("on_curve")
    assert [e["verdict"] for e in off] == ["slow", "better than predicted"]
    assert len(back) == 1 and off[0]["step"] < back[0]["step"] < off[1]["step"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and " above what " in lines[0] and " below what " in lines[1]


def test_a_law_that_is_bound_later_is_heard(law, tmp_path):
    """The run has been slow for long when it is bound: an incident at the first look."""
    run = Run(tmp_path / "run", law, patience_steps=100_000)
    losses = run.losses(peak=0.2)
    run.take(losses, 600)
    assert not run.events()
    run.arguments["patience_steps"] = 100
    run.start(600)
    run.take(losses, 620)
    assert [e["step"] for e in run.events()] == [620]


def test_a_cosine_that_has_ended_is_no_surprise(law, tmp_path):
    """TRAIN_STEPS was raised: the loss is low because the rate has decayed, and that is no incident."""
    run = Run(tmp_path / "run", law)
    losses = 0.9 * run.losses()
    run.part.begin(
        model_dir=run.folder, journal=run.journal, params=run.params, end_tokens=run.tokens,
        schedule_tokens=0.3 * run.tokens, sequence_length=2048,
    )  # fmt: skip
    run.take(losses, 450)
    verdicts = {r.get("curve_verdict") for r in read_lines(run.folder / "metrics.jsonl")[0]}
    assert "better than predicted" in verdicts and not run.events()


def test_refused_steps_and_validation(law, tmp_path):
    run = Run(tmp_path / "run", law)
    losses = run.losses()
    losses[100], losses[299] = math.nan, math.inf
    found = run.take(losses, 300)
    assert "curve_verdict" not in found  # of step 300, which has no loss
    assert run.take(losses, 320)["curve_verdict"] in ("on its curve", "cannot tell")
    # A law of validation losses: looked at when there is one.
    kind = changed(law, tmp_path / "validation.json", loss_kind="validation")
    run = Run(tmp_path / "validation", kind)
    for step in range(1, 101):
        record = {"step": step, "tokens": int(run.tokens * step / 100), "loss": 99.0}
        if step % 25 == 0:
            record["validation_loss"] = float(losses[10 * step - 1])
        assert ("curve_verdict" in run.part.note(record)) == (step % 25 == 0)


def test_another_text_cannot_be_compared(law, tmp_path, capsys):
    other = changed(law, tmp_path / "other.json", vocabulary="0123456789ab", sequence_length="512")
    run = Run(tmp_path / "run", other)
    run.take(run.losses(peak=0.2), NUM_STEPS)
    assert not run.events()
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "cannot tell whether this run is on its curve: vocabulary is " in err  # fmt: skip


def test_only_the_process_that_writes_says_something(law):
    assert PredictedLoss(law=str(law)).note({"step": 100, "tokens": 5, "loss": 2.0}) == {}


# ---- bad input ----


@pytest.mark.parametrize(
    "record, message",
    [
        (None, r"PredictedLoss.law=.* cannot be read: .*; it should come from fit --json"),
        ("[1", r"cannot be read"),
        ('{"E": 1}', r"PredictedLoss.law=.*: not a law of `fit --json`"),
        ("no profile", r"PredictedLoss.law=.*: this law was fitted to fewer than 4 runs"),
        ("approach 1", r"PredictedLoss.law=.*: a run can be compared with a law of the loss"),
    ],
)
def test_laws_that_are_none(law, tmp_path, record, message):
    path = tmp_path / "x.json"
    good = json.loads(law.read_text())
    if record == "no profile":
        del good["details"]["profile"]
        record = json.dumps(good)
    elif record == "approach 1":
        values = dict(params_coefficient=0.1, a=0.5, tokens_coefficient=1.6, b=0.5)
        good |= values | {"approach": "1", "names": list(values), "bootstrap": []}
        record = json.dumps(good)
    if record is not None:
        path.write_text(record)
    with pytest.raises(BadInput, match=message):
        PredictedLoss(law=str(path))


def test_numbers_that_are_none(law):
    for name in ("every_steps", "patience_steps"):
        with pytest.raises(BadInput, match="must be at least 1"):
            PredictedLoss(law=str(law), **{name: 0})


# ---- a whole run ----


def test_a_run_that_is_stopped_and_goes_on(tiny_text, law, tmp_path, capsys):
    """Slow from the start, by a law for something better: one incident, in the second start, and none later."""
    from test_energy import StopAt

    size = flops.num_params(vocab_size=320, emb_dim=32, num_layers=2, mlp_dim=128)
    fake, model_dir = fitting_law(law, tmp_path / "law.json", size, 0.7), tmp_path / "run"
    for stops in (StopAt(17), StopConditions()):
        predicted = PredictedLoss(law=str(fake), every_steps=5, patience_steps=10)
        tiny_run.run(
            tiny_text, model_dir, health=Health(stops=stops, predicted_loss=predicted),
            learning_rate=CosineSchedule(3e-3, 3e-4, 40, 320), train_steps=40,
        )  # fmt: skip
    lines = read_lines(model_dir / "journal.jsonl")[0]
    events = [line for line in lines if line["event"] == "off_curve"]
    assert len(events) == 1 and events[0]["verdict"] == "slow", events
    assert capsys.readouterr().err.count("off_curve in journal.jsonl") == 1
    records = tiny_run.records(model_dir)
    assert [r["step"] for r in records if "smoothed_loss" in r] == list(range(5, 41, 5))
    assert all("predicted_loss" in r for r in records if r["step"] >= 2)
    assert sys.exc_info() == (None, None, None)
