"""Gin files and flags: every mistake is one line, and what a run saves can be run again."""

import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import gin
import pytest

from bloomjax import config
from bloomjax.errors import BadInput

# Toy verbs. Their names differ from the real ones because gin has one registry in a process.


@dataclasses.dataclass(frozen=True)
class ToyShape:
    emb_dim: int = 4
    dtype: str = "bfloat16"


@dataclasses.dataclass(frozen=True)
class ToyModel:
    shape: ToyShape
    num_layers: int = 2
    dropout: float | None = None


@dataclasses.dataclass(frozen=True)
class ToyCosine:
    peak: float
    end: "float" = 0.0

    def __post_init__(self):
        if self.peak < 0:
            raise BadInput(f"peak must not be negative, got {self.peak}")
        if self.peak > 100:
            raise ZeroDivisionError("a bug")

    def __call__(self, step: int) -> float:
        return self.peak


def toy_constant(step: int, *, rate: float = 0.5) -> float:
    return rate


def toy_train(
    *,
    model: ToyModel,
    model_dir: str,
    steps: int,
    lr: float = 0.1,
    debug: bool = False,
    kind: Literal["ffn", "moe"] = "ffn",
    schedule: Callable[[int], float] | None = None,
    languages: Sequence[str] = (),
    mesh: tuple[int, ...] = (1,),
    pair: tuple[int, str] = (1, "a"),
    rates: dict[str, float] | None = None,
    eval_model: ToyModel | None = None,
    anything: Any = None,
):
    calls.append({**locals(), "config": config.operative_config()})
    if isinstance(anything, type) and issubclass(anything, Exception):
        raise anything("told to fail")
    return anything


def toy_prepare(*, model_dir: str, workers: int = 2):
    calls.append(locals())


def toy_fail(message: str = "the store is empty"):
    raise BadInput(message)


def toy_bug():
    raise KeyError("a bug") from OSError("its cause")


TOYS = (
    (
        __name__,
        (
            "ToyShape",
            "ToyModel",
            "ToyCosine",
            "toy_constant",
            "toy_train",
            "toy_prepare",
            "toy_fail",
            "toy_bug",
        ),
    ),
)

GOOD = """
MODEL_DIR = %gin.REQUIRED
STEPS = 10
EMB_DIM = 8
toy_train.model = @ToyModel()
toy_train.model_dir = %MODEL_DIR
toy_train.steps = %STEPS
ToyModel.shape = @ToyShape()
ToyShape.emb_dim = %EMB_DIM
toy_prepare.model_dir = %MODEL_DIR
"""

calls: list[dict[str, Any]] = []


@pytest.fixture(autouse=True)
def _working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = tmp_path / "shipped"
    (shipped / "hardware").mkdir(parents=True)
    (shipped / "tiny.gin").write_text(GOOD)
    (shipped / "hardware" / "h100.gin").write_text("toy_train.mesh = (2, 4)\n")
    monkeypatch.setattr(config, "gin_dir", lambda: shipped)
    calls.clear()
    yield
    gin.clear_config()


@pytest.fixture
def start(capsys):
    """start(verb, *flags) -> (exit code, stderr)."""

    def start(verb, *argv):
        with pytest.raises(SystemExit) as stop:
            config.run(verb, ["prog", *argv], TOYS)
        return stop.value.code, capsys.readouterr().err

    return start


DIR = '--gin.MODEL_DIR="runs/a"'


def test_flags_and_files_become_one_call(start):
    assert start("toy_train", "--gin_file=tiny.gin", DIR, "--gin.STEPS=1_000") == (0, "")
    (call,) = calls
    assert call["model"] == ToyModel(ToyShape(emb_dim=8))
    assert type(call["model"]) is ToyModel and type(call["model"].shape) is ToyShape
    assert (call["model_dir"], call["steps"], call["lr"]) == ("runs/a", 1000, 0.1)


def test_the_registered_functions_stay_themselves(start):
    before = toy_constant, ToyModel.__init__
    start("toy_prepare", "--gin.toy_prepare.model_dir='x'")
    assert (toy_constant, ToyModel.__init__) == before
    with pytest.raises(TypeError, match="shape"):
        ToyModel()  # a direct call gets nothing from gin


def test_later_files_and_then_flags_win(start):
    Path("more.gin").write_text("STEPS = 20\nEMB_DIM = 16\n")
    files = ("--gin_file=tiny.gin", "--gin_file=more.gin", "--gin_file=hardware/h100.gin")
    assert start("toy_train", "--gin.EMB_DIM=32", *files, DIR) == (0, "")
    assert (calls[0]["steps"], calls[0]["model"].shape.emb_dim) == (20, 32)
    assert calls[0]["mesh"] == (2, 4)


