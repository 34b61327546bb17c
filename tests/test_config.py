"""Gin files and flags: every mistake is one line, and what a run saves can be run again."""

import dataclasses
import os
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
        "gin: run.gin:2: toy_train.steps uses %STEPPS, which has no value; did you mean 'STEPS'?",
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
    "macro given twice": (
        "EMB_DIM = 1\nEMB_DIM = 1",
        "EMB_DIM has a value already, from run.gin:2",
    ),
    "given twice in a block": (
        "toy_train.lr = 0.1\ntoy_train:\n  lr = 0.2\n  debug = True",
        "run.gin:4: toy_train.lr has a value already, from run.gin:2",
    ),
    "unquoted text": (
        "toy_train.model_dir = /data/y  # where",
        "run.gin:2: cannot read '/data/y'; text needs quotes: toy_train.model_dir = \"/data/y\""
        " in a file, --gin.toy_train.model_dir='\"/data/y\"' in a shell",
    ),
    "unquoted word": ("MODEL_DIR = runs/x", "run.gin:2: cannot read 'runs/x'; text needs quotes"),
    "unquoted word after a number": ("MODEL_DIR = 2026-run", "cannot read '2026-run'; text needs"),
    "true": ("toy_train.debug = true", "run.gin:2: cannot read 'true'; write True"),
    "none": ("toy_train.rates = none", "run.gin:2: cannot read 'none'; write None"),
    "syntax": ("toy_train.lr 1", "run.gin:2: cannot read 'toy_train.lr 1': Couldn't parse"),
    "open bracket": ("toy_train.mesh = (1, 2\n", "cannot read"),
    "open quote": ("toy_train.model_dir = 'abc\n", 'run.gin:2: cannot read "toy_train.model_dir'),
    "import": ("import no_such_thing", "run.gin:2: cannot import no_such_thing: No module named"),
    "missing include": (
        "include 'tinny.gin'",
        "run.gin:2: no gin file 'tinny.gin' in ",
    ),
    "include of itself": ("include 'run.gin'", "run.gin:2: run.gin includes itself"),
    "text for an int": (
        "STEPS = 'many'",
        "run.gin:2: toy_train.steps must be int, got %STEPS = 'many'",
    ),
    "float for an int": (
        "toy_train.steps = 1e3",
        "run.gin:2: toy_train.steps must be int, got 1000.0 (write 1000)",
    ),
    "float for an int in a macro": (
        "STEPS = 1e3",
        "run.gin:2: toy_train.steps must be int, got %STEPS = 1000.0 (write 1000)",
    ),
    "float equal to the default": ("ToyModel.num_layers = 2.0", "int, got 2.0 (write 2)"),
    "macro of itself": ("STEPS = %STEPS", "run.gin:2: the macro STEPS refers to itself\n"),
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
    assert message in error


def test_overriding_what_a_macro_was_for_is_no_mistake(start):
    assert start("toy_train", "--gin_file=tiny.gin", DIR, "--gin.toy_train.steps=3") == (0, "")
    assert calls[0]["steps"] == 3


def test_mistakes_in_flags_name_the_flag(start):
    def error(*flags):
        code, line = start("toy_train", *flags)
        assert code == 1 and line.count("\n") == 1
        return line.removeprefix("bloomjax: ").strip()

    tiny = "--gin_file=tiny.gin"
    assert error(tiny, DIR, "--gin.toy_train.stepz=1").startswith(
        "gin: --gin.toy_train.stepz=1: 'toy_train' has no parameter 'stepz'; did you mean 'steps'?"
    )
    assert error(tiny, DIR, "--gin.STEP=1") == (
        "gin: --gin.STEP=1: nothing uses the macro STEP; did you mean 'STEPS'?"
    )
    assert error(tiny, DIR, "--gin.toy_train.steps=1e3") == (
        "gin: --gin.toy_train.steps=1e3: toy_train.steps must be int, got 1000.0 (write 1000)"
    )
    assert error(tiny, "--gin.MODEL_DIR=/data/y") == (
        "gin: --gin.MODEL_DIR=/data/y: cannot read '/data/y'; text needs quotes: MODEL_DIR ="
        ' "/data/y" in a file, --gin.MODEL_DIR=\'"/data/y"\' in a shell'
    )
    assert error(tiny) == "gin: tiny.gin:2: MODEL_DIR must be given"
    assert error(tiny, "--gin.MODEL_DIR") == (
        "gin: --gin.MODEL_DIR has no value; write --gin.MODEL_DIR=VALUE"
    )
    assert error("--gin_fiel=tiny.gin") == (
        "Unknown command line flag 'gin_fiel'. Did you mean: gin_file ?"
    )
    assert error("tiny.gin") == (
        "unexpected argument 'tiny.gin'; gin files are given as --gin_file=FILE"
    )
    assert not calls


