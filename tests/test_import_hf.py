"""`python -m bloomjax.import_hf`: released layouts, to the bit; every damaged folder ends in one line."""

import json
import os
import random
import shutil

import hf_folders
import numpy as np
import pytest
from safetensors.numpy import save_file

from bloomjax import export, import_hf, model_dir
from bloomjax.metrics import lock_model_dir
from bloomjax.vocabulary import train_byte_level_bpe


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory):
    texts = ["the cat sat on the mat " * 20, "देखो मेरी बिल्ली " * 20]
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    return train_byte_level_bpe(texts, path, 270).path


def imported(folder, output, command, *flags):
    code, out, err = command(import_hf, f"--input={folder}", f"--output={output}", *flags)
    assert (code, err) == (0, ""), err
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_in_and_out_to_the_bit(tmp_path, command, dtype):
    tensors = hf_folders.random_tensors(dtype=dtype)
    source = hf_folders.write(tmp_path / "in", tensors, hf_folders.config())
    out = imported(source, tmp_path / "run", command)
    assert "22,920 parameters" in out and "continue.gin" in out
    code, _, err = command(
        export,
        f"--checkpoint={tmp_path / 'run'}",
        f"--output={tmp_path / 'out'}",
        f"--dtype={dtype}",
    )
    assert (code, err) == (0, "")
    hf_folders.assert_same(hf_folders.read(tmp_path / "out"), tensors)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize(
    "prefix, files, with_index, config",
    [
        ("", None, False, hf_folders.config),
        ("", "layers", True, hf_folders.legacy_config),  # as the released 176B
        ("", "layers", False, hf_folders.legacy_config),
        ("transformer.", "layers", True, hf_folders.config),
    ],
)
def test_released_layouts(tmp_path, command, prefix, files, with_index, config):
    tensors = hf_folders.random_tensors()
    shards = hf_folders.layer_files(tensors) if files else None
    assert not files or len(shards) == 5
    source = hf_folders.write(
        tmp_path / "in", tensors, config(), prefix=prefix, files=shards, with_index=with_index
    )
    imported(source, tmp_path / "run", command)
    command(export, f"--checkpoint={tmp_path / 'run'}", f"--output={tmp_path / 'out'}")
    hf_folders.assert_same(hf_folders.read(tmp_path / "out"), tensors)


def test_links_into_a_cache_are_followed(tmp_path, command):
    blobs = hf_folders.write(tmp_path / "blobs", hf_folders.random_tensors(), hf_folders.config())
    (tmp_path / "snapshot").mkdir()
    for file in blobs.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(f"../blobs/{file.name}")
    imported(tmp_path / "snapshot", tmp_path / "run", command)


def test_a_stored_head_that_is_the_embedding(tmp_path, command):
    tensors = hf_folders.random_tensors()
    head = tensors | {"lm_head.weight": tensors["word_embeddings.weight"]}
    source = hf_folders.write(tmp_path / "in", head, hf_folders.config(), prefix="")
    imported(source, tmp_path / "run", command)


def test_float64_is_rounded_and_said(tmp_path, command):
    tensors = hf_folders.random_tensors(dtype="float64")
    source = hf_folders.write(tmp_path / "in", tensors, hf_folders.config())
    assert "float64 was rounded to float32" in imported(source, tmp_path / "run", command)
    command(export, f"--checkpoint={tmp_path / 'run'}", f"--output={tmp_path / 'out'}")
    rounded = {name: x.astype(np.float32) for name, x in tensors.items()}
    hf_folders.assert_same(hf_folders.read(tmp_path / "out"), rounded)


def test_each_layer_is_where_it_belongs(tmp_path, command):
    tensors = hf_folders.random_tensors()
    source = hf_folders.write(tmp_path / "in", tensors, hf_folders.config())
    imported(source, tmp_path / "run", command)
    trained = model_dir.open_model_dir(tmp_path / "run")
    params = trained.read_params()
    assert trained.step == 0 and trained.sequence_length == 32 and trained.vocabulary is None
    kernel = params["layers"]["mlp_in"]["kernel"]
    np.testing.assert_array_equal(kernel[2], tensors["h.2.mlp.dense_h_to_4h.weight"].T)
    np.testing.assert_array_equal(
        params["layers"]["attention_norm"]["scale"][1], tensors["h.1.input_layernorm.weight"]
    )


