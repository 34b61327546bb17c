"""DoReMi: the numbers against the paper's algorithm, and proxy runs against float64, restarts and planted languages."""

import itertools
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import cluster
import jax
import numpy as np
import pytest
import reference_bloom
import tiny_run

from bloomjax import config, token_store, vocabulary
from bloomjax.checkpoints import Checkpoints
from bloomjax.data import EvalData, Phase, TrainData
from bloomjax.doremi import DomainWeights, found_shares
from bloomjax.errors import BadInput
from bloomjax.fault import fault
from bloomjax.guard import SpikeGuard
from bloomjax.health import Health
from bloomjax.reweighting import DoReMi, make_excess_step
from bloomjax.schedules import BatchSchedule, CosineSchedule
from bloomjax.train_state import abstract_params
from bloomjax.train_step import StepOptions
from tools import doremi as tool


class Paper:
    """Algorithm 1 of arXiv 2305.10429, token by token, in plain Python."""

    def __init__(self, k: int, eta: float, c: float):
        self.k, self.eta, self.c = k, eta, c
        self.alpha = [1 / k] * k
        self.sum, self.num_steps = [0.0] * k, 0
        self.excess = [0.0] * k

    def step(self, rows: list[tuple[int, list[float], list[float]]]) -> None:
        """`rows`: (domain, losses of its tokens under the proxy, under the reference)."""
        for i in range(self.k):
            tokens = [pair for d, a, b in rows if d == i for pair in zip(a, b, strict=True)]
            if tokens:
                self.excess[i] = math.fsum(max(a - b, 0.0) for a, b in tokens) / len(tokens)
        raised = [a * math.exp(self.eta * x) for a, x in zip(self.alpha, self.excess, strict=True)]
        total = math.fsum(raised)
        self.alpha = [(1 - self.c) * a / total + self.c / self.k for a in raised]
        self.sum = [s + a for s, a in zip(self.sum, self.alpha, strict=True)]
        self.num_steps += 1

    @property
    def result(self) -> list[float]:
        return [s / self.num_steps for s in self.sum]


# ---- numbers ----


@pytest.mark.parametrize("eta, c", [(1.0, 1e-3), (0.1, 0.05), (30.0, 1e-4)])
def test_the_weights_are_those_of_the_paper(eta, c):
    rng = np.random.default_rng(0)
    names = ["a", "b", "c", "d", "e"]
    weights, paper = DomainWeights(names, step_size=eta, smoothing=c), Paper(5, eta, c)
    for step in range(50):
        domains = rng.integers(0, 5 if step % 3 else 3, 7)  # some are absent
        proxy, reference = rng.gamma(2.0, 2.0, (7, 11)), rng.gamma(2.0, 1.0, (7, 11))
        weights.update(np.maximum(proxy - reference, 0).mean(1), domains)
        paper.step(list(zip(domains.tolist(), proxy.tolist(), reference.tolist(), strict=True)))
        np.testing.assert_allclose(weights.weights, paper.alpha, rtol=1e-11)
        found = weights.row_weights(domains)
        for d in set(domains.tolist()):  # the rows of a domain share what it weighs
            np.testing.assert_allclose(found[domains == d].sum(), paper.alpha[d], rtol=1e-11)
    shares = found_shares(weights.state())
    np.testing.assert_allclose([shares[n] for n in names], paper.result, rtol=1e-11)
    assert abs(sum(shares.values()) - 1) < 1e-12 and min(shares.values()) > 0


def test_a_step_by_hand():
    """1/2 e^0 : 1/2 e^(ln 3) = 1 : 3, with c = 1/2 then 3/8 : 5/8."""
    weights = DomainWeights(["x", "y"], smoothing=0.5)
    weights.update(np.array([0.0, math.log(3) / 2, math.log(3) * 3 / 2]), np.array([0, 1, 1]))
    np.testing.assert_allclose(weights.weights, [3 / 8, 5 / 8], rtol=1e-15)
    np.testing.assert_allclose(weights.row_weights(np.array([1, 0, 1])), [5 / 16, 3 / 8, 5 / 16])


def test_state_goes_through_json_to_the_bit_and_a_step_can_be_undone():
    rng = np.random.default_rng(1)
    weights = DomainWeights(["b", "a"])
    for _ in range(7):
        weights.update(rng.random(4), np.array([0, 1, 1, 0]))
    before = json.dumps(weights.state())
    again = DomainWeights(["b", "a"])
    again.restore(json.loads(before))
    assert json.dumps(again.state()) == before
    for each in (weights, again):
        each.update(np.array([1.0, 0.3, 0.2, 0.1]), np.array([0, 1, 1, 0]))
    assert again.state() == weights.state() != json.loads(before)
    weights.undo()
    weights.undo()
    assert json.dumps(weights.state()) == before
    weights.update(np.array([np.nan, 2.0]), np.array([0, 1]))  # of b nothing is known
    assert np.isfinite(weights.weights).all() and weights.excess[1] == 2.0
    assert weights.state()["excess"]["b"] == json.loads(before)["excess"]["b"]


