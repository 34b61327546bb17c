"""tools/show_sample.py: the text of a sample is that of the documents it was made of."""

import importlib.util
import json

import numpy as np
import pytest
import tiny_run

_PATH = tiny_run.REPOSITORY / "tools" / "show_sample.py"
_SPEC = importlib.util.spec_from_file_location("show_sample", _PATH)
assert _SPEC and _SPEC.loader
show_sample = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(show_sample)


@pytest.fixture
def command(tiny_text, capsys, tmp_path):
    """command(*flags): exit code, stdout and stderr with the configuration of tiny_run."""
    *_, gin_file, _ = tiny_run.command(tiny_text, tmp_path / "run")

    def call(*flags):
        with pytest.raises(SystemExit) as end:
            show_sample.main(["show_sample", gin_file, f"--gin.MODEL_DIR='{tmp_path}'", *flags])
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return call


def test_the_text_is_that_of_the_documents(command, tiny_text):
    num_checked = 0
    for sample in range(0, 200, 7):
        found = json.loads(command(f"--sample={sample}", "--json")[1])
        first, last = found["documents"][0], found["documents"][-1]
        texts = tiny_text.documents[found["language"]]
        start, stop = found["tokens"]
        assert stop - start == tiny_run.SEQUENCE_LENGTH + 1
        # From the documents themselves: which tokens lie where.
        ends = np.cumsum([len(tiny_text.vocabulary.encode(text)) + 1 for text in texts])
        assert first["document"] == int(np.sum(ends <= start))
        assert last["document"] == int(np.sum(ends <= stop - 1))
        for each in found["documents"]:
            text = each["text"].replace("\ufffd", "")
            assert text in texts[each["document"]] or text == ""
            num_checked += len(text) > 5
    assert num_checked > 20


def test_a_step_has_its_samples(command):
    lines = command("--step=3")[1].splitlines()
    assert [int(line.split()[1]) for line in lines] == list(range(16, 24))
    one = command("--sample=16")[1].splitlines()
    assert one[0].split("  of ")[0] == "  ".join(lines[0].split("  ")[:5])
    assert one[1].startswith("--- document ")


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "give one of --sample=K"),
        (["--sample=1", "--step=1"], "give one of --sample=K"),
        (["--sample=-1"], "numbered from 0"),
        (["--step=0"], "numbered from 1"),
        (["--sample=3000000000"], "sample numbers must lie in"),
        (["--sample=1", "--gin.STORE_DIR='none'"], "none"),
    ],
)
def test_what_cannot_be_shown(command, flags, message):
    code, out, err = command(*flags)
    assert code == 1 and out == "" and message in err and err.count("\n") == 1