def test_the_tokenizer_comes_along_and_leaves_unchanged(tmp_path, command, tokenizer_json):
    tensors = hf_folders.random_tensors(vocab_size=280)
    source = hf_folders.write(tmp_path / "in", tensors, hf_folders.config(vocab_size=280))
    shutil.copy(tokenizer_json, source / "tokenizer.json")
    out = imported(source, tmp_path / "run", command)
    assert "vocabulary: tokenizer.json, 270 tokens" in out
    command(export, f"--checkpoint={tmp_path / 'run'}", f"--output={tmp_path / 'out'}")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == tokenizer_json.read_bytes()
    again = imported(tmp_path / "out", tmp_path / "again", command)
    assert "vocabulary: tokenizer.json, 270 tokens" in again


def test_an_existing_output_is_kept_or_swapped_whole(tmp_path, command):
    source = hf_folders.write(tmp_path / "in", hf_folders.random_tensors(), hf_folders.config())
    output = tmp_path / "run"
    imported(source, output, command)
    (output / "mine").write_text("a note")
    before = sorted(output.rglob("*"))
    flags = f"--input={source}", f"--output={output}"
    code, _, err = command(import_hf, *flags)
    assert code == 1 and err == f"bloomjax: {output} exists already; --overwrite replaces it\n"
    assert sorted(output.rglob("*")) == before
    assert command(import_hf, *flags, "--overwrite")[0] == 0
    assert not (output / "mine").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "run"]


def test_overwrite_replaces_nothing_else(tmp_path, command):
    source = hf_folders.write(tmp_path / "in", hf_folders.random_tensors(), hf_folders.config())
    before = sorted(source.iterdir())
    for output, message in [(source, "which is to be read"), (tmp_path, "which is to be read")]:
        code, _, err = command(import_hf, f"--input={source}", f"--output={output}", "--overwrite")
        assert code == 1 and message in err, err
    assert sorted(source.iterdir()) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("")
    flags = f"--input={source}", f"--output={tmp_path / 'mine'}", "--overwrite"
    code, _, err = command(import_hf, *flags)
    assert code == 1 and "is not replaced: it has no config.gin and no checkpoints" in err
    # A run in the folder holds its lock.
    imported(source, tmp_path / "run", command)
    lock = lock_model_dir(tmp_path / "run")
    flags = f"--input={source}", f"--output={tmp_path / 'run'}", "--overwrite"
    code, _, err = command(import_hf, *flags)
    lock.close()
    assert code == 1 and "trains in MODEL_DIR" in err
    assert command(import_hf, *flags)[0] == 0


def test_a_file_beside_an_index_that_does_not_name_it(tmp_path, command):
    tensors = hf_folders.random_tensors()
    files = hf_folders.layer_files(tensors)
    source = hf_folders.write(tmp_path / "in", tensors, hf_folders.config(), files=files)
    save_file({"transformer.ln_f.bias": tensors["ln_f.bias"]}, source / "model.safetensors")
    code, _, err = command(import_hf, f"--input={source}", f"--output={tmp_path / 'run'}")
    assert (
        code == 1
        and "model.safetensors lies beside model.safetensors.index.json, which does not" in err
    )


def test_a_tokenizer_with_an_id_beyond_the_embedding(tmp_path, command, tokenizer_json):
    tensors = hf_folders.random_tensors(vocab_size=280)
    source = hf_folders.write(tmp_path / "in", tensors, hf_folders.config(vocab_size=280))
    text = json.loads(tokenizer_json.read_text())
    (last,) = (piece for piece, number in text["model"]["vocab"].items() if number == 269)
    text["model"]["vocab"][last] = 5000
    (source / "tokenizer.json").write_text(json.dumps(text))
    code, _, err = command(import_hf, f"--input={source}", f"--output={tmp_path / 'run'}")
    assert code == 1 and "has 5001 tokens, the embedding only 280 rows" in err


# ---- folders that are damaged ----


def _shard(folder, rng):
    return rng.choice(sorted(folder.glob("*.safetensors")))


def _rewrite_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _rewrite_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def _rewrite_shard(folder, rng, change):
    """change(tensors, name) of one shard, which must have more than one tensor."""
    from safetensors.numpy import load_file

    shards = [f for f in sorted(folder.glob("*.safetensors")) if len(load_file(f)) > 1]
    file = rng.choice(shards)
    tensors = load_file(file)
    change(tensors, rng.choice(sorted(tensors)))
    save_file(tensors, file)