def test_missing_arguments_are_named_and_the_shipped_files_shown(start):
    assert start("toy_train", "--gin.toy_train.steps=1") == (
        1,
        "bloomjax: gin: toy_train.model must be given; toy_train.model_dir must be given"
        " (no --gin_file given; shipped: hardware/h100.gin, tiny.gin)\n",
    )


def test_a_missing_file_is_named_where_it_was_asked_for(start, tmp_path):
    places = f"{tmp_path} or {tmp_path / 'shipped'}"
    shipped = "(shipped: hardware/h100.gin, tiny.gin)"
    assert start("toy_train", "--gin_file=tinny.gin") == (
        1,
        f"bloomjax: gin: --gin_file: no gin file 'tinny.gin' in {places}; did you mean 'tiny.gin'?"
        f" {shipped}\n",
    )
    Path("outer.gin").write_text("include 'inner.gin'\n")
    Path("inner.gin").write_text("\n# a comment\ninclude 'h200.gin'\n")
    assert start("toy_train", "--gin_file=outer.gin") == (
        1,
        f"bloomjax: gin: inner.gin:3: no gin file 'h200.gin' in {places} {shipped}\n",
    )


def test_a_flag_without_effect_is_said_in_one_line(start):
    flags = ("--gin_file=tiny.gin", DIR, "--gin.toy_prepare.workers=3", "--gin.STEPS=3")
    assert start("toy_train", *flags) == (
        0,
        "bloomjax: gin: --gin.toy_prepare.workers=3 has no effect on toy_train\n",
    )
    assert "--gin.STEPS=3 has no effect on toy_prepare\n" in start("toy_prepare", *flags)[1]


def test_unused_bindings_follow_references_and_scopes(start):
    Path("run.gin").write_text(
        """
include 'tiny.gin'
toy_train.eval_model = @eval/ToyModel()
toy_train.schedule = @toy_constant
eval/ToyModel.num_layers = 1
test/ToyModel.num_layers = 1
eval/ToyShape.dtype = 'float32'
toy_constant.rate = 0.25
ToyCosine.peak = 1.0
"""
    )
    assert start("toy_train", "--gin_file=run.gin", DIR) == (0, "")
    assert config.unused_bindings("toy_train") == [
        "ToyCosine.peak",
        "test/ToyModel.num_layers",
        "toy_prepare.model_dir",
    ]
    (call,) = calls
    assert call["schedule"](0) == 0.25
    assert call["eval_model"] == ToyModel(ToyShape(8, "float32"), num_layers=1)
    assert call["model"] == ToyModel(ToyShape(8, "bfloat16"), num_layers=2)


def test_bad_input_of_the_verb_is_one_line(start):
    assert start("toy_fail") == (1, "bloomjax: the store is empty\n")


def test_other_exceptions_keep_their_cause():
    with pytest.raises(KeyError) as caught:
        config.run("toy_bug", ["prog"], TOYS)
    assert type(caught.value) is KeyError and isinstance(caught.value.__cause__, OSError)
    flags = ["prog", "--gin.toy_train.schedule=@ToyCosine()", "--gin.ToyCosine.peak=1e6"]
    rest = ["--gin.toy_train.steps=1", DIR, "--gin_file=tiny.gin"]
    with pytest.raises(ZeroDivisionError, match="In call to configurable 'ToyCosine'"):
        config.run("toy_train", flags + rest, TOYS)


# What a run saves

