"""`python -m bloomjax.generate`; test_train.py runs it as a command."""

import shutil

import numpy as np
import pytest
import tiny_run

from bloomjax import generate


@pytest.fixture(scope="module")
def model_dir(undisturbed, tiny_text, tmp_path_factory):
    """The run with the config.gin that a command would have written."""
    folder = tmp_path_factory.mktemp("generate") / "run"
    shutil.copytree(undisturbed, folder)
    gin = tiny_run.GIN.replace("import for_gin\n", "").replace("train.mesh = @FirstDevices()\n", "")
    (folder / "config.gin").write_text(gin)
    return folder


@pytest.fixture
def command(capsys):
    """command(*flags): exit code, stdout and stderr of `generate` in this process."""

    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            generate.main(["generate", *map(str, arguments)])
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return call


def test_prompts_are_continued(command, model_dir, tmp_path, tiny_text):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("ba ke\n\nαβγε δι\n")
    code, out, err = command(
        f"--checkpoint={model_dir}", "--prompt=до ре", f"--prompt_file={prompts}", "--max_length=12"
    )
    assert code == 0 and err == ""
    lines = out.splitlines()
    for line, prompt in zip(lines, ("до ре", "ba ke", "αβγε δι"), strict=True):
        assert line.startswith(prompt) and len(line) > len(prompt)
        assert len(tiny_text.vocabulary.encode(line)) <= 12
    # A prompt alone and in company: padding moves nothing.
    alone = command(f"--checkpoint={model_dir}", "--prompt=ba ke", "--max_length=12")[1]
    assert alone.splitlines() == [lines[1]]


def test_the_seed_decides(command, model_dir):
    sample = (f"--checkpoint={model_dir}", "--prompt=ba", "--temperature=1.5", "--max_length=12")
    one, again, other = (command(*sample, f"--seed={seed}")[1] for seed in (1, 1, 2))
    assert one == again != other


def test_an_older_step(command, model_dir):
    code, _, err = command(
        f"--checkpoint={model_dir}", "--prompt=ba ke", "--step=10", "--max_length=12"
    )
    assert code == 1 and "no checkpoint of step 10 in" in err and "there are: 20, 30, 40" in err
    sample = ("--prompt=ba", "--temperature=1.5", "--max_length=12", "--seed=1")
    newest, older = (command(f"--checkpoint={model_dir}", f"--step={s}", *sample) for s in (40, 20))
    assert newest[0] == older[0] == 0 and newest[1] != older[1]


def test_beyond_the_training_sequence_there_is_a_warning(command, model_dir):
    code, out, err = command(f"--checkpoint={model_dir}", "--prompt=ba", "--max_length=20")
    assert code == 0 and out.startswith("ba")
    assert "--max_length=20 is beyond the 16 tokens of training" in err and err.count("\n") == 1


def test_mistakes_are_one_line(command, model_dir, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n  \n")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    no_steps = tmp_path / "no_steps"
    no_steps.mkdir()
    shutil.copy(model_dir / "config.gin", no_steps)
    two = tmp_path / "two"
    shutil.copytree(model_dir, two)
    shutil.copy(two / "vocabulary" / "v.model", two / "vocabulary" / "w.model")
    here = f"--checkpoint={model_dir}"
    mistakes = [
        ((here, "--prompt=" + "ba " * 30), "leaves no room within --max_length=16"),
        (
            (here, "--prompt=ba ke", "--max_length=2"),
            "tokens, which leaves no room within --max_length=2",
        ),
        ((here, "--prompt="), "a prompt is empty"),
        ((here,), "give --prompt=TEXT or --prompt_file=FILE"),
        ((here, f"--prompt_file={empty}"), "give --prompt=TEXT or --prompt_file=FILE"),
        ((here, f"--prompt_file={tmp_path}/no.txt"), "no.txt cannot be read"),
        ((here, f"--prompt_file={binary}"), "binary.txt cannot be read"),
        (("--prompt=ba",), "give --checkpoint=MODEL_DIR"),
        (
            (f"--checkpoint={tmp_path}", "--prompt=ba"),
            "is no MODEL_DIR of a run: it has no config.gin",
        ),
        ((f"--checkpoint={tmp_path}/none", "--prompt=ba"), "is no MODEL_DIR of a run"),
        ((f"--checkpoint={no_steps}", "--prompt=ba"), "no checkpoint in"),
        ((f"--checkpoint={two}", "--prompt=ba"), "vocabulary should hold one file, it holds 2"),
        ((here, "--prompt=ba", "--step=33"), "no checkpoint of step 33"),
        ((here, "--prompt=ba", "--top_p=0"), "0 < top_p <= 1"),
        ((here, "--prompt=ba", "--temperature=-1"), "temperature >= 0"),
        ((here, "--prompt=ba", "--max_length=0"), "--max_length=0"),
        ((here, "--prompt=ba", "--temprature=1"), "temprature"),
    ]
    for arguments, message in mistakes:
        code, out, err = command(*arguments)
        assert code == 1 and out == "" and message in err, (arguments, err)
        assert err.count("\n") == 1 and err.startswith("bloomjax: "), err
    assert not (no_steps / "checkpoints").exists()


def test_a_damaged_checkpoint(command, model_dir, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(model_dir, damaged)
    for path in (damaged / "checkpoints" / "40" / "state" / "ocdbt.process_0" / "d").iterdir():
        raw = np.fromfile(path, np.uint8)
        raw[::64] ^= 16
        raw.tofile(path)
    before = tiny_run.tree(damaged)
    code, out, err = command(f"--checkpoint={damaged}", "--prompt=ba", "--max_length=12")
    assert code == 1 and out == "" and "checkpoints/40 is damaged" in err
    assert err.count("\n") == 1
    position = damaged / "checkpoints" / "30" / "position" / "metadata"
    position.write_text(position.read_text().replace('"step": 30', '"step": 31'))
    code, _, err = command(f"--checkpoint={damaged}", "--prompt=ba", "--step=30", "--max_length=12")
    assert code == 1 and "checkpoints/30 is damaged" in err
    position.write_text(before["checkpoints/30/position/metadata"].decode())
    assert tiny_run.tree(damaged) == before