def missing_shard(folder, rng):
    _shard(folder, rng).unlink()


def cut_short(folder, rng):
    file = _shard(folder, rng)
    data = file.read_bytes()
    file.write_bytes(data[: rng.randrange(len(data))])


def longer(folder, rng):
    with _shard(folder, rng).open("ab") as file:
        file.write(rng.randbytes(rng.randint(1, 9)))


def header_byte(folder, rng):
    file = _shard(folder, rng)
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    start = data.index(b'"transformer') if b'"transformer' in data[:length] else 8
    end = 8 + len(bytes(data[8 : 8 + length]).rstrip())
    at = rng.randrange(start, end)
    data[at] = rng.choice([b for b in range(32, 127) if b != data[at]])
    file.write_bytes(data)


def header_length(folder, rng):
    file = _shard(folder, rng)
    data = bytearray(file.read_bytes())
    data[rng.randrange(8)] ^= rng.randrange(1, 256)
    file.write_bytes(data)


def other_shape(folder, rng):
    def change(tensors, name):
        tensors[name] = np.ascontiguousarray(tensors[name][:-1])

    _rewrite_shard(folder, rng, change)


def lost_tensor(folder, rng):
    _rewrite_shard(folder, rng, lambda tensors, name: tensors.pop(name))


def renamed_tensor(folder, rng):
    def change(tensors, name):
        tensors[name + rng.choice(["x", ".weight", "0"])] = tensors.pop(name)

    _rewrite_shard(folder, rng, change)


def integers(folder, rng):
    def change(tensors, name):
        tensors[name] = tensors[name].astype(rng.choice(["int8", "int32", "uint16"]))

    _rewrite_shard(folder, rng, change)


def not_finite(folder, rng):
    def change(tensors, name):
        tensors[name].reshape(-1)[rng.randrange(tensors[name].size)] = rng.choice(
            [np.nan, np.inf, -np.inf]
        )

    _rewrite_shard(folder, rng, change)


def another_head(folder, rng):
    tensors = hf_folders.read(folder)
    head = tensors["word_embeddings.weight"].copy()
    head[rng.randrange(len(head)), rng.randrange(24)] += 1e-3
    file = sorted(folder.glob("*.safetensors"))[-1]
    mine = {f"transformer.{n}": x for n, x in tensors.items() if n.startswith("ln_f")}
    save_file(mine | {"lm_head.weight": head}, file)
    _rewrite_index(folder, lambda weight_map: weight_map.update({"lm_head.weight": file.name}))


def other_number(folder, rng):
    name = rng.choice(["vocab_size", "hidden_size", "n_layer"])
    value = json.loads((folder / "config.json").read_text())[name]
    _rewrite_config(folder, **{name: value * rng.randint(2, 9**6) + rng.choice([-1, 0, 1])})


def no_number(folder, rng):
    name = rng.choice(["vocab_size", "hidden_size", "n_layer", "n_head", "layer_norm_epsilon"])
    _rewrite_config(folder, **{name: rng.choice(["24", [24], {}, True, -24, 1e300, float("inf")])})


def other_model(folder, rng):
    _rewrite_config(folder, model_type=rng.choice(["gpt2", "llama", "", None, 7]))


def config_cut(folder, rng):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[: rng.randrange(len(text))])


def index_cut(folder, rng):
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text()[: rng.randrange(path.stat().st_size)])


def index_outside(folder, rng):
    def change(weight_map):
        name = rng.choice(sorted(weight_map))
        file = weight_map[name]
        weight_map[name] = rng.choice(
            [f"../{folder.name}/{file}", str(folder / file), "/etc/passwd", f"./../{file}", "\0"]
        )

    _rewrite_index(folder, change)


def index_wrong(folder, rng):
    def change(weight_map):
        name = rng.choice(sorted(weight_map))
        weight_map[name] = rng.choice([7, None, "", "none.safetensors", ["x"]])

    _rewrite_index(folder, change)


def index_elsewhere(folder, rng):
    def change(weight_map):
        first, last = sorted(weight_map)[0], sorted(weight_map)[-1]
        weight_map[first], weight_map[last] = weight_map[last], weight_map[first]

    _rewrite_index(folder, change)


