"""`evaluate --tasks` against lm-evaluation-harness's own `hf` model; without the harness only what needs none."""

import importlib.util
import json
import os
import random
import shutil
from unittest import mock

import pytest
import tiny_run

from bloomjax import evaluate, export, harness, import_hf, lm_eval_model
from bloomjax.lm_eval_model import language_model
from bloomjax.scoring import Scorer

pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness, datasets, torch
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs the extra `eval`"
)
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")


@pytest.fixture(scope="module")
def documents(tiny_text):
    """Sentences of 1 to 40 words with two to four ragged endings, which are in the text or in another order."""
    rng = random.Random(0)
    found = []
    for texts in tiny_text.documents.values():
        for text in texts[:8]:
            words = text.split()
            cut = rng.choice([1, 3, 8, len(words) - 2])
            right = " " + " ".join(words[cut : cut + rng.randint(1, 2)])
            wrong = [
                " " + " ".join(rng.choices(words, k=rng.randint(1, 2)))
                for _ in range(rng.randint(1, 3))
            ]
            found.append(
                {"start": " ".join(words[:cut]), "endings": [right, *wrong], "right": 0, "text": text}
            )  # fmt: skip
    return found


@pytest.fixture(scope="module")
def task_folder(documents, tmp_path_factory):
    """One task of each kind on `documents`."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "documents.jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents))
    kinds = {
        "made_up_choice": 'output_type: multiple_choice\ndoc_to_text: "{{start}}"\n'
        'doc_to_choice: "{{endings}}"\ndoc_to_target: right\ntarget_delimiter: ""\n'
        "metric_list:\n  - metric: acc\n  - metric: acc_norm\n",
        "made_up_text": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: bits_per_byte\n",
        "made_up_answer": 'output_type: generate_until\ndoc_to_text: "{{start}}"\ndoc_to_target: "{{endings[0]}}"\n'
        'generation_kwargs:\n  until: [" "]\n  max_gen_toks: 6\nmetric_list:\n  - metric: exact_match\n',
    }  # fmt: skip
    for name, text in kinds.items():
        data = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/documents.jsonl\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{data}test_split: test\n{text}")
    (folder / "absent.yaml").write_text(
        "task: absent_data\ndataset_path: nobody/has_this\ntest_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{start}}"\ndoc_to_choice: "{{endings}}"\ndoc_to_target: right\n'
    )
    return folder


@pytest.fixture(scope="module")
def checkpoint(undisturbed, tmp_path_factory):
    """The run with its config.gin, which its other users pass as objects."""
    model_dir = tmp_path_factory.mktemp("checkpoint") / "run"
    shutil.copytree(undisturbed, model_dir)
    places = f"STORE_DIR = 'none'\nVOCABULARY = 'none'\nMODEL_DIR = '{model_dir}'\n"
    (model_dir / "config.gin").write_text(tiny_run.GIN + places)
    return model_dir


@pytest.fixture(scope="module")
def hf_folder(checkpoint):
    folder = checkpoint.parent / "hf"
    with pytest.raises(SystemExit) as end:
        export.main(["export", f"--checkpoint={checkpoint}", f"--output={folder}"])
    assert not end.value.code
    return folder


@pytest.fixture
def open_ours(checkpoint, capsys):
    """open_ours(*flags): the language model that `evaluate` would make of the checkpoint."""

    def call(*flags, checkpoint=checkpoint):
        found = []

        def keep(_):
            trained = evaluate.open_model(checkpoint)
            assert trained.vocabulary is not None
            found.append(language_model(evaluate.open_scorer(trained), trained.vocabulary))

        arguments = [f"--checkpoint={checkpoint}", "--tasks=x", "--dtype=float32", *flags]
        with mock.patch.object(evaluate, "evaluate_tasks", keep), pytest.raises(SystemExit) as end:
            evaluate.main(["evaluate", *arguments])
        assert not end.value.code, capsys.readouterr().err
        return found[0]

    return call


def requests_of(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


@needs_harness
@needs_torch
@pytest.mark.slow
def test_ours_is_their_hf_model(documents, open_ours, hf_folder):
    """Log-likelihoods, also rolling, and greedy text: of ragged requests, empty contexts, spaces, and more tokens than
    the 16 that the model reads."""
    from lm_eval.models.huggingface import HFLM

    hf: dict = {"pretrained": str(hf_folder), "dtype": "float32", "device": "cpu", "batch_size": 3}
    theirs, ours = HFLM(**hf), open_ours()
    assert theirs.max_length == ours.max_length == tiny_run.SEQUENCE_LENGTH
    assert theirs.prefix_token_id == ours.prefix_token_id
    options = [{"until": [" "], "max_gen_toks": 9}, {"until": ["\n"], "max_gen_toks": 5}]
    prompts = [(doc["start"], options[i % 2]) for i, doc in enumerate(documents)]
    requests = requests_of("generate_until", prompts)
    texts = ours.generate_until(requests, disable_tqdm=True)
    assert texts == theirs.generate_until(requests, disable_tqdm=True)
    assert len(set(texts)) > 2

    pairs = [(doc["start"], ending) for doc in documents for ending in doc["endings"]]
    pairs += [(prompt, text) for (prompt, _), text in zip(prompts, texts, strict=True) if text]
    pairs += [("", doc["endings"][0].strip()) for doc in documents[:3]]
    pairs += [(doc["start"] + " ", doc["endings"][0].strip()) for doc in documents[:3]]
    requests = requests_of("loglikelihood", pairs)
    scores = ours.loglikelihood(requests, disable_tqdm=True)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    lengths = {len(theirs.tok_encode("".join(pair))) for pair in pairs}
    assert min(lengths) < 8 and max(lengths) > 3 * ours.max_length
    assert max(abs(a[0] - b[0]) for a, b in zip(scores, expected, strict=True)) < 1e-4
    assert [a[1] for a in scores] == [b[1] for b in expected]
    assert any(a[1] for a in scores)

    requests = requests_of("loglikelihood_rolling", [(doc["text"],) for doc in documents])
    rolling = ours.loglikelihood_rolling(requests, disable_tqdm=True)
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert rolling == pytest.approx(expected, abs=1e-3, rel=1e-6)


@needs_harness
def test_contexts_of_a_run_with_prefixes(open_ours, checkpoint, tmp_path, documents):
    """They are seen as a whole; a text without a prompt is as causal as ever."""
    other = tmp_path / "prefix"
    shutil.copytree(checkpoint, other)
    with (other / "config.gin").open("a") as file:
        file.write("TrainData.objective = @PrefixLM()\n")
    causal, prefix = open_ours(), open_ours(checkpoint=other)
    doc = max(documents, key=lambda doc: len(doc["text"]))
    pair, text = (doc["start"], doc["endings"][0]), (doc["text"],)
    scores, texts = [], []
    for ours in (causal, prefix):
        ((score, _),) = ours.loglikelihood(requests_of("loglikelihood", [pair]), disable_tqdm=True)
        scores.append(score)
        texts += ours.loglikelihood_rolling(
            requests_of("loglikelihood_rolling", [text]), disable_tqdm=True
        )
    assert abs(scores[0] - scores[1]) > 1e-3 and texts[0] == texts[1]
    with mock.patch.object(lm_eval_model, "generate_until", return_value=[[5]]) as generate_until:
        options = {"until": ["\n"], "max_gen_toks": 5}
        prefix.generate_until(requests_of("generate_until", [("a", options)]), disable_tqdm=True)
    assert generate_until.call_args.kwargs["sees_whole_prompt"] is True


@needs_harness
def test_batches_of_generation(tiny_text, mesh_of):
    """As many prompts as fit on all devices; none samples as another; None is no option."""
    scorer = Scorer(tiny_run.tiny_model(), {}, mesh_of(2, 2, 2), max_length=16, batch_tokens=20)
    ours = language_model(scorer, tiny_text.vocabulary)
    options = {"do_sample": True, "temperature": 0.5, "top_k": None, "top_p": None, "until": None}
    requests = requests_of(
        "generate_until", [("of two tokens", options | {"max_gen_toks": 8})] * 20
    )

    def generate(model, params, mesh, prompts, is_done, **kwargs):
        calls.append((len(prompts), kwargs))
        return [[5]] * len(prompts)

    calls = []
    two = mock.patch.object(ours, "_encode", lambda text: [7, 8])
    with two, mock.patch.object(lm_eval_model, "generate_until", generate):
        assert len(ours.generate_until(requests, disable_tqdm=True)) == 20
        ours.generate_until(requests[:1], disable_tqdm=True)
    assert [num for num, _ in calls] == [8, 8, 4, 1]  # 80 tokens in 4 shards
    assert [kwargs["seed"] for _, kwargs in calls] == [0, 1, 2, 3]
    sampling = [
        {name: kwargs[name] for name in ("temperature", "top_k", "top_p")} for _, kwargs in calls
    ]
    assert sampling == 4 * [{"temperature": 0.5, "top_k": 0, "top_p": 1.0}]


@needs_harness
@pytest.mark.slow
def test_a_group_is_no_task_of_the_mean(command, checkpoint, task_folder, tmp_path):
    (task_folder / "group.yaml").write_text(
        "group: made_up_group\ntask: [made_up_choice, made_up_answer]\naggregate_metric_list:\n  - metric: acc\n"
    )
    output = tmp_path / "ours.json"
    code, out, err = command(
        evaluate, f"--checkpoint={checkpoint}", "--tasks=made_up_group", "--limit=2",
        f"--include_path={task_folder}", f"--output={output}",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(output.read_text())["groups"] == ["made_up_group"]
    assert "made_up_group" in out and "mean of 2 tasks" in out


@needs_harness
@pytest.mark.slow
def test_one_table_from_run_export_and_import(
    command, checkpoint, hf_folder, task_folder, tmp_path
):
    again = tmp_path / "again"
    assert command(import_hf, f"--input={hf_folder}", f"--output={again}")[0] == 0
    flags = ("--tasks=made_up_choice,made_up_text,made_up_answer", f"--include_path={task_folder}")
    tables, results = [], []
    for number, path in enumerate((checkpoint, hf_folder, again)):
        output = tmp_path / f"{number}.json"
        code, out, err = command(
            evaluate, f"--checkpoint={path}", *flags, f"--output={output}", "--dtype=float32"
        )
        assert code == 0, err
        headline, *table = out.splitlines()
        assert headline.startswith(f"{path}") and "72 documents" in headline
        tables.append(table)
        results.append(json.loads(output.read_text()))
    assert tables[0] == tables[1] == tables[2]
    assert [line.split("|")[1].strip() for line in tables[0]][2:5] == [
        "made_up_choice", "made_up_text", "made_up_answer",
    ]  # fmt: skip
    assert results[1]["results"] == results[2]["results"]  # on eight devices; the run's was one
    assert results[0]["step"] == 40 and results[1]["step"] is None
    assert 0.3 < results[0]["results"]["made_up_choice"]["acc"] <= 1
    # Two columns, from the file that was written.
    code, out, _ = command(
        evaluate, f"--checkpoint={again}", *flags, "--limit=2", f"--beside={tmp_path}/0.json"
    )
    header = [cell.strip() for cell in out.splitlines()[1].strip("|").split("|")]
    assert code == 0 and header == ["task", "metric", "this model", "0"]


@needs_harness
def test_solved_examples_and_json(command, checkpoint, task_folder):
    flags = (
        f"--checkpoint={checkpoint}",
        "--tasks=made_up_choice",
        f"--include_path={task_folder}",
    )
    code, out, _ = command(evaluate, *flags, "--num_fewshot=2", "--limit=3", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["num_documents"] == {"made_up_choice": 3}
    assert found["num_fewshot"] == {"made_up_choice": 2}


@needs_harness
def test_data_that_is_not_there(command, checkpoint, task_folder):
    names = "--tasks=absent_data,made_up_choice"
    flags = (f"--checkpoint={checkpoint}", f"--include_path={task_folder}", names)
    code, out, err = command(evaluate, *flags)
    (line,) = [line for line in err.splitlines() if line.startswith("bloomjax: ")]
    assert code == 1 and out == ""
    assert "the data of absent_data is not on this disk" in line
    assert "lm_eval --model dummy --limit 1 --tasks absent_data;" in line
    code, out, _ = command(evaluate, *flags, "--skip_missing", "--limit=2")
    assert code == 0 and "left out: the data of absent_data" in out and "made_up_choice" in out


@needs_harness
@pytest.mark.slow
def test_the_preset_names_tasks_of_the_harness():
    from lm_eval.tasks import TaskManager

    from bloomjax.task_presets import BIGSCIENCE_27

    known = set(TaskManager().all_tasks)
    assert [task.current for task in BIGSCIENCE_27 if task.current not in known] == []


@needs_harness
@pytest.mark.parametrize(
    "flags, message",
    [
        pytest.param(
            ["--tasks=made_up_choise"], "no task 'made_up_choise' in lm-evaluation-harness",
            marks=pytest.mark.slow,
        ),
        (["--tasks=made_up_choice", "--include_path=nowhere"], "nowhere is no folder"),
        (["--tasks=made_up_answer", "--max_length=6"], "a task generates up to 6 tokens"),
    ],
)  # fmt: skip
def test_what_the_harness_cannot_do(command, checkpoint, task_folder, flags, message):
    flags = [f"--checkpoint={checkpoint}", f"--include_path={task_folder}", *flags]
    code, out, err = command(evaluate, *flags)
    assert (code, out) == (1, "") and message in err.splitlines()[-1]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--tasks=piqa"], "--tasks needs --checkpoint"),
        (["--tasks=", "--checkpoint=x"], "names no task"),
        (["--output=x.json", "--checkpoint=x"], "belong to --tasks"),
        (["--beside=nowhere.json"], "there is no nowhere.json"),
    ],
)
def test_flags_that_do_not_fit(command, flags, message):
    code, out, err = command(evaluate, *flags)
    assert (code, out) == (1, "") and message in err and err.count("\n") == 1


def test_without_the_harness(command, checkpoint, monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    code, out, err = command(evaluate, f"--checkpoint={checkpoint}", "--tasks=piqa")
    assert (code, out) == (1, "") and "pip install 'bloomjax[eval]'" in err


def test_the_network_is_asked_for_once(monkeypatch):
    def getaddrinfo(*_):
        raise OSError

    offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    for name in (*offline, "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with mock.patch.dict(os.environ):
        monkeypatch.setattr(harness.socket, "getaddrinfo", lambda *_: [1])
        harness._go_offline_if_there_is_no_network()
        assert "HF_HUB_OFFLINE" not in os.environ
        monkeypatch.setattr(harness.socket, "getaddrinfo", getaddrinfo)
        harness._go_offline_if_there_is_no_network()
        assert os.environ["HF_HUB_OFFLINE"] == os.environ["HF_DATASETS_OFFLINE"] == "1"