@pytest.mark.parametrize(
    "names, options, message",
    [
        (["a"], {}, "weighs several languages; the mixture has a"),
        (["a", "b"], {"step_size": 0.0}, "step_size > 0"),
        (["a", "b"], {"smoothing": 0.0}, "0 < smoothing < 1"),
        (["a", "b"], {"smoothing": 1.0}, "0 < smoothing < 1"),
    ],
)
def test_bad_numbers(names, options, message):
    with pytest.raises(BadInput, match=message):
        DomainWeights(names, **options)


def test_bad_state():
    state = DomainWeights(["a", "b"]).state()
    with pytest.raises(BadInput, match="has taken no step yet"):
        found_shares(state)
    with pytest.raises(BadInput, match="DoReMi.step_size was 1.0 when the run began, and is 2.0"):
        DomainWeights(["a", "b"], step_size=2.0).restore(state)
    with pytest.raises(BadInput, match="the run weighs a, b; here are a, c"):
        DomainWeights(["a", "c"]).restore(state)


# ---- runs ----


def equal_shares(text):
    return TrainData(
        store_dir=str(text.store_dir), sequence_length=tiny_run.SEQUENCE_LENGTH, seed=3, temperature=1e9
    )  # fmt: skip


def proxy(text, model_dir, reference_dir, num_steps, **changes):
    options = dict(
        model=tiny_run.tiny_model(dtype="float32"), train_data=equal_shares(text), train_steps=num_steps,
        reweighting=DoReMi(reference_dir=str(reference_dir), record_every_steps=1),
    )  # fmt: skip
    return tiny_run.run(text, model_dir, **(options | changes))


def state_of(model_dir, step):
    path = model_dir / "checkpoints" / str(step) / "position" / "metadata"
    return json.loads(path.read_text())["reweighting"]


def params_of(model_dir, step):
    checkpoints = Checkpoints(save_every_steps=1)
    checkpoints.open(model_dir / "checkpoints", read_only=True)
    mesh = tiny_run.FirstDevices(1).build()
    model = tiny_run.tiny_model(dtype="float32")
    params = checkpoints.restore_params(step, abstract_params(model, mesh))
    checkpoints.close()
    return reference_bloom.to_float64(params)


@pytest.fixture(scope="module")
def reference(tiny_text, tmp_path_factory):
    """An ordinary run of 20 steps, in float32."""
    model_dir = tmp_path_factory.mktemp("reference") / "run"
    model = tiny_run.tiny_model(dtype="float32")
    assert tiny_run.run(tiny_text, model_dir, model=model, train_steps=20) == 0
    return model_dir


@pytest.fixture(scope="module")
def straight(tiny_text, reference, tmp_path_factory):
    """The proxy of it, 12 steps."""
    model_dir = tmp_path_factory.mktemp("straight") / "run"
    assert proxy(tiny_text, model_dir, reference, 12) == 0
    return model_dir


