"""tools/scaling.py: each verb from its command line, text and --json; bad input is one line."""

import csv
import dataclasses
import json
import math
import shlex
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_run
from simulated_runs import LAW, chinchilla_range, horizons, isoflop, sweep
from tiny_run import REPOSITORY

from bloomjax import config, flops
from bloomjax.errors import BadInput
from bloomjax.model import Bloom
from bloomjax.scaling_laws import CHINCHILLA, DataConstrainedLaw, ParametricLaw
from bloomjax.scaling_runs import Curve

sys.path.insert(0, str(REPOSITORY / "tools"))
import scaling
import scaling_collect
import scaling_sweep


@pytest.fixture
def run(capsys):
    """run(words and flags) -> exit code, stdout, stderr; flags have their defaults each time."""

    def call(*words: str):
        with pytest.raises(SystemExit) as exit_:
            scaling.main(["scaling.py", *map(str, words)])
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return call


@pytest.fixture
def answer(run):
    """The --json of a command that must succeed."""

    def call(*words):
        code, out, err = run(*words, "--json")
        assert code == 0, err
        return json.loads(out)

    return call


def write_runs(path, runs, names=("params", "tokens", "loss")):
    rows = zip(runs.params, runs.tokens, runs.loss, strict=True)
    lines = [",".join(map(repr, map(float, row))) for row in rows]
    path.write_text("\n".join([",".join(names), *lines]) + "\n")
    return path


CURVE_COLUMNS = (
    "run", "params", "tokens", "loss", "schedule_tokens", "vocabulary", "sequence_length", "loss_kind",
)  # fmt: skip


def write_curves(path, curves, vocabulary="v"):
    """As `collect` writes them."""
    with path.open("w") as file:
        writer = csv.writer(file)
        writer.writerow(CURVE_COLUMNS)
        for number, curve in enumerate(curves):
            constants = [curve.schedule_tokens, vocabulary, 16, "train"]
            for tokens, loss in zip(curve.tokens, curve.loss, strict=True):
                writer.writerow([number, curve.params, tokens, loss, *constants])
    return path


# ---- fit ----


def test_fit_prints_constants_and_intervals(tmp_path, answer):
    path = write_runs(tmp_path / "runs.csv", chinchilla_range(0))
    record = answer("fit", path, "--approach=3", "--starts=1125", "--bootstrap=100")
    names = ["E", "A", "B", "alpha", "beta"]
    assert list(record)[:6] == ["approach", *names]
    for name in names:
        low, high = record["interval"][name]
        assert low < record[name] < high and low < getattr(LAW, name) < high
    assert record["num_runs"] == len(record["residuals"]) == 240
    assert record["details"]["num_starts"] == 1125
    assert record["warnings"] == []


def test_fit_in_words(tmp_path, run):
    runs = chinchilla_range(0, num=15)
    path = write_runs(tmp_path / "runs.csv", runs, ("N", "D", "final"))
    renamed = "--columns=N:params,D:tokens,final:loss"
    code, out, _ = run("fit", path, renamed, "--starts=1125", "--bootstrap", "50")
    assert code == 0
    for text in (
        "approach 3 on 15 runs", "  alpha ", "95% bootstrap", "best use of compute: N ~ C^", "residuals of the loss",
        "warning: 15 runs for 5 constants",
    ):  # fmt: skip
        assert text in out, text


def test_fit_of_every_approach(tmp_path, answer):
    curves = write_curves(tmp_path / "curves.csv", sweep(0))
    runs = write_runs(tmp_path / "runs.csv", isoflop(LAW, 0))
    second = answer("fit", runs, "--approach=2", "--bootstrap=50")
    assert second["interval"]["a"][0] < LAW.params_exponent < second["interval"]["a"][1]
    assert len(second["details"]["budgets"]) == 9
    assert answer("fit", curves, "--approach=kaplan", "--bootstrap=50")["C_c"] > 0
    long = write_curves(tmp_path / "horizons.csv", horizons(LAW, 0))
    first = answer("fit", long, "--approach=1", "--bootstrap=50")
    assert first["a"] == pytest.approx(LAW.params_exponent, abs=0.05)
    third = answer("fit", curves, "--starts=1125", "--bootstrap=50")
    assert third["num_runs"] == 25
    text = {"vocabulary": "v", "sequence_length": "16", "loss_kind": "train"}
    assert third["details"]["text"] == text
    assert len(third["details"]["profile"]["mean"]) == 20