RICH = """
import json
include 'tiny.gin'
MODEL = @big/ToyModel()
big/ToyModel.num_layers = 3
rates/LOW = 0.25
toy_train.model = %MODEL
toy_train.eval_model = @small/ToyModel()
small/ToyModel.num_layers = 1
toy_train.rates = {'en': %rates/LOW, 'as': 1e-5, 'fr': 0.5}
toy_train.languages = ['en', "it's \\n", 'ৰ']
toy_train.schedule = @ToyCosine()
toy_train.pair = (-3, 'x')
ToyModel.dropout = None
ToyCosine.peak = 3e-4
UNTOUCHED = 5
toy_prepare.workers = %UNTOUCHED
"""


def test_the_operative_config_runs_again_alone_and_is_the_same(start, monkeypatch):
    Path("rich.gin").write_text(RICH)
    assert start("toy_train", "--gin_file=rich.gin", DIR, "--gin.toy_train.steps=3") == (0, "")
    text = calls[0]["config"]
    Path("config.gin").write_text(text)
    for shipped in config.gin_dir().rglob("*.gin"):
        shipped.unlink()
    assert start("toy_train", "--gin_file=config.gin") == (0, "")
    first, second = calls
    assert second == first
    assert list(second["rates"]) == ["en", "as", "fr"]  # gin's own printer would sort it
    assert second["languages"] == ["en", "it's \n", "ৰ"]

    lines = text.splitlines()
    assert lines[0] == "import json"
    assert "MODEL = @big/ToyModel()" in lines and "rates/LOW = 0.25" in lines
    assert "toy_train.model = %MODEL" in lines
    assert "toy_train.steps = 3" in lines and not any(x.startswith("STEPS") for x in lines)
    assert "toy_train.lr = 0.1" in lines and "ToyShape.dtype = 'bfloat16'" in lines  # defaults
    assert "toy_prepare.workers = %UNTOUCHED" in lines and "UNTOUCHED = 5" in lines
    assert not any(x.startswith("MODEL/") for x in lines)


def test_the_operative_config_means_the_same_to_gin_itself(start):
    Path("rich.gin").write_text(RICH)
    start("toy_train", "--gin_file=rich.gin", DIR)
    Path("config.gin").write_text(calls[0]["config"])
    gin.clear_config()
    gin.parse_config_file("config.gin")
    gin.finalize()
    gin.get_configurable("toy_train")()
    first, second = calls
    assert {**second, "config": None} == {**first, "config": None}


def test_the_operative_config_can_be_overridden(start):
    Path("rich.gin").write_text(RICH.replace("@big/ToyModel", "@ToyModel").replace("big/", ""))
    start("toy_train", "--gin_file=rich.gin", DIR)
    Path("config.gin").write_text(calls[0]["config"])
    flags = ("--gin.ToyModel.num_layers=9", "--gin.STEPS=99", "--gin.ToyShape.emb_dim=2")
    assert start("toy_train", "--gin_file=config.gin", *flags) == (0, "")
    assert calls[1]["model"] == ToyModel(ToyShape(emb_dim=2), num_layers=9)
    assert calls[1]["steps"] == 99


# build


def test_build_returns_the_object_and_leaves_the_configuration(start):
    Path("saved.gin").write_text(RICH + "MODEL_DIR = 'a'\n")
    start("toy_prepare", "--gin.toy_prepare.model_dir='b'")
    before = config.operative_config()
    model = config.build("toy_train.model", "saved.gin", configurables=TOYS)
    assert model == ToyModel(ToyShape(8), num_layers=3)
    other = config.build("toy_train.eval_model", Path("saved.gin"), ["EMB_DIM = 6"], TOYS)
    assert other == ToyModel(ToyShape(6), num_layers=1)
    assert config.build("toy_train.pair", "saved.gin", configurables=TOYS) == (-3, "x")
    assert (
        config.operative_config()
        == before
        == ("toy_prepare.model_dir = 'b'\ntoy_prepare.workers = 2\n")
    )


def test_build_asks_only_for_what_it_needs():
    """tiny.gin leaves MODEL_DIR open, which a model does not read."""
    assert config.build("toy_train.model", "tiny.gin", (), TOYS) == ToyModel(ToyShape(8))
    with pytest.raises(BadInput, match="^gin: tiny.gin:2: MODEL_DIR must be given$"):
        config.build("toy_train.model_dir", "tiny.gin", (), TOYS)


