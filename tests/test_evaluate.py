"""`python -m bloomjax.evaluate` says what the run said."""

import json
import shutil

import pytest
import tiny_run

from bloomjax import evaluate, export


@pytest.fixture
def command(undisturbed, tiny_text, capsys, tmp_path):
    """command(*flags): exit code, stdout and stderr of `evaluate` with the configuration of the run."""
    model_dir = shutil.copytree(undisturbed, tmp_path / "run")
    *_, gin_file, model_dir_flag = tiny_run.command(tiny_text, model_dir)
    text = (tiny_text.folder / "run.gin").read_text()
    (model_dir / "config.gin").write_text(text + f"MODEL_DIR = '{model_dir}'\n")

    def call(*flags, by_checkpoint=False):
        named = (
            f"--checkpoint={model_dir}" if by_checkpoint else f"--gin_file={model_dir}/config.gin"
        )
        with pytest.raises(SystemExit) as end:
            evaluate.main(["evaluate", named, *flags])
        out, err = capsys.readouterr()
        return end.value.code, out, err

    assert gin_file.startswith("--gin_file") and model_dir_flag.startswith("--gin.MODEL_DIR")
    return call


def test_the_losses_are_those_of_the_run(command, undisturbed):
    recorded = {r["step"]: r for r in tiny_run.records(undisturbed) if "validation_loss" in r}
    assert recorded.keys() == {0, 20, 40}
    for step in (20, 40):
        code, out, err = command("--json", f"--step={step}")
        assert (code, err) == (0, "")
        found = json.loads(out)
        assert found["step"] == step
        assert found["loss_by_language"] == recorded[step]["loss_by_language"]
        assert found["validation_loss"] == recorded[step]["validation_loss"]


def test_for_a_person(command, undisturbed):
    out = command()[1]
    record = tiny_run.records(undisturbed)[-1]
    assert "step 40: held-out loss in nats a token, bits per byte\n" in out
    for name, loss in record["loss_by_language"].items():
        line = f"{name:<16}{loss:6.3f} {record['bits_per_byte_by_language'][name]:6.3f}"
        assert line in out
    bits = record["validation_bits_per_byte"]
    assert f"all languages: {record['validation_loss']:.3f}\n" in out
    assert out.endswith(f"bits per byte, mean over languages: {bits:.3f}\n")


def test_the_checkpoint_alone_says_the_same(command):
    """With the bindings of flags, and whatever MODEL_DIR its config.gin names: the folder may have moved."""
    one = command("--json", "--gin.BloomConfig.dtype='float32'")
    other = command(
        "--json", "--gin.BloomConfig.dtype='float32'", "--gin.MODEL_DIR='moved'", by_checkpoint=True
    )
    assert other[0] == 0 and other[1] == one[1] != command("--json")[1]


def test_a_hugging_face_folder_with_the_text_of_a_run(command, undisturbed, tmp_path, capsys):
    model_dir, folder = tmp_path / "run", tmp_path / "hf"
    with pytest.raises(SystemExit) as end:
        export.main(["export", f"--checkpoint={model_dir}", f"--output={folder}"])
    assert not end.value.code
    capsys.readouterr()
    code, out, err = command("--json", f"--checkpoint={folder}")
    assert (code, err) == (0, "")
    found, record = json.loads(out), tiny_run.records(undisturbed)[-1]
    assert found["step"] is None
    for name in ("loss_by_language", "bits_per_byte_by_language"):
        assert found[name] == pytest.approx(record[name], rel=1e-6)
    assert command(f"--checkpoint={folder}")[1].startswith(f"{folder}: held-out loss")
    with pytest.raises(SystemExit) as end:
        evaluate.main(["evaluate", f"--checkpoint={folder}"])
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (1, "") and err.count("\n") == 1
    assert "has no held-out text: --gin_file=MODEL_DIR/config.gin takes that of a run" in err


def test_on_another_mesh_in_float32(command):
    one = json.loads(command("--json", "--gin.BloomConfig.dtype='float32'")[1])
    flags = (
        "--gin.FirstDevices.num=8", "--gin.FirstDevices.fsdp=2", "--gin.FirstDevices.tensor=2",
        "--gin.FirstDevices.data=2",
    )  # fmt: skip
    eight = json.loads(command("--json", "--gin.BloomConfig.dtype='float32'", *flags)[1])
    assert eight["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-6)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--step=7"], "no checkpoint of step 7"),
        (["--gin.NUM_LAYERS=3"], "has other arrays"),
        (["--gin.STORE_DIR='none'"], "none"),
        (["--gin.MODEL_DIR='none'"], "none is no MODEL_DIR of a run"),
    ],
)
def test_what_does_not_fit(command, flags, message):
    code, out, err = command(*flags)
    assert code == 1 and out == "" and message in err and err.count("\n") == 1