def test_fit_of_repetition_rests_on_a_law(tmp_path, answer, run):
    rng = np.random.default_rng(0)
    law = tmp_path / "law.json"
    path = write_runs(tmp_path / "runs.csv", chinchilla_range(0, num=60))
    law.write_text(run("fit", path, "--starts=1125", "--bootstrap=30", "--json")[1])
    params, unique = np.exp(rng.uniform(19, 22, 30)), np.exp(rng.uniform(20, 22, 30))
    tokens = unique * np.exp(rng.uniform(0, 4, 30))
    loss = DataConstrainedLaw(LAW, 10.0, 4.0).loss(params, tokens, unique)
    rows = np.stack([params, tokens, loss, unique], 1)
    table = tmp_path / "again.csv"
    np.savetxt(table, rows, delimiter=",", header="params,tokens,loss,unique_tokens", comments="")
    found = answer("fit", table, "--approach=repeated", f"--law={law}", "--bootstrap=20")
    assert found["tokens_decay"] == pytest.approx(10, rel=0.3)
    # --law takes names; what the runs do not lie on is said, and so is the base if none was given.
    rough = answer("fit", table, "--approach=repeated", "--law=chinchilla", "--bootstrap=20")
    assert rough["details"]["base"]["beta"] == CHINCHILLA.beta
    assert any("the law misses the runs by" in warning for warning in rough["warnings"])
    default = answer("fit", table, "--approach=repeated", "--bootstrap=20")
    assert any("on top of the law of arXiv 2305.16264" in each for each in default["warnings"])
    code, _, err = run("fit", table, "--approach=repeated", "--law=kaplan")
    assert code == 1 and "--law=kaplan: repetition is fitted on top of a law of approach 3" in err
    # `optimal` asks it, with its own constants and intervals.
    again = tmp_path / "again.json"
    again.write_text(json.dumps(found))
    words = ["optimal", "--flops=1e21", f"--law={again}"]
    base, best = answer(*words, "--unique_tokens=2e9")["answers"]
    mine = DataConstrainedLaw(
        ParametricLaw(**found["details"]["base"]), found["tokens_decay"], found["params_decay"]
    ).optimum(1e21, 2e9)
    assert best["params"] == pytest.approx(mine.params) and best["loss"] > base["loss"]
    assert best["interval"]["params"][0] < mine.params < best["interval"]["params"][1]
    code, _, err = run(*words)
    assert code == 1 and "repeated: with optimal --unique_tokens" in err


def test_fit_by_language(tmp_path, answer, run):
    from test_language_laws import PLANTED, mixed_runs

    with (tmp_path / "runs.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "language", "share", "params", "tokens", "loss"])
        for curve in mixed_runs(num=30):
            end = [curve.tokens[-1], curve.loss[-1]]
            writer.writerow([curve.name, curve.language, curve.share, curve.params, *end])
    found = answer("fit", tmp_path / "runs.csv", "--params=1e9", "--tokens=2e10", "--bootstrap=30")
    assert set(found["languages"]) == set(found["mixture"]) == set(PLANTED)
    assert sum(item["share"] for item in found["mixture"].values()) == pytest.approx(1)
    assert found["mixture"]["sw"]["share"] == pytest.approx(0.484, abs=0.03)
    words = ["fit", tmp_path / "runs.csv", "--params=1e9", "--tokens=2e10", "--bootstrap=30"]
    heavy = answer(*words, "--weights=en:1,ml:1,sw:100")
    assert heavy["mixture"]["sw"]["share"] > found["mixture"]["sw"]["share"] + 0.1
    for weights, line in (
        ("en:1", "--weights has en; the table has en, ml, sw"),
        ("en", "write LANGUAGE:NUMBER"),
    ):
        code, _, err = run(*words, f"--weights={weights}")
        assert code == 1 and line in err
    # A column unique_tokens caps the share at four epochs.
    rows = rows_of((tmp_path / "runs.csv").read_text())
    with (tmp_path / "little.csv").open("w") as file:
        writer = csv.DictWriter(file, [*rows[0], "unique_tokens"])
        writer.writeheader()
        writer.writerows(
            row | {"unique_tokens": 1e9 if row["language"] == "sw" else ""} for row in rows
        )
    little = answer("fit", tmp_path / "little.csv", *words[2:])["mixture"]["sw"]
    assert little["is_capped"] and little["share"] == pytest.approx(4 * 1e9 / 2e10)
    code, _, err = run("fit", tmp_path / "runs.csv", "--approach=2")
    assert code == 1 and "has languages: they are fitted by approach 3 with shares" in err
    for flag in ("--bootstrap=0", "--bootstrap=-5", "--params=-1e9", "--params=nan", "--tokens=0"):
        code, _, err = run("fit", tmp_path / "runs.csv", flag)
        assert code == 1 and err.startswith(f"bloomjax: {flag.split('=')[0]}="), err
    code, out, _ = run("fit", tmp_path / "runs.csv", "--bootstrap=20")
    assert code == 0 and "3 languages; shares for" in out and "transfer" in out


@pytest.mark.slow
def test_pictures(tmp_path, run):
    pytest.importorskip("matplotlib")
    curves = write_curves(tmp_path / "curves.csv", sweep(0))
    runs = write_runs(tmp_path / "runs.csv", isoflop(LAW, 0))
    long = write_curves(tmp_path / "horizons.csv", horizons(LAW, 0))
    for approach, table in (("1", long), ("2", runs), ("3", curves), ("kaplan", runs)):
        picture = tmp_path / f"{approach}.png"
        flags = [f"--approach={approach}", f"--plot={picture}", "--starts=1125", "--bootstrap=20"]
        code, _, err = run("fit", table, *flags)
        assert code == 0, err
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "1.png", "2.png", "3.png", "kaplan.png",
    ]  # fmt: skip