@pytest.mark.parametrize(
    ("binding", "gin_file", "bindings", "message"),
    [
        ("toy_train.lr", "tiny.gin", [], "gin: tiny.gin does not bind toy_train.lr"),
        ("toy_trainn.lr", "tiny.gin", [], "nothing is registered as 'toy_trainn'; did you mean"),
        ("toy_train.model", "tinny.gin", [], "gin: --gin_file: no gin file 'tinny.gin'"),
        (
            "toy_train.model",
            "tiny.gin",
            ["EMB_DIM = 2.0"],
            "gin: --gin.EMB_DIM=2.0: ToyShape.emb_dim must be int, got %EMB_DIM = 2.0 (write 2)",
        ),
    ],
)
def test_build_says_what_is_wrong(binding, gin_file, bindings, message):
    with pytest.raises(BadInput, match="^" + re.escape(message)):
        config.build(binding, gin_file, bindings, TOYS)


# With the real parts


def test_a_flax_module_takes_its_fields_from_gin(start):
    import flax.linen as nn
    import jax

    class ToyFlax(nn.Module):
        shape: ToyShape
        num_layers: int = 2

        @nn.compact
        def __call__(self, x):
            return nn.Dense(self.shape.emb_dim)(x)

    module = sys.modules[__name__]
    module.ToyFlax = ToyFlax
    toys = (*TOYS, (__name__, ("ToyFlax",)))
    Path("flax.gin").write_text(
        "toy_train.anything = @ToyFlax()\nToyFlax.shape = @ToyShape()\nToyShape.emb_dim = 3\n"
    )
    model = config.build("toy_train.anything", "flax.gin", ["ToyFlax.num_layers = 5"], toys)
    assert type(model) is ToyFlax and model.num_layers == 5
    assert model == ToyFlax(ToyShape(emb_dim=3), num_layers=5) and hash(model)
    variables = model.init(jax.random.key(0), jax.numpy.ones((1, 2)))
    assert variables["params"]["Dense_0"]["kernel"].shape == (2, 3)
    with pytest.raises(BadInput, match="ToyFlax.num_layers must be int, got 5.0"):
        config.build("toy_train.anything", "flax.gin", ["ToyFlax.num_layers = 5.0"], toys)
    with pytest.raises(BadInput, match="'ToyFlax' has no parameter 'num_layer'; did you mean"):
        config.build("toy_train.anything", "flax.gin", ["ToyFlax.num_layer = 5"], toys)


def test_a_verb_runs_as_a_module(tmp_path):
    """`python -m` runs a second copy of the module; the registered one is the importable one."""
    (tmp_path / "verbs.py").write_text(
        """
from __future__ import annotations
from bloomjax import config
class Store:
    def __init__(self, path: str): self.path = path
def copy(*, store: Store, num_files: int = 1):
    import verbs
    assert type(store) is verbs.Store and __name__ == "verbs"
    print(store.path, num_files)
    if num_files > 8: raise RuntimeError("a bug")
    return 75
if __name__ == "__main__":
    config.run("copy", configurables=(("verbs", ("Store", "copy")),))
"""
    )
    (tmp_path / "a.gin").write_text("copy.store = @Store()\n")

    def start(*flags):
        command = [sys.executable, "-W", "error", "-m", "verbs", "--gin_file=a.gin", *flags]
        root = str(Path(config.__file__).resolve().parents[1])
        path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout, done.stderr

    assert start("--gin.Store.path='x'", "--gin.copy.num_files=3") == (75, "x 3\n", "")
    code, out, err = start("--gin.Store.path='x'", "--gin.copy.num_files=3.0")
    assert (code, out) == (1, "")
    assert err == (
        "bloomjax: gin: --gin.copy.num_files=3.0: copy.num_files must be int, got 3.0 (write 3)\n"
    )
    assert "--gin_file: Gin file, sought here" in start("--help")[1]
    code, out, err = start("--gin.Store.path='x'", "--gin.copy.num_files=9")
    assert code == 1 and "Traceback" in err and err.endswith("RuntimeError: a bug\n")


def test_the_shipped_folder_is_beside_the_package(monkeypatch):
    monkeypatch.undo()
    assert config.gin_dir() == Path(config.__file__).resolve().parents[1] / "gin"