def test_a_second_run_starts_from_nothing(start):
    start("toy_train", "--gin_file=tiny.gin", DIR, "--gin.STEPS=11")
    start("toy_train", "--gin_file=tiny.gin", DIR)
    assert [call["steps"] for call in calls] == [11, 10]


def test_files_here_come_before_shipped_files_also_for_includes(start):
    Path("mine.gin").write_text("include 'tiny.gin'\ninclude 'local.gin'\n")
    Path("local.gin").write_text("STEPS = 77\n")
    assert start("toy_train", "--gin_file=mine.gin", DIR) == (0, "")  # no log line of gin either
    assert calls[0]["steps"] == 77
    Path("tiny.gin").write_text(GOOD.replace("= 10", "= 12"))
    start("toy_train", "--gin_file=mine.gin", DIR, "--gin.STEPS=%EMB_DIM")
    start("toy_train", "--gin_file=tiny.gin", DIR)
    assert [call["steps"] for call in calls[1:]] == [8, 12]


def test_a_verb_needs_only_what_it_reaches(start):
    """The shared file leaves MODEL_DIR open; a verb that does not read it does not ask for it."""
    Path("mine.gin").write_text("include 'tiny.gin'\ntoy_prepare.model_dir = 'here'\n")
    assert start("toy_prepare", "--gin_file=mine.gin") == (0, "")
    assert calls == [{"model_dir": "here", "workers": 2}]


def test_exit_code_and_values_that_are_none(start):
    flags = ("toy_train", "--gin_file=tiny.gin", DIR)
    assert start(*flags, "--gin.toy_train.anything=75") == (75, "")
    assert start(*flags, "--gin.toy_train.anything={'state': 1}") == (0, "")