# ---- optimal ----


def test_optimal_for_gopher(answer):
    found = answer("optimal", "--flops=5.76e23")["answers"]
    assert [round(each["params"] / 1e9) for each in found] == [68, 63, 40]
    assert [round(each["tokens"] / 1e12, 1) for each in found] == [1.4, 1.5, 2.4]
    critical = 2.1e8 / found[2]["loss"] ** (1 / 0.21)
    assert found[2]["critical_batch_tokens"] == pytest.approx(critical)
    assert all(abs(each["shape"]["params"] / each["params"] - 1) < 0.055 for each in found)
    assert "192 times the compute" in found[0]["remarks"][0]
    (rounded,) = answer("optimal", "--flops=5.76e23", "--law=chinchilla_rounded")["answers"]
    assert round(rounded["params"] / 1e9) == 32
    assert "rounded constants" in rounded["remarks"][1]


def test_optimal_for_175b(answer):
    found = answer("optimal", "--params=175e9")["answers"]
    assert [each["tokens"] / 1e12 for each in found[:2]] == pytest.approx([3.7, 4.3], rel=0.015)


def test_optimal_for_tokens_and_hours(answer):
    (found,) = answer("optimal", "--tokens=1.4e12", "--law=besiroglu")["answers"]
    assert found["tokens"] == pytest.approx(1.4e12)
    flags = ["--gpu_hours=1000", "--device=A100", "--mfu=0.5", "--law=besiroglu"]
    (hours,) = answer("optimal", *flags)["answers"]
    assert hours["flops"] == pytest.approx(1000 * 3600 * 312e12 * 0.5)
    assert hours["gpu_hours"] == pytest.approx(1000)


def test_optimal_with_little_text(answer):
    found = answer("optimal", "--flops=9.25956e21", "--unique_tokens=25e9")["answers"][-1]
    assert (round(found["tokens"] / 1e9), round(found["epochs"], 1)) == (227, 9.1)


def test_optimal_of_a_law_in_a_file_has_intervals(tmp_path, answer, run):
    path = write_runs(tmp_path / "runs.csv", chinchilla_range(0, num=80))
    law = tmp_path / "law.json"
    for approach, parts in (("3", {"params", "tokens", "loss"}), ("2", {"params", "tokens"})):
        table = path if approach == "3" else write_runs(tmp_path / "iso.csv", isoflop(LAW, 0))
        flags = [f"--approach={approach}", "--starts=1125", "--bootstrap=50", "--json"]
        law.write_text(run("fit", table, *flags)[1])
        (found,) = answer("optimal", "--flops=1e21", f"--law={law}")["answers"]
        assert set(found["interval"]) == parts
        low, high = found["interval"]["params"]
        assert low < found["params"] < high
        assert low < LAW.optimum(1e21).params < high
    code, out, _ = run("optimal", "--flops=1e23", f"--law={law}")
    assert code == 0 and "params: " in out and "33 times the compute" in out


# ---- table ----


def test_table(answer, run):
    rows = answer("table")["rows"]
    assert len(rows) == 27
    assert rows[3]["params"] == 67e9 and rows[3]["tokens"] == 1.5e12
    for row in rows:
        assert row["flops_deviation"] == pytest.approx(row["our_flops"] / row["flops"] - 1)
        assert row["tokens_deviation"] == pytest.approx(row["our_tokens"] / row["tokens"] - 1)
    slip = [row for row in rows if "slip" in row["remark"]]
    assert [(row["approach"], row["params"]) for row in slip] == [(3, 175e9)]
    assert slip[0]["remark"] == "C is 0.1 x 6ND: a slip in the paper, 1.26e+25 would fit"
    assert {row["remark"] for row in rows if row["approach"] == 2} == {""}
    code, out, _ = run("table")
    assert code == 0 and "arXiv 2203.15556" in out and len(out.splitlines()) == 30


# ---- collect and check: a real run of tiny_run ----


