"""Training that goes on from an imported BLOOM."""

import json
import shutil
import subprocess
import sys

import hf_folders
import numpy as np
import pytest
import tiny_run

from bloomjax import import_hf
from bloomjax.errors import BadInput

SHAPE = dict(vocab_size=320, emb_dim=32, num_layers=2, num_heads=4)


def do_import(source, output, vocabulary=None):
    if vocabulary:
        shutil.copy(vocabulary.path, source / "tokenizer.model")
    with pytest.raises(SystemExit) as end:
        import_hf.main(["import_hf", f"--input={source}", f"--output={output}"])
    assert end.value.code == 0


@pytest.fixture
def source(tmp_path):
    """A random BLOOM of the shape of tiny_run's."""
    config = hf_folders.config(
        vocab_size=SHAPE["vocab_size"], hidden_size=SHAPE["emb_dim"], n_layer=SHAPE["num_layers"],
        n_head=SHAPE["num_heads"],
    )  # fmt: skip
    small = {name: 0.1 * x for name, x in hf_folders.random_tensors(**SHAPE).items()}
    return hf_folders.write(tmp_path / "hf", small, config)


def tokens_of_step_1(text):
    """The batch, as an independent count of the same samples."""
    arguments = tiny_run.arguments(text, text.folder / "unused")
    data = arguments["train_data"].open()
    mesh = arguments["mesh"].build()
    batch = data.batch(1, arguments["batch_schedule"], mesh, lambda num_samples: num_samples)
    return np.asarray(batch["tokens"])


def float32_run(text, model_dir, **changes):
    model = tiny_run.tiny_model(dtype="float32")
    return tiny_run.run(text, model_dir, model=model, **changes)


@pytest.mark.filterwarnings("ignore")  # of torch and transformers
def test_the_first_loss_is_that_of_transformers(tiny_text, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import hf_reference

    theirs = hf_reference.random_bloom(num_heads=4, head_dim=8, num_layers=2, vocab_size=320)
    theirs.save_pretrained(tmp_path / "hf")
    do_import(tmp_path / "hf", tmp_path / "run", tiny_text.vocabulary)
    assert float32_run(tiny_text, tmp_path / "run", train_steps=2) == 0
    found = tiny_run.losses(tmp_path / "run")[1]
    tokens = torch.tensor(tokens_of_step_1(tiny_text).astype(np.int64))
    with torch.no_grad():
        loss = float(theirs(tokens, labels=tokens).loss)
    assert transformers.__version__ and loss > 5
    assert abs(found - loss) <= 1e-4, (found, loss)


@pytest.mark.slow
def test_on_any_mesh_and_after_a_stop(source, tiny_text, tmp_path, capsys):
    """The run starts from the import, and the second start from its own checkpoint."""
    do_import(source, tmp_path / "run", tiny_text.vocabulary)
    shutil.copytree(tmp_path / "run", tmp_path / "eight")
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "run", whole)
    capsys.readouterr()
    assert float32_run(tiny_text, tmp_path / "run", train_steps=10) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'run'}: starts from {source}, 10 steps in all" in out
    assert float32_run(tiny_text, tmp_path / "run", train_steps=20) == 0
    assert f"{tmp_path / 'run'}: goes on after step 10" in capsys.readouterr().out
    assert float32_run(tiny_text, whole, train_steps=20) == 0
    assert tiny_run.losses(tmp_path / "run") == tiny_run.losses(whole)
    assert tiny_run.fingerprints(tmp_path / "run", 20) == tiny_run.fingerprints(whole, 20)
    mesh = tiny_run.FirstDevices(2, 2, 2, num=8)
    assert float32_run(tiny_text, tmp_path / "eight", train_steps=10, mesh=mesh) == 0
    eight, one = tiny_run.losses(tmp_path / "eight"), tiny_run.losses(whole)
    np.testing.assert_allclose([eight[s] for s in eight], [one[s] for s in eight], rtol=1e-5)
    # Without the import, the first loss is another one.
    assert float32_run(tiny_text, tmp_path / "anew", train_steps=1) == 0
    assert abs(tiny_run.losses(tmp_path / "anew")[1] - one[1]) > 1e-3


def test_a_second_start_before_the_first_checkpoint(source, tiny_text, tmp_path):
    """What a start left that died before it saved is set aside, and the import is taken again."""
    do_import(source, tmp_path / "run", tiny_text.vocabulary)
    (tmp_path / "run" / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "loss": 9.0}) + "\n" for step in range(3))
    )
    assert float32_run(tiny_text, tmp_path / "run", train_steps=2) == 0
    assert [r["step"] for r in tiny_run.records(tmp_path / "run")] == [0, 1, 2]
    assert len((tmp_path / "run" / "metrics.superseded.jsonl").read_text().splitlines()) == 3