@pytest.mark.parametrize(
    "mesh", [pytest.param(mesh, marks=pytest.mark.slow) for mesh in ((1, 1, 1), (2, 2, 2))], ids=str
)
def test_a_run_is_the_algorithm_in_float64(tiny_text, reference, tmp_path, mesh):
    """Weights and loss of each step from saved parameters, by another implementation of the model."""
    keep_all = Checkpoints(save_every_steps=1, keep_last=9)
    # In microbatches of two rows; 4 batch shards fill 10 samples up to 16 rows, of which 6 weigh nothing.
    assert proxy(
        tiny_text, tmp_path / "run", reference, 5, checkpoints=keep_all,
        mesh=tiny_run.FirstDevices(*mesh, num=math.prod(mesh)), batch_schedule=BatchSchedule(10),
        step=StepOptions(microbatch_size_samples=2),
    ) == 0  # fmt: skip
    data, theirs = equal_shares(tiny_text).open(), params_of(reference, 20)
    paper = Paper(3, 1.0, 1e-3)
    records = {record["step"]: record for record in tiny_run.records(tmp_path / "run")}
    # Rows that weigh unlike tell no noise scale.
    assert not any("gradient_noise" in record for record in records.values())
    for step in range(2, 6):  # the parameters before step 1 are not saved
        if step == 2:
            start = state_of(tmp_path / "run", 1)
            paper.alpha, paper.sum = list(start["weights"].values()), list(start["total"].values())
            paper.excess, paper.num_steps = list(start["excess"].values()), 1
        samples = np.arange((step - 1) * 10, step * 10)
        tokens = data.rows(samples)
        domains = data.mixture.locate(samples)[0].tolist()
        mine = reference_bloom.token_losses(params_of(tmp_path / "run", step - 1), tokens)
        other = reference_bloom.token_losses(theirs, tokens)
        paper.step(list(zip(domains, mine.tolist(), other.tolist(), strict=True)))
        state = state_of(tmp_path / "run", step)
        assert list(state["weights"]) == list(data.mixture.names)
        np.testing.assert_allclose(list(state["excess"].values()), paper.excess, atol=2e-6)
        np.testing.assert_allclose(list(state["weights"].values()), paper.alpha, atol=2e-6)
        # The objective: the weighted sum over languages of the mean over their tokens.
        loss = sum(
            paper.alpha[d] * mine[np.array(domains) == d].mean() for d in sorted(set(domains))
        )
        assert records[step]["loss"] == pytest.approx(loss, abs=5e-6)
        found = records[step]["domain_weight_by_language"]
        np.testing.assert_allclose(list(found.values()), paper.alpha, rtol=1e-4)
    np.testing.assert_allclose(list(found_shares(state).values()), paper.result, atol=2e-6)
    assert max(paper.result) - min(paper.result) > 0.005  # they have moved
    assert state["reference"]["shares"] and state["reference"]["step"] == 20


def test_excess_is_clipped_token_by_token(tiny_text, reference, mesh_of):
    """Not the difference of means: of a model and the same model disturbed both signs occur."""
    one, rng = params_of(reference, 20), np.random.default_rng(0)
    two = jax.tree.map(lambda a: a + 0.02 * rng.standard_normal(a.shape), one)
    tokens = equal_shares(tiny_text).open().rows(np.arange(200, 204))
    model = tiny_run.tiny_model(dtype="float32")
    step = jax.jit(make_excess_step(model, StepOptions(), mesh_of(1, 1, 1)))
    one, two = jax.tree.map(np.float32, (one, two))
    found = step(one, two, {"tokens": tokens})
    a, b = (reference_bloom.token_losses(reference_bloom.to_float64(p), tokens) for p in (one, two))
    expected = np.maximum(a - b, 0).mean(1)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert (expected > np.maximum((a - b).mean(1), 0) + 1e-3).all()


@pytest.mark.slow
def test_stopped_and_resumed_is_straight_on(tiny_text, reference, straight, tmp_path):
    for num_steps in (5, 8, 12):
        assert proxy(tiny_text, tmp_path / "run", reference, num_steps) == 0
    assert state_of(tmp_path / "run", 12) == state_of(straight, 12)
    assert tiny_run.losses(tmp_path / "run") == tiny_run.losses(straight)
    assert tiny_run.fingerprints(tmp_path / "run", 12) == tiny_run.fingerprints(straight, 12)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_refused_step_leaves_the_weights_alone(tiny_text, reference, straight, tmp_path, policy):
    faults = fault(nan_samples=(64, 72))  # those of step 9
    health = Health(guard=SpikeGuard(policy=policy), fault=faults)
    run = tmp_path / "run"
    assert proxy(
        tiny_text, run, reference, 12, health=health, checkpoints=Checkpoints(save_every_steps=4)
    ) == 0  # fmt: skip
    records = {record["step"]: record for record in tiny_run.records(run)}
    plain = {record["step"]: record for record in tiny_run.records(straight)}
    key = "domain_weight_by_language"
    assert [records[s][key] for s in range(1, 9)] == [plain[s][key] for s in range(1, 9)]
    state = state_of(run, 12)
    assert state["num_steps"] == (11 if policy == "skip" else 12)
    sums = {name: sum(records[s][key][name] for s in records if s and records[s]["loss"] is not None)
            for name in state["total"]}  # fmt: skip
    assert state["total"] == pytest.approx(sums, abs=1e-4)