@pytest.fixture(scope="module")
def run_folder(undisturbed, tiny_text, tmp_path_factory):
    """The MODEL_DIR of a whole run, with the configuration that `python -m bloomjax.train` would have written."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    shutil.copytree(undisturbed, folder)
    (folder / "config.gin").write_text(
        tiny_run.GIN + f"MODEL_DIR = '{folder}'\nSTORE_DIR = '{tiny_text.store_dir}'\n"
        f"VOCABULARY = '{tiny_text.vocabulary.path}'\n"
    )
    return folder


def rows_of(text):
    return list(csv.DictReader(text.splitlines()))


def test_collect(run_folder, run, tmp_path, tiny_text):
    code, out, err = run("collect", run_folder)
    assert code == 0, err
    rows = rows_of(out)
    assert tuple(rows[0]) == scaling_collect.COLUMNS
    assert len(rows) == 40 and {row["run"] for row in rows} == {str(run_folder)}
    last = rows[-1]
    shape = dict(emb_dim=32, num_layers=2, mlp_dim=128)
    assert int(last["params"]) == flops.num_params(vocab_size=320, **shape)
    assert int(last["params_non_embedding"]) == flops.num_non_embedding_params(**shape)
    assert int(last["tokens"]) == 40 * 8 * 16
    assert int(last["flops"]) == 6 * int(last["params"]) * int(last["tokens"])
    assert int(last["schedule_tokens"]) == 400 * 16  # CosineSchedule.decay_samples
    store = tiny_text.store
    assert int(last["unique_tokens"]) == sum(store.num_tokens(x, "train") for x in store.languages)
    raw = tiny_run.losses(run_folder)
    assert abs(float(last["loss"]) - raw[40]) < 0.5 and float(rows[0]["loss"]) > float(last["loss"])
    assert len(last["vocabulary"]) == 12 and last["loss_kind"] == "train"
    # Into a file that `fit` reads back; an existing one is not overwritten.
    table = tmp_path / "runs.csv"
    assert run("collect", run_folder, f"--out={table}")[1] == f"{table}: 40 points of 1 runs\n"
    assert rows_of(table.read_text()) == rows
    assert "exists; give a new file" in run("collect", run_folder, f"--out={table}")[2]
    (curve,), shared, remarks = scaling.read_curves(table)
    assert len(curve.tokens) == 40 and shared["vocabulary"] == last["vocabulary"] and not remarks


def test_collect_held_out_and_by_language(run_folder, run, tiny_text):
    rows = rows_of(run("collect", run_folder, "--loss=validation")[1])
    records = [r for r in tiny_run.records(run_folder) if "validation_loss" in r and r["step"]]
    expected = [record["validation_loss"] for record in records]
    assert [float(row["loss"]) for row in rows] == pytest.approx(expected, abs=1e-6)
    rows = rows_of(run("collect", run_folder, "--by_language")[1])
    assert {row["language"] for row in rows} == {"aa", "bb", "cc"}
    last = {row["language"]: row for row in rows}
    assert sum(float(row["share"]) for row in last.values()) == pytest.approx(1)
    for name in ("aa", "bb", "cc"):
        assert int(last[name]["unique_tokens"]) == tiny_text.store.num_tokens(name, "train")
    expected = records[-1]["loss_by_language"]["aa"]
    assert float(last["aa"]["loss"]) == pytest.approx(expected, abs=1e-6)


def test_collect_leaves_out_what_is_not_finished(run_folder, run, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(run_folder, half)
    lines = (half / "metrics.jsonl").read_text().splitlines(keepends=True)
    (half / "metrics.jsonl").write_text("".join(lines[:20]) + '{"step": 20, "lo')
    code, out, err = run("collect", run_folder, half)
    assert code == 0 and f"{half}: 48% done, left out" in err
    assert {row["run"] for row in rows_of(out)} == {str(run_folder)}
    code, _, err = run("collect", half)
    assert code == 1 and "none of the 1 runs is finished" in err


def test_collect_without_the_store(run_folder, run, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(run_folder, moved)
    text = (moved / "config.gin").read_text()
    (moved / "config.gin").write_text(text.replace("STORE_DIR = '", "STORE_DIR = '/nowhere"))
    code, out, err = run("collect", moved)
    assert code == 0 and "its token store is not there; unique_tokens unknown" in err
    assert rows_of(out)[-1]["unique_tokens"] == ""


def test_planned_tokens_of_samples_that_are_not_whole(tiny_text, run_folder, tmp_path):
    """A curriculum sees 8 tokens, then 16 of each sample: with the store, and from what the run wrote."""
    folder = tmp_path / "run"
    folder.mkdir()
    gin = (run_folder / "config.gin").read_text()
    gin += "\nTrainData.curriculum = @LengthCurriculum()\n"
    gin += "LengthCurriculum.start = 8\nLengthCurriculum.end = 16\nLengthCurriculum.step = 8\n"
    gin += "LengthCurriculum.num_steps = 20\nLengthCurriculum.batch_schedule = @BatchSchedule()\n"
    (folder / "config.gin").write_text(gin)
    data = config.build("train.train_data", folder / "config.gin").open()
    records = [
        {"step": step, "samples": 8 * step, "tokens": data.kept.tokens_after(8 * step), "loss": 3.0}
        for step in range(1, 41)
    ]
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = scaling_collect.read_run(str(folder))
    assert found.end_tokens == records[-1]["tokens"] < 40 * 8 * 16
    assert found.schedule_tokens == data.kept.tokens_after(400)
    moved = gin.replace("STORE_DIR = '", "STORE_DIR = '/nowhere")
    (folder / "config.gin").write_text(moved)
    away = scaling_collect.read_run(str(folder))
    assert (away.end_tokens, away.unique_tokens) == (found.end_tokens, None)
    assert away.schedule_tokens == found.schedule_tokens
    half = path.read_text().splitlines(keepends=True)[:20]
    path.write_text("".join(half))
    plan = {"plan": {"num_tokens": found.end_tokens}}
    (folder / "journal.jsonl").write_text(json.dumps(plan) + "\n")
    assert scaling_collect.read_run(str(folder)).end_tokens == found.end_tokens


def law_around(folder, run, factor=1.0, vocabulary=None):
    """A file with the law of 24 invented runs, by which the run in `folder` should end at `factor` times its loss."""
    measured = scaling_collect.read_run(str(folder))
    curve = measured.curve("train")
    rng = np.random.default_rng(0)
    curves = []
    for number in range(24):
        smaller, shorter = np.exp(rng.uniform(-1.5, 1.5, 2))
        end = curve.loss[-1] * factor * (0.6 + 0.2 * smaller**0.3 + 0.2 * shorter**0.3)
        loss = curve.loss / curve.loss[-1] * end * np.exp(0.003 * rng.standard_normal())
        tokens = curve.tokens / shorter
        curves.append(Curve(str(number), curve.params / smaller, tokens, loss, tokens[-1]))
    table = write_curves(folder.parent / "law.csv", curves, vocabulary or measured.vocabulary)
    code, out, err = run("fit", table, "--starts=1125", "--bootstrap=50", "--json")
    assert code == 0, err
    law = folder.parent / "law.json"
    law.write_text(out)
    return law


def test_check_of_a_run(run_folder, run, answer):
    law = law_around(run_folder, run)
    code, out, err = run("check", run_folder, f"--law={law}")
    assert code == 0, err
    assert "100% of 5.12k tokens: on its curve" in out and "expected now" in out
    record = answer("check", run_folder, f"--law={law}")
    assert record["verdict"] == "on its curve" and record["loss_kind"] == "train"
    assert record["remarks"] == []  # 400 samples of cosine for 320 are just matched
    assert len(record["band"]) == 4


def test_a_picture_of_a_run(run_folder, run, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "check.svg"
    law = law_around(run_folder, run)
    assert run("check", run_folder, f"--law={law}", f"--plot={picture}")[0] == 0
    assert picture.read_text().startswith("<?xml") and picture.stat().st_size > 10_000
    assert [path.name for path in tmp_path.iterdir()] == ["check.svg"]


def test_check_flags_a_slow_run_with_its_exit_code(run_folder, run):
    law = law_around(run_folder, run, factor=0.7)
    code, out, _ = run("check", run_folder, f"--law={law}")
    assert code == scaling.EXIT_SLOW == 2
    assert ": slow" in out and "as good as" in out
    code, out, _ = run("check", run_folder, f"--law={law}", "--json")
    record = json.loads(out)
    assert code == 2 and record["effective_params"] < record["params"] / 4


def test_a_law_of_non_embedding_parameters_gets_them(run_folder, run, answer, tmp_path):
    """The vocabulary is half of tiny's parameters: with all of them the law would expect another loss."""
    size = scaling_collect.read_run(str(run_folder))
    table = (run_folder.parent / "law.csv").with_name("kaplan.csv")
    rows = rows_of(law_around(run_folder, run).with_name("law.csv").read_text())
    with table.open("w") as file:
        writer = csv.DictWriter(file, ["flops", "params_non_embedding", *CURVE_COLUMNS])
        writer.writeheader()
        for row in rows:
            shrunk = float(row["params"]) * size.params_non_embedding / size.params
            # As `collect` writes them: of all parameters.
            total = 20 * 6 * shrunk * float(row["tokens"])
            writer.writerow(row | {"params_non_embedding": shrunk, "flops": total})
    words = [f"fit {table} --columns=params_non_embedding:params --starts=1125 --bootstrap=50"]
    record = answer(*words[0].split())
    assert record["details"]["params_column"] == "params_non_embedding" and not any(
        "flops" in warning for warning in record["warnings"]
    )
    law = tmp_path / "kaplan.json"
    law.write_text(json.dumps(record))
    found = answer("check", run_folder, f"--law={law}")
    assert found["params"] == size.params_non_embedding and found["verdict"] == "on its curve"
    total = answer("check", run_folder, f"--law={law_around(run_folder, run)}")
    assert total["params"] == size.params
    assert found["expected"] == pytest.approx(total["expected"], rel=2e-3)