def only_pickled(folder, rng):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / rng.choice(["pytorch_model.bin", "pytorch_model_00001-of-00072.bin"])).write_bytes(
        b"\x80\x04"
    )


def large_vocabulary(folder, rng, tokenizer_json):
    shutil.copy(tokenizer_json, folder / "tokenizer.json")  # 270 tokens, 48 rows


def bad_tokenizer(folder, rng):
    (folder / rng.choice(["tokenizer.json", "tokenizer.model"])).write_bytes(rng.randbytes(50))


def folder_for_a_file(folder, rng):
    file = rng.choice([_shard(folder, rng), folder / "config.json"])
    file.unlink()
    file.mkdir()


def link_to_itself(folder, rng):
    file = _shard(folder, rng)
    file.unlink()
    file.symlink_to(file.name)


DAMAGES = [
    missing_shard, cut_short, longer, header_byte, header_length, other_shape, lost_tensor, renamed_tensor, integers,
    not_finite, another_head, other_number, no_number, other_model, config_cut, index_cut, index_outside, index_wrong,
    index_elsewhere, only_pickled, large_vocabulary, bad_tokenizer, folder_for_a_file, link_to_itself,
]  # fmt: skip


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory):
    tensors = hf_folders.random_tensors()
    return hf_folders.write(
        tmp_path_factory.mktemp("whole") / "hf", tensors, hf_folders.config(),
        files=hf_folders.layer_files(tensors),
    )  # fmt: skip


def test_200_damaged_folders(whole_folder, tmp_path, command, tokenizer_json):
    imported(whole_folder, tmp_path / "control", command)
    shutil.rmtree(tmp_path / "control")
    messages = set()
    for number in range(200):
        rng, damage = random.Random(number), DAMAGES[number % len(DAMAGES)]
        folder = tmp_path / "hf"
        shutil.copytree(whole_folder, folder)
        damage(folder, rng, *([tokenizer_json] if damage is large_vocabulary else []))
        code, out, err = command(import_hf, f"--input={folder}", f"--output={tmp_path / 'run'}")
        what = f"{damage.__name__} {number}: {out}{err}"
        assert code == 1 and out == "", what
        assert err.startswith("bloomjax: ") and err.count("\n") == 1 and str(folder) in err, what
        assert os.listdir(tmp_path) == ["hf"], what
        messages.add(err)
        shutil.rmtree(folder)
    assert len(messages) > 100


def test_lines_that_say_what_to_do(tmp_path, command):
    tensors = hf_folders.random_tensors()
    files = hf_folders.layer_files(tensors)
    whole = hf_folders.write(tmp_path / "in", tensors, hf_folders.config(), files=files)

    def line(folder=whole, *flags):
        code, _, err = command(
            import_hf, f"--input={folder}", f"--output={tmp_path / 'run'}", *flags
        )
        assert code == 1
        return err

    assert line(tmp_path / "none") == f"bloomjax: there is no folder {tmp_path / 'none'}\n"
    assert "there is no" in line(tmp_path) and "config.json" in line(tmp_path)
    (whole / "model_00003-of-00005.safetensors").rename(tmp_path / "away")
    assert "the shard" in line() and "model_00003-of-00005.safetensors is missing" in line()
    (tmp_path / "away").rename(whole / "model_00003-of-00005.safetensors")
    only_pickled(whole, random.Random(0))
    assert "only pickled weights" in line() and "save_pretrained" in line()
    assert command(import_hf, f"--input={whole}")[2].startswith("bloomjax: give --input=DIR")


def test_a_disk_without_room(whole_folder, tmp_path, command, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    code, _, err = command(import_hf, f"--input={whole_folder}", f"--output={tmp_path / 'run'}")
    assert code == 1 and "needs 183,360 bytes" in err and "has 1,000 left" in err
    assert not os.listdir(tmp_path)


def test_a_disk_that_fills_up_meanwhile(whole_folder, tmp_path, command, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    code, _, err = command(import_hf, f"--input={whole_folder}", f"--output={tmp_path / 'run'}")
    assert code == 1
    assert err == f"bloomjax: cannot write {tmp_path / 'run'}: No space left on device\n"
    assert not os.listdir(tmp_path)