# file:line or flag, then what is wrong with it and what would be right
MISTAKES = {
    "unknown parameter": (
        "toy_train.stepz = 1",
        "run.gin:2: 'toy_train' has no parameter 'stepz'; did you mean 'steps'? (parameters: model,"
        " model_dir, steps, lr, debug, kind, schedule, languages, mesh, pair, rates, eval_model,"
        " anything)",
    ),
    "unknown configurable": (
        "toy_trian.lr = 1.0",
        "run.gin:2: nothing is registered as 'toy_trian'; did you mean 'toy_train'",
    ),
    "unknown configurable, other case": (
        "TOY_PREPARE.workers = 1",
        "run.gin:2: nothing is registered as 'TOY_PREPARE'; did you mean 'toy_prepare'",
    ),
    "unknown reference": (
        "toy_train.model = @ToyModell()",
        "run.gin:2: nothing is registered as 'ToyModell'; did you mean 'ToyModel'",
    ),
    "macro that nothing uses": (
        "STEP = 5",
        "run.gin:2: nothing uses the macro STEP; did you mean 'STEPS'?",
    ),
    "macro that nothing uses, other case": (
        "steps = 5",
        "run.gin:2: nothing uses the macro steps; did you mean 'STEPS'?",
    ),
    "undefined macro": (
        "toy_train.steps = %STEPPS",
        "run.gin:2: nothing; run.gin:2: toy_train.steps uses %STEPPS, which has no value; did you"
        " mean 'STEPS'?",
    ),
    "undefined macro in a list": (
        "toy_train.languages = ['en', %FR]",
        "run.gin:2: toy_train.languages uses %FR, which has no value",
    ),
    "undefined macro in an object": (
        "ToyShape.emb_dim = %EMBDIM",
        "run.gin:2: ToyShape.emb_dim uses %EMBDIM, which has no value; did you mean 'EMB_DIM'?",
    ),
    "given twice": (
        "toy_train.lr = 0.1\ntoy_train.lr = 0.2",
        "run.gin:3: toy_train.lr has a value already, from run.gin:2",
    ),
    "macro given twice": ("EMB_DIM = 1\nEMB_DIM = 1", "EMB_DIM has a value already, from run.gin:2"),
    "given twice in a block": (
        "toy_train.lr = 0.1\ntoy_train:\n  lr = 0.2\n  debug = True",
        "run.gin:4: toy_train.lr has a value already, from run.gin:2",
    ),
    "unquoted text": (
        "toy_train.model_dir = /data/y  # where",
        "run.gin:2: cannot read '/data/y'; text needs quotes: toy_train.model_dir = \"/data/y\" in a"
        " file, --gin.toy_train.model_dir='\"/data/y\"' in a shell",
    ),
    "unquoted word": ("MODEL_DIR = runs/x", "run.gin:2: cannot read 'runs/x'; text needs quotes"),
    "unquoted word after a number": ("MODEL_DIR = 2026-run", "cannot read '2026-run'; text needs"),
    "true": ("toy_train.debug = true", "run.gin:2: cannot read 'true'; write True"),
    "none": ("toy_train.rates = none", "run.gin:2: cannot read 'none'; write None"),
    "syntax": ("toy_train.lr 1", "run.gin:2: cannot read 'toy_train.lr 1': Couldn't parse"),
    "open bracket": ("toy_train.mesh = (1, 2\n", "cannot read"),
    "open quote": ("toy_train.model_dir = 'abc\n", "run.gin:2: cannot read \"toy_train.model_dir"),
    "import": ("import no_such_thing", "run.gin:2: cannot import no_such_thing: No module named"),
    "missing include": (
        "include 'tinny.gin'",
        "run.gin:2: no gin file 'tinny.gin' in ",
    ),
    "include of itself": ("include 'run.gin'", "run.gin:2: run.gin includes itself"),
    "text for an int": ("STEPS = 'many'", "toy_train.steps must be int, got %STEPS = 'many'"),
    "float for an int": (
        "toy_train.steps = 1e3",
        "run.gin:2: toy_train.steps must be int, got 1000.0 (write 1000)",
    ),
    "float for an int in a macro": (
        "STEPS = 1e3",
        "toy_train.steps must be int, got %STEPS = 1000.0 (write 1000)",
    ),
    "fraction for an int": ("toy_train.steps = 1.5", "toy_train.steps must be int, got 1.5\n"),
    "bool for an int": ("toy_train.steps = True", "toy_train.steps must be int, got True\n"),
    "bool for a float": ("toy_train.lr = False", "toy_train.lr must be float, got False\n"),
    "int for a bool": ("toy_train.debug = 1", "toy_train.debug must be bool, got 1\n"),
    "int for text": ("toy_train.model_dir = 5", "toy_train.model_dir must be str, got 5\n"),
    "None for text": ("toy_train.model_dir = None", "toy_train.model_dir must be str, got None\n"),
    "text for a union": (
        "ToyModel.dropout = 'a'",
        "run.gin:2: ToyModel.dropout must be float | None, got 'a'\n",
    ),
    "text annotation": ("ToyCosine.end = 'a'", "ToyCosine.end must be float, got 'a'\n"),
    "literal": ("toy_train.kind = 'mlp'", "must be Literal['ffn', 'moe'], got 'mlp'\n"),
    "list for a tuple": (
        "toy_train.mesh = [2, 4]",
        "toy_train.mesh must be tuple[int, ...], got [2, 4] (write (2, 4))",
    ),
    "float in a tuple": ("toy_train.mesh = (2, 4.0)", "must be tuple[int, ...], got (2, 4.0)\n"),
    "tuple too short": ("toy_train.pair = (1,)", "must be tuple[int, str], got (1,)\n"),
    "tuple in disorder": ("toy_train.pair = ('a', 1)", "must be tuple[int, str], got ('a', 1)\n"),
    "text for a sequence of text": ("toy_train.languages = 'en'", "Sequence[str], got 'en'\n"),
    "int in a sequence of text": ("toy_train.languages = ['en', 2]", "got ['en', 2]\n"),
    "text in a dict of floats": ("toy_train.rates = {'en': 'a'}", "got {'en': 'a'}\n"),
    "number for an object": ("toy_train.model = 5", "toy_train.model must be ToyModel, got 5\n"),
    "number for a function": ("toy_train.schedule = 5", "toy_train.schedule must be "),
    "object of another class": (
        "toy_train.model = @ToyShape()",
        "toy_train.model must be ToyModel, got @ToyShape()\n",
    ),
    "reference without brackets": (
        "toy_train.model = @ToyModel",
        "toy_train.model must be ToyModel, got @ToyModel (write @ToyModel())",
    ),
    "object that is no function": ("toy_train.schedule = @ToyModel()", "got @ToyModel()\n"),
    "object that lacks a value": (
        "toy_train.schedule = @ToyCosine()",
        "bloomjax: gin: ToyCosine.peak must be given\n",
    ),
    "constructor that refuses": (
        "toy_train.schedule = @ToyCosine()\nToyCosine.peak = -1.0",
        "bloomjax: peak must not be negative, got -1.0\n",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(start, mistake):
    lines, message = MISTAKES[mistake]
    Path("run.gin").write_text(f"include 'tiny.gin'\n{lines}\n")
    code, error = start("toy_train", "--gin_file=run.gin", DIR)
    assert code == 1 and not calls
    assert error.startswith("bloomjax: ") and error.count("\n") == 1 and "Traceback" not in error
    assert message in error.replace("nothing uses the macro STEPS; ", "")