def test_check_says_when_the_text_differs(run_folder, run):
    law = law_around(run_folder, run, factor=0.7, vocabulary="another")
    code, out, _ = run("check", run_folder, f"--law={law}")
    assert code == 0 and "cannot tell" in out
    assert "another in the runs behind the law: their losses cannot be compared" in out


# ---- sweep ----


@pytest.fixture(scope="module")
def base_gin(tmp_path_factory, tiny_text):
    path = tmp_path_factory.mktemp("gin") / "base.gin"
    path.write_text(
        tiny_run.GIN + f"STORE_DIR = '{tiny_text.store_dir}'\nVOCABULARY = '{tiny_text.vocabulary.path}'\n"
    )  # fmt: skip
    return path


@pytest.mark.parametrize("gin_file", ["tiny.gin", "560m.gin", "176b.gin"])
def test_every_overlay_of_a_sweep_builds(gin_file, run, tmp_path):
    """The model, the schedule and the length that runs.csv promises, from the shipped files with the overlay."""
    flags = [f"--gin_file={gin_file}"]
    if gin_file != "tiny.gin":
        for name in ("MODEL_DIR", "STORE_DIR", "VOCABULARY"):
            flags.append(f"--gin.{name}='x'")
    total = {"tiny.gin": 2e15, "560m.gin": 1e21, "176b.gin": 3e23}[gin_file]
    folder = tmp_path / "sweep"
    code, out, err = run("sweep", *flags, f"--flops={total}", f"--out={folder}")
    assert code == 0, err
    rows = rows_of((folder / "runs.csv").read_text())
    commands = (folder / "runs.sh").read_text().splitlines()
    assert commands[0] == "set -e" and len(commands) == len(rows) + 1 >= 17
    assert sum(float(row["flops"]) for row in rows) == pytest.approx(total, rel=0.1)
    for row, command in zip(rows, commands[1:], strict=True):
        name = row["run"].split("/")[-1]
        overlay = folder / f"{name}.gin"
        assert f"--gin_file={gin_file}" in command and f"--gin_file={overlay}" in command
        bindings = [
            f"{x} = {y}"
            for x, y in (line.split(" = ") for line in overlay.read_text().splitlines() if line[0] != "#")
        ]  # fmt: skip
        bindings += [flag.removeprefix("--gin.").replace("=", " = ", 1) for flag in flags[1:]][1:]
        model = config.build("Bloom.config", gin_file, bindings)
        rate = config.build("train.learning_rate", gin_file, bindings)
        batches = config.build("train.batch_schedule", gin_file, bindings)
        steps = config.build("train.train_steps", gin_file, bindings)
        num = flops.num_params(
            vocab_size=model.vocab_size, emb_dim=model.emb_dim, num_layers=model.num_layers, mlp_dim=model.mlp_width
        )  # fmt: skip
        assert num == model.expected_params == int(row["params"])
        assert model.emb_dim % model.num_heads == 0
        samples = batches.samples_after(steps)
        assert samples == rate.decay_samples and rate.warmup_samples < samples
        length = config.build("TrainData.sequence_length", gin_file, bindings)
        assert samples * length == int(row["tokens"])
        assert config.build("train.model_dir", gin_file, bindings) == row["run"]
        assert config.build("train.train_samples", gin_file, bindings) is None
    by_budget: dict[str, list[float]] = {}
    for row in rows:
        by_budget.setdefault(row["run"].split("/")[-1].split("-")[0], []).append(float(row["flops"]))  # fmt: skip
    assert len(by_budget) == 4
    for costs in by_budget.values():
        assert max(costs) / min(costs) < 1.1 and len(costs) >= 4  # one budget each