def test_what_does_not_fit_the_import_is_refused(source, tiny_text, tmp_path):
    do_import(source, tmp_path / "run", tiny_text.vocabulary)
    before = tiny_run.tree(tmp_path / "run" / "checkpoints")
    with pytest.raises(BadInput, match="holds a run with other model: there num_layers=2, here"):
        model = tiny_run.tiny_model(num_layers=3)
        tiny_run.run(tiny_text, tmp_path / "run", model=model, train_steps=2)
    other = tiny_run.Text(_folder(tmp_path / "other"), seed=7)
    assert other.vocabulary.fingerprint != tiny_text.vocabulary.fingerprint
    with pytest.raises(BadInput, match="with other data: there vocabulary="):
        tiny_run.run(other, tmp_path / "run", train_steps=2)
    assert tiny_run.tree(tmp_path / "run" / "checkpoints") == before


def _folder(path):
    path.mkdir()
    return path


def test_an_import_that_was_damaged_since(source, tiny_text, tmp_path):
    do_import(source, tmp_path / "run", tiny_text.vocabulary)
    state = tmp_path / "run" / "checkpoints" / "0" / "state"
    largest = max(state.rglob("d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 4
    largest.write_bytes(data)
    with pytest.raises(BadInput, match="checkpoints/0 is damaged: "):
        tiny_run.run(tiny_text, tmp_path / "run", train_steps=2)


def test_back_to_the_import_when_all_else_is_damaged(source, tiny_text, tmp_path):
    """The damaged checkpoint is put aside, so that its step can be saved again."""
    do_import(source, tmp_path / "run", tiny_text.vocabulary)
    assert float32_run(tiny_text, tmp_path / "run", train_steps=10) == 0
    state = tmp_path / "run" / "checkpoints" / "10" / "state"
    largest = max(state.rglob("d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 4
    largest.write_bytes(data)
    assert float32_run(tiny_text, tmp_path / "run", train_steps=10) == 0
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"0", "10", "damaged-10"}
    assert float32_run(tiny_text, tmp_path / "run", train_steps=12) == 0
    assert [r["step"] for r in tiny_run.records(tmp_path / "run")] == list(range(13))


def test_without_a_tokenizer(source, tiny_text, tmp_path):
    """Any vocabulary will do: the import knows of none."""
    do_import(source, tmp_path / "run")
    assert float32_run(tiny_text, tmp_path / "run", train_steps=2) == 0
    gin = (tmp_path / "run" / "config.gin").read_text()
    assert "prepare.vocab_size = 320" in gin and "VOCABULARY =" not in gin


@pytest.mark.slow
def test_a_moved_import_does_not_begin_anew(source, tiny_text, tmp_path):
    do_import(source, tmp_path / "run", tiny_text.vocabulary)
    text_dir = tmp_path / "my_text"
    text_dir.mkdir()
    (text_dir / "en.txt").write_text("\n\n".join(["ba ke li mo nu ra se ti " * 20] * 6))
    (tmp_path / "run").rename(tmp_path / "moved")
    command = [
        sys.executable, "-m", "bloomjax.train", f"--gin_file={tmp_path}/moved/config.gin",
        "--gin_file=continue.gin", f"--gin.TEXT_DIR='{text_dir}'", "--gin.SEQUENCE_LENGTH=16",
        "--gin.TRAIN_STEPS=1", "--gin.BATCH_SIZE=8",
    ]  # fmt: skip
    environment = {k: v for k, v in tiny_run.environment().items() if k != "PYTHONPATH"}
    environment["PYTHONPATH"] = str(tiny_run.REPOSITORY)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f"there is no vocabulary {tmp_path}/run/vocabulary/tokenizer.model" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "moved", "my_text"]
    there = [
        *command,
        f"--gin.MODEL_DIR='{tmp_path}/moved'",
        f"--gin.STORE_DIR='{tmp_path}/tokens'",
    ]
    there.append(f"--gin.VOCABULARY='{tmp_path}/moved/vocabulary/tokenizer.model'")
    result = subprocess.run(there, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert f"starts from {source}" in result.stdout


def test_no_checkpoint_where_one_is_needed(tiny_text, tmp_path):
    with pytest.raises(BadInput, match="has no checkpoint to go on from; was it moved"):
        tiny_run.run(tiny_text, tmp_path / "run", train_steps=1, needs_checkpoint=True)