def test_what_does_not_belong_together(tiny_text, reference, straight, tmp_path):
    cases = [
        (dict(reweighting=None), "holds a run with train.reweighting, this configuration is one without"),
        (dict(reweighting=DoReMi(reference_dir=str(reference), reference_step=10)),
         "began with step 20 of .* as its reference; step 10 of .* other parameters"),
        (dict(reweighting=DoReMi(reference_dir=str(reference), smoothing=0.01)), "DoReMi.smoothing was 0.001"),
        (dict(reweighting=DoReMi(reference_dir=str(reference), reference_step=7)), "no checkpoint of step 7"),
        (dict(reweighting=DoReMi(reference_dir=str(tmp_path))), "DoReMi.reference_dir=.* has no checkpoints"),
        (dict(train_data=TrainData(
            store_dir=str(tiny_text.store_dir), sequence_length=16, seed=3, phases=[Phase(800, weights={"aa": 1.0})]
        )), "weighs the languages of one phase; TrainData.phases has 1 more"),
        (dict(model=tiny_run.tiny_model(emb_dim=64)), "has other arrays in"),
    ]  # fmt: skip
    before = tiny_run.tree(straight)
    for changes, message in cases:
        with pytest.raises(BadInput, match=message):
            proxy(tiny_text, straight, reference, 20, **changes)
    assert tiny_run.tree(straight) == before
    with pytest.raises(BadInput, match="holds a run without train.reweighting, this .* with it"):
        proxy(
            tiny_text, reference, reference, 30,
            train_data=TrainData(store_dir=str(tiny_text.store_dir), sequence_length=16, seed=3),
        )  # fmt: skip
    with pytest.raises(BadInput, match="record_every_steps must be at least 1"):
        DoReMi(reference_dir="x", record_every_steps=0)


def test_another_vocabulary(tiny_text, reference, tmp_path):
    (tmp_path / "text").mkdir()
    with pytest.raises(
        BadInput, match="was trained with another vocabulary than that of the store"
    ):
        proxy(tiny_run.Text(tmp_path / "text", seed=1), tmp_path / "run", reference, 2)


# ---- planted languages ----


class Planted:
    """As a `tiny_run.Text`: easy is one sentence, hard follows a rule of its last two words, noise has no rule."""

    def __init__(self, folder: Path):
        rng = random.Random(0)
        words = list[str]("we have so much time and little to do here now that".split())
        next_of = {pair: rng.choice(words) for pair in itertools.product(words, repeat=2)}

        def hard():
            text = rng.choices(words, k=2)
            while len(text) < 60:  # sometimes any word, or it would run in a circle
                pair = text[-2], text[-1]
                text.append(rng.choice(words) if rng.random() < 0.2 else next_of[pair])
            return text

        makers = {
            "easy": lambda: 10 * "one two three four five six".split(),
            "hard": hard,
            "noise": lambda: rng.choices("0123456789", k=60),
        }
        documents = {name: [" ".join(make()) for _ in range(800)] for name, make in makers.items()}
        self.folder, self.store_dir = folder, folder / "tokens"
        texts = [text for texts in documents.values() for text in texts]
        size = tiny_run.VOCAB_SIZE
        self.vocabulary = vocabulary.train_sentencepiece(texts, folder / "v.model", size)
        token_store.write_store(self.store_dir, documents, self.vocabulary)


def planted_data(text, **changes):
    return TrainData(store_dir=str(text.store_dir), sequence_length=32, seed=3, **changes)


def planted_run(text, model_dir, **changes):
    options = dict(
        model=tiny_run.tiny_model(dtype="float32", emb_dim=64), train_steps=400,
        train_data=planted_data(text, temperature=1e9), batch_schedule=BatchSchedule(16),
        learning_rate=CosineSchedule(5e-3, 2e-4, 480, 6400), eval_every_steps=400,
        eval_data=EvalData(max_windows_per_language=32), checkpoints=Checkpoints(save_every_steps=200),
    )  # fmt: skip
    assert tiny_run.run(text, model_dir, **(options | changes)) == 0
    return tiny_run.records(model_dir)[-1]["loss_by_language"]


@pytest.mark.slow
def test_a_planted_split_is_found(tmp_path):
    """Weight goes to what can be learnt and is not yet: not to what is learnt at once, nor to what cannot be."""
    text = Planted(tmp_path)
    before = planted_run(text, tmp_path / "reference")
    assert (
        before["easy"] < 0.1 < before["hard"] < before["noise"]
    )  # easy was learnt, noise cannot be
    doremi = DoReMi(reference_dir=str(tmp_path / "reference"))
    planted_run(text, tmp_path / "proxy", reweighting=doremi)
    shares = found_shares(state_of(tmp_path / "proxy", 400))
    assert shares["hard"] > 0.6 and shares["easy"] < 0.25 and shares["noise"] < 0.25
    after = planted_run(text, tmp_path / "after", train_data=planted_data(text, weights=shares))
    assert after["hard"] < before["hard"] - 0.02  # what the shares are for