@pytest.mark.slow
def test_a_run_of_a_sweep_trains(base_gin, run, tmp_path):
    """The cheapest one, with the command of runs.sh; then `collect` finds it whole, its cosine matched."""
    folder = tmp_path / "sweep"
    code, _, err = run("sweep", f"--gin_file={base_gin}", "--gin.prepare.vocab_size=320", "--flops=2e12",
                       "--budgets=1", "--sizes=4", f"--out={folder}")  # fmt: skip
    assert code == 0, err
    command = min((folder / "runs.sh").read_text().splitlines()[1:], key=len)
    name = command.split("/")[-1].removesuffix(".gin")
    shorter = (
        "TRAIN_STEPS=4",
        "CosineSchedule.decay_samples=32",
        "CosineSchedule.warmup_samples=2",
    )
    flags = [f"--gin.{binding}" for binding in shorter]
    result = tiny_run.execute([sys.executable, *shlex.split(command)[1:], *flags])
    assert result.returncode == 0, result.stderr
    found = scaling_collect.read_run(str(folder / name))
    assert found.is_finished and found.records[-1]["step"] == 4
    assert found.params == int(name.split("-n")[1])


def test_a_sweep_never_overwrites(base_gin, run, tmp_path):
    (tmp_path / "there").mkdir()
    code, _, err = run("sweep", f"--gin_file={base_gin}", "--flops=1e13", f"--out={tmp_path / 'there'}")  # fmt: skip
    assert code == 1 and "exists; a sweep is written into a new folder" in err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_budgets_add_up():
    budgets = scaling_sweep.budgets_of(1e20, 4, 5, 3.0)
    assert sum(budgets) * 5 == pytest.approx(1e20)
    assert np.allclose(np.diff(np.log(budgets)), math.log(3))


