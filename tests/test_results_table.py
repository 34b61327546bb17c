"""Ours beside BigScience's: files of both kinds, one table."""

import json

import pytest

from bloomjax import evaluate
from bloomjax.errors import BadInput
from bloomjax.results_table import Results, markdown, read_results
from bloomjax.task_presets import BIGSCIENCE_27, expand


@pytest.fixture
def published(tmp_path):
    """A file as bigscience/evaluation/results/tr3 has them, with two checkpoints and made-up numbers."""
    results = {
        "sst": {"acc": [0.5, 0.75], "acc_stderr": [0.01, 0.0125]},
        "lambada": {
            "ppl": [99.0, 20.5], "ppl_stderr": [2.0, 1.0], "acc": [0.1, 0.25], "acc_stderr": [0.01, 0.01],
        },
        "triviaqa": {"acc": [0.0, 0.05], "acc_stderr": [0.001, 0.001]},
        "arc_easy": {"acc": [0.3, 0.4], "acc_stderr": [0.01, 0.01], "acc_norm": [0.2, 0.9]},
        "mc_taco": {"em": [0.1, 0.12], "f1": [0.3, 0.33]},
    }  # fmt: skip
    path = tmp_path / "tr0x-1B3-made-up-checkpoints_agg.json"
    tokens = [10_044_178_432, 112_280_338_432]
    path.write_text(
        json.dumps({"tokens": tokens, "checkpoints": [19500, 117000], "results": results})
    )
    return path


@pytest.fixture
def ours(tmp_path):
    path = tmp_path / "ours.json"
    results = {
        "sst2": {"acc": 0.625, "acc_stderr": 0.02},
        "lambada_openai": {"perplexity": 30.0, "perplexity_stderr": 1.5, "acc": 0.5},
        "triviaqa": {"exact_match": 0.15, "exact_match_stderr": 0.002},
        "wikitext": {"word_perplexity": 33.25},
    }
    path.write_text(json.dumps({"checkpoint": "x", "results": results}))
    return path


def test_both_kinds_in_one_table(command, ours, published):
    code, out, err = command(evaluate, f"--beside={ours}", f"--beside={published}")
    assert (code, err) == (0, "")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()]
    assert rows[0] == ["task", "metric", "ours", "tr0x-1B3-made-up, 112B tokens"]
    assert rows[2:] == [
        ["sst2", "acc", "62.50% ± 2.00%", "75.00% ± 1.25%"],
        ["lambada_openai", "acc", "50.00%", "25.00% ± 1.00%"],
        ["triviaqa", "exact_match / acc", "15.00% ± 0.20%", "5.00% ± 0.10%"],
        ["wikitext", "word_perplexity", "33.2500", "-"],
        ["arc_easy", "acc", "-", "40.00% ± 1.00%"],
        ["mc_taco", "em", "-", "12.00%"],
        ["mean of 3 tasks", "", "42.50%", "35.00%"],
    ]
    assert len({len(line) for line in out.splitlines()}) == 1


def test_the_mean_is_of_accuracies():
    columns = [
        Results(n, {"boolq": {"acc": x}, "copa": {"acc": x}, "mc_taco": {"em": 1.0}})
        for n, x in (("a", 0.5), ("b", 0.25))
    ]
    assert (
        markdown(columns).splitlines()[-1].split()
        == "| mean of 2 tasks | | 50.00% | 25.00% |".split()
    )


def test_a_group_is_not_in_the_mean(tmp_path):
    path = tmp_path / "ours.json"
    results = {name: {"acc": x} for name, x in (("blimp", 0.9), ("boolq", 0.5), ("copa", 0.25))}
    path.write_text(json.dumps({"results": results, "groups": ["blimp"]}))
    *rows, mean = markdown([read_results(path), Results("b", results)]).splitlines()
    assert any("blimp" in row and "90.00%" in row for row in rows)
    assert mean.split() == "| mean of 2 tasks | | 37.50% | 37.50% |".split()


def test_one_task_has_no_mean():
    assert "mean" not in markdown([Results("a", {"boolq": {"acc": 0.5}})])


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "there is no"),
        ("{", "is no JSON"),
        ("[1]", "holds no results"),
        ('{"step": 3}', "holds no results"),
        ('{"results": {}, "groups": 3}', "holds no results"),
        ('{"tokens": [], "results": {}}', "holds no results"),
        ('{"tokens": [1], "results": {"boolq": {"acc": []}}}', "holds no results"),
    ],
)
def test_files_that_hold_no_results(tmp_path, text, message):
    path = tmp_path / "file.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BadInput, match=message):
        read_results(path)


def test_the_preset():
    names = expand("bigscience27")
    assert len(names) == len(set(names)) == len(BIGSCIENCE_27) == 27
    assert expand("piqa, bigscience27,mine") == ["piqa", *[n for n in names if n != "piqa"], "mine"]
    with pytest.raises(BadInput, match="names no task; presets: bigscience27"):
        expand(" , ")