@pytest.mark.slow
def test_two_processes_find_the_same(tiny_text, reference, tmp_path):
    """As one process with the devices of both, to the bit."""
    results = {}
    for num_processes in (1, 2):
        run = tmp_path / str(num_processes)
        flags = [
            "--gin_file=doremi.gin", f"--gin.REFERENCE_DIR='{reference}'", "--gin.TRAIN_STEPS=12",
            "--gin.train.mesh=@MeshShape()", "--gin.MeshShape.data=2", "--gin.MeshShape.fsdp=1",
            "--gin.BloomConfig.dtype='float32'", "--gin.ReplicaCheck.every_steps=4",
            "--gin.DoReMi.record_every_steps=1",
        ]  # fmt: skip
        job = cluster.Cluster(
            tiny_run.command(tiny_text, run, *flags), num_processes, num_devices=2
        )
        cluster.checked(
            [(c, cluster.without_gloo(o) if n else o, e) for n, (c, o, e) in enumerate(job.end())]
        )
        results[num_processes] = state_of(run, 12), tiny_run.fingerprints(run, 12)
    assert results[1] == results[2]


# ---- the tool ----


@pytest.fixture
def doremi_tool(command):
    """The tool with flags: exit code, stdout and stderr."""

    def main(argv):
        config.call(tool.main, argv, tool.FLAGS)

    return lambda *flags: command(SimpleNamespace(main=main, __name__="doremi"), *flags)


def test_the_tool_prints_and_writes_the_shares(doremi_tool, straight, reference, tmp_path):
    state = state_of(straight, 12)
    shares = found_shares(state)
    code, out, err = doremi_tool(f"--model_dir={straight}")
    assert code == 0, err
    head, columns, *rows = out.splitlines()
    assert head == f"{straight}, step 12: mean of 12 steps; reference {reference}, step 20"
    assert columns.split() == "language reference share x at the end excess loss".split()
    order = sorted(shares, key=lambda name: -shares[name])
    assert [row.split()[0] for row in rows] == order
    first = rows[0].split()
    before = state["reference"]["shares"][order[0]]
    assert first[1:4] == [
        f"{before:.4%}",
        f"{shares[order[0]]:.4%}",
        f"{shares[order[0]] / before:.2f}",
    ]
    code, out, _ = doremi_tool(f"--model_dir={straight}", "--step=10", "--json")
    found = json.loads(out)
    assert code == 0 and found["step"] == 10 and len(found["languages"]) == 3

    written = tmp_path / "weights.gin"
    assert doremi_tool(f"--model_dir={straight}", f"--write={written}")[0] == 0
    assert config.build("TrainData.weights", written) == shares
    assert config.build("TrainData.temperature", written) == 1.0
    phase = tmp_path / "phase.gin"
    flags = (f"--model_dir={straight}", f"--write={phase}", "--first_sample=80")
    assert doremi_tool(*flags)[0] == 0
    (built,) = config.build("TrainData.phases", phase)
    assert built == Phase(80, weights=shares)
    for wrong, message in [
        (flags, "phase.gin exists already"),
        ((flags[0], f"--write={tmp_path}/doremi.gin"), "a shipped gin file is called doremi.gin"),
        ((flags[0], f"--write={tmp_path}/no/w.gin"), "there is no folder"),
        ((flags[0], "--first_sample=8"), "--first_sample=8 is for --write"),
        ((f"--model_dir={reference}",), "is no proxy run of DoReMi"),
        ((f"--model_dir={tmp_path}",), "has no checkpoints"),
        ((), "--model_dir of a proxy run must be given"),
    ]:
        code, _, err = doremi_tool(*wrong)
        assert code == 1 and message in err and err.count("\n") == 1


@pytest.mark.slow
def test_the_written_file_trains(tiny_text, doremi_tool, straight, tmp_path):
    """As a phase of an ordinary run."""
    written = tmp_path / "phase.gin"
    assert doremi_tool(f"--model_dir={straight}", f"--write={written}", "--first_sample=16")[0] == 0
    run = tmp_path / "run"
    flags = (f"--gin_file={written}", "--gin.TRAIN_STEPS=4", "--gin.EVAL_EVERY_STEPS=4")
    done = tiny_run.execute(tiny_run.command(tiny_text, run, *flags))
    assert done.returncode == 0, done.stderr
    assert "from sample 16 (step 3): 3 sources, 16 tokens a sample" in done.stdout
    position = json.loads((run / "checkpoints/4/position/metadata").read_text())
    assert position["data"]["phases"][0]["shares"] == pytest.approx(
        found_shares(state_of(straight, 12))
    )