def test_shapes_have_the_size_that_was_asked_for():
    for params in (4e8, 1e9, 7e9, 7e10, 1.75e11):
        shape = scaling_sweep.find_shape(params, vocab_size=250_880, head_dim=128, aspect=100)
        assert abs(shape.params / params - 1) < 0.055
        assert shape.emb_dim == 128 * shape.num_heads
        assert 80 < shape.emb_dim / shape.num_layers < 125
        assert shape.params == flops.num_params(
            vocab_size=250_880, emb_dim=shape.emb_dim, num_layers=shape.num_layers, mlp_dim=4 * shape.emb_dim
        )  # fmt: skip
    small = scaling_sweep.find_shape(258_000, vocab_size=4096, head_dim=32, aspect=32)
    assert (small.num_layers, small.emb_dim, small.num_heads) == (2, 48, 2)
    with pytest.raises(BadInput, match="has about 1e.06 parameters; the nearest has 32,"):
        scaling_sweep.find_shape(1e6, vocab_size=250_880, head_dim=128, aspect=100)


def test_shapes_may_be_asked_for_without_the_embedding(answer):
    details = {"params_column": "params_non_embedding"}
    asked = dict(vocab_size=250_880, head_dim=128, aspect=60)
    shape = scaling_sweep.find_shape(3e8, **asked, details=details)
    inner = flops.num_non_embedding_params(
        emb_dim=shape.emb_dim, num_layers=shape.num_layers, mlp_dim=4 * shape.emb_dim
    )
    assert abs(inner / 3e8 - 1) < 0.055
    assert shape.params - inner == 250_880 * shape.emb_dim
    (best,) = answer("optimal", "--flops=1e21", "--law=kaplan")["answers"]
    embedding = 250_880 * best["shape"]["emb_dim"]
    assert best["shape"]["params"] - embedding == pytest.approx(best["params"], rel=0.05)


def test_shapes_have_the_parts_of_the_base():
    like = config.build("Bloom.config", "1b3.gin", ["include 'ablations/swiglu.gin'"])
    like = dataclasses.replace(like, tied_head=False)
    shape = scaling_sweep.find_shape(1e9, vocab_size=50_688, head_dim=128, aspect=100, like=like)
    sizes = {name: getattr(shape, name) for name in ("num_layers", "emb_dim", "num_heads")}
    model = Bloom(dataclasses.replace(like, **sizes, expected_params=None))
    tree = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32))
    assert shape.params == sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
    assert abs(shape.params / 1e9 - 1) < 0.055


# ---- bad input ----

BAD = {
    (): "'no verb': the verbs are fit, optimal, table, collect, sweep, check",
    ("fitt",): "'fitt': the verbs are fit,",
    ("fit",): "fit needs a table of runs, such as runs.csv; got nothing",
    ("fit", "none.csv"): "none.csv cannot be read: No such file",
    ("fit", "a.csv", "b.csv"): "fit needs a table of runs, such as runs.csv; got a.csv b.csv",
    ("fit", "RUNS", "--approach=4"): "--approach=4: there are 1, 2, 3, kaplan and repeated",
    ("fit", "RUNS", "--starts=7"): "starts must be 4500 or 1125, got 7",
    ("fit", "RUNS", "--bootstrap=3"): "--bootstrap=3 is too few",
    ("fit", "RUNS", "--columns=loss"): "--columns=loss: write OLD:NEW",
    ("fit", "RUNS", "--columns=x:loss"): "has no column x; it has: loss, params, tokens",
    ("fit", "RUNS", "--approach=1"): "approach 1 needs training curves",
    ("fit", "RUNS", "--plot=x.bmp"): "--plot=x.bmp: pictures end in .png, .svg, .pdf",
    ("fit", "RUNS", "--approach=repeated", "--plot=x.png"): "approach repeated has no picture",
    ("fit", "RUNS", "--plot=no/x.png"): "--plot=no/x.png: there is no folder no",
    ("optimal",): "exactly one of --flops, --gpu_hours, --params, --tokens; got none",
    ("optimal", "--flops=1e21", "--params=1e9"): "got flops, params",
    ("optimal", "--flops=-1"): "--flops=-1.0 must be a number above 0",
    ("optimal", "--flops=nan"): "--flops=nan must be a number above 0",
    ("optimal", "--flops=1.4e12"): "far below the runs behind the law (6e+18 to 3e+21); are the units mixed up?",
    ("optimal", "--params=1e3"): "are the units mixed up?",
    ("optimal", "--tokens=5.76e23"): "are the units mixed up?",
    ("optimal", "--flops=1e21", "--law=chinchila"): "no law 'chinchila'; there are: chinchilla,",
    ("optimal", "--flops=1e21", "--law=x.json"): "--law=x.json cannot be read",
    ("optimal", "--flops=1e21", "--law=RUNS"): "runs.csv cannot be read: Expecting value",
    ("optimal", "--gpu_hours=5", "--device=abacus"): "--device=abacus: its peak is not known; known: A100,",
    ("optimal", "--gpu_hours=5", "--mfu=40"): "--mfu=40.0 must lie between 0 and 1",
    ("optimal", "1e21"): "optimal takes flags only, got '1e21'",
    ("optimal", "--flopz=1"): "Unknown command line flag 'flopz'. Did you mean: flops",
    ("optimal", "--params=1e200"): "are the units mixed up?",
    ("optimal", "--tokens=1e300"): "are the units mixed up?",
    ("sweep", "--gin_file=tiny.gin", "--flops=1e15", "--out=x", "--span=nan"): "--span above 1",
    ("table", "3"): "table takes flags only",
    ("collect",): "collect needs the MODEL_DIRs of finished runs",
    ("collect", "nowhere"): "nowhere is no MODEL_DIR: no config.gin (there is no such folder)",
    ("check", "nowhere"): "check needs --law=FILE of `fit --json`",
    ("check", "nowhere", "--law=x.json"): "--law=x.json cannot be read",
    ("sweep", "--gin_file=tiny.gin"): "sweep needs --flops (of all runs together) and --out",
    ("sweep", "--gin_file=tiny.gin", "--flops=1e15", "--out=x", "--span=1"): "--span above 1",
    ("sweep", "--flops=1e15", "--out=x"): "does not bind Bloom.config",
    ("sweep", "--gin_file=tinny.gin", "--flops=1e15", "--out=x"): "no gin file 'tinny.gin'",
    ("sweep", "--gin_file=176b.gin", "--flops=1e15", "--out=x"): "no run fits into --flops=1e+15",
}  # fmt: skip


@pytest.mark.parametrize("words", BAD, ids=" ".join)
def test_bad_input_is_one_line(words, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_runs(tmp_path / "runs.csv", chinchilla_range(0, num=8))
    extra = []
    if "--gin_file=176b.gin" in words:
        extra = [f"--gin.{name}='x'" for name in ("MODEL_DIR", "STORE_DIR", "VOCABULARY")]
    code, out, err = run(*(word.replace("RUNS", str(path)) for word in words), *extra)
    assert code == 1 and out == ""
    assert err.startswith("bloomjax: ") and err.count("\n") == 1
    assert BAD[words] in err
    assert [entry.name for entry in tmp_path.iterdir()] == ["runs.csv"]  # nothing was left


def test_a_folder_that_is_no_run(run, tmp_path):
    (tmp_path / "config.gin").write_text("")
    code, _, err = run("collect", tmp_path)
    assert code == 1 and "no metrics.jsonl (it has config.gin)" in err


def test_damaged_metrics(run_folder, run, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(run_folder, broken)
    text = (broken / "metrics.jsonl").read_text()
    (broken / "metrics.jsonl").write_text("{half\n" + text)
    assert "metrics.jsonl line 1 is damaged" in run("collect", broken)[2]
    (broken / "metrics.jsonl").write_text(text.splitlines()[0] + "\n")
    assert "has no step yet" in run("collect", broken)[2]


def test_json_has_no_inf_and_no_nan():
    record = {"a": [math.inf, (1.0, math.nan)], "b": {"c": -math.inf, "d": 2}}
    assert scaling._finite(record) == {"a": [None, [1.0, None]], "b": {"c": None, "d": 2}}


def test_words_and_flags():
    words, found = scaling.split_words(
        ["fit", "--approach", "2", "runs.csv", "--json", "--plot=x.png", "--bootstrap", "50"]
    )
    assert words == ["fit", "runs.csv"]
    assert found == ["--approach=2", "--json", "--plot=x.png", "--bootstrap=50"]


def test_the_command_itself():
    """From another folder; with matplotlib not loaded, which --plot alone needs."""
    tool = REPOSITORY / "tools" / "scaling.py"
    program = f"""
import atexit, runpy, sys
sys.argv = ["scaling.py", "table"]
sys.path.insert(0, {str(tool.parent)!r})
atexit.register(lambda: print("matplotlib" in sys.modules))
runpy.run_path({str(tool)!r}, run_name="__main__")
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd="/",
        env=tiny_run.environment(), check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "False"
    assert "C is 0.1 x 6ND" in result.stdout
