"""`python -m bloomjax.export`: from a checkpoint of any mesh to files that safetensors and transformers read."""

import importlib.util
import json
import os
import shutil
import sys
import warnings
from pathlib import Path

import hf_folders
import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import reference_bloom
import tiny_run
from safetensors import safe_open
from safetensors.numpy import save_file

from bloomjax import export, files, hf, hf_folder, hf_verify, import_hf
from bloomjax import model_dir as model_dir_module
from bloomjax.checkpoints import Checkpoints
from bloomjax.errors import BadInput
from bloomjax.optimizer import adamw
from bloomjax.train_state import abstract_state, state_of

SHAPE = dict(vocab_size=320, emb_dim=32, num_layers=2, num_heads=4)


def config_gin() -> str:
    gin = tiny_run.GIN.replace("import for_gin\n", "")
    return gin.replace("train.mesh = @FirstDevices()\n", "")


@pytest.fixture(scope="module")
def model_dir(undisturbed, tmp_path_factory):
    """The run with the config.gin that a command would have written."""
    folder = tmp_path_factory.mktemp("export") / "run"
    shutil.copytree(undisturbed, folder)
    (folder / "config.gin").write_text(config_gin())
    return folder


@pytest.fixture
def own_run(model_dir, tmp_path):
    """A copy of it that a test may change."""
    return Path(shutil.copytree(model_dir, tmp_path / "run"))


def restored_params(model_dir, step=tiny_run.NUM_STEPS):
    """By Orbax alone."""
    state = model_dir / "checkpoints" / str(step) / "state"
    with warnings.catch_warnings(), ocp.PyTreeCheckpointer() as checkpointer:
        warnings.filterwarnings("ignore", "Sharding info not provided")
        return checkpointer.restore(state)["params"]


def expected(params) -> dict[str, np.ndarray]:
    """The HF tensors of our parameters, by the definition of the layout and without bloomjax.hf."""
    layers = params["layers"]
    found = {
        "word_embeddings.weight": params["embedding"],
        "word_embeddings_layernorm.weight": params["embedding_norm"]["scale"],
        "word_embeddings_layernorm.bias": params["embedding_norm"]["bias"],
        "ln_f.weight": params["final_norm"]["scale"],
        "ln_f.bias": params["final_norm"]["bias"],
    }
    for i in range(len(layers["qkv"]["bias"])):
        qkv, bias = layers["qkv"]["kernel"][i], layers["qkv"]["bias"][i]
        D, _, H, K = qkv.shape
        rows = [qkv[:, part, head, k] for head in range(H) for part in range(3) for k in range(K)]
        elements = [bias[part, head, k] for head in range(H) for part in range(3) for k in range(K)]
        found |= {
            f"h.{i}.input_layernorm.weight": layers["attention_norm"]["scale"][i],
            f"h.{i}.input_layernorm.bias": layers["attention_norm"]["bias"][i],
            f"h.{i}.self_attention.query_key_value.weight": np.stack(rows),
            f"h.{i}.self_attention.query_key_value.bias": np.stack(elements),
            f"h.{i}.self_attention.dense.weight": layers["out"]["kernel"][i].reshape(D, D).T,
            f"h.{i}.self_attention.dense.bias": layers["out"]["bias"][i],
            f"h.{i}.post_attention_layernorm.weight": layers["mlp_norm"]["scale"][i],
            f"h.{i}.post_attention_layernorm.bias": layers["mlp_norm"]["bias"][i],
            f"h.{i}.mlp.dense_h_to_4h.weight": layers["mlp_in"]["kernel"][i].T,
            f"h.{i}.mlp.dense_h_to_4h.bias": layers["mlp_in"]["bias"][i],
            f"h.{i}.mlp.dense_4h_to_h.weight": layers["mlp_out"]["kernel"][i].T,
            f"h.{i}.mlp.dense_4h_to_h.bias": layers["mlp_out"]["bias"][i],
        }
    return {name: np.ascontiguousarray(x) for name, x in found.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_number_arrives(command, model_dir, tmp_path, dtype):
    output = tmp_path / "hf"
    code, out, err = command(
        export, f"--checkpoint={model_dir}", f"--output={output}", f"--dtype={dtype}"
    )
    assert (code, err) == (0, "")
    assert f"{output}: step 40 in {dtype}" in out and "AutoModelForCausalLM.from_pretrained" in out
    kind = hf_folders.NUMPY[dtype]
    params = jax.tree.map(lambda x: np.asarray(x).astype(kind), restored_params(model_dir))
    want = expected(params)
    hf_folders.assert_same(hf_folders.read(output), want)
    files = {path.name for path in output.iterdir()}
    assert files == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer.model", "tokenizer_config.json",
    }  # fmt: skip
    config = json.loads((output / "config.json").read_text())
    assert config["dtype"] == dtype and config["seq_length"] == tiny_run.SEQUENCE_LENGTH


def test_shards_and_index(command, model_dir, tmp_path):
    output = tmp_path / "hf"
    command(export, f"--checkpoint={model_dir}", f"--output={output}", "--max_shard_size=30KB")
    index = json.loads((output / "model.safetensors.index.json").read_text())
    shapes = hf_folders.shapes(**SHAPE)
    num = sum(int(np.prod(shape)) for shape in shapes.values())
    assert index["metadata"] == {"total_parameters": num, "total_size": 4 * num}
    assert index["weight_map"].keys() == {f"transformer.{name}" for name in shapes}
    for file in set(index["weight_map"].values()):
        with safe_open(output / file, "np") as shard:
            names = set(shard.keys())
            assert shard.metadata()["format"] == "pt"
        assert names == {n for n, f in index["weight_map"].items() if f == file}
        sizes = [4 * int(np.prod(shapes[n.removeprefix("transformer.")])) for n in names]
        assert sum(sizes) <= 30_000 or len(sizes) == 1
    hf_folders.assert_same(hf_folders.read(output), expected(restored_params(model_dir)))


def test_by_default_beside_the_checkpoints_and_once(command, own_run):
    first = command(export, f"--checkpoint={own_run}", "--step=30")[1]
    assert f"{own_run}/hf/30: step 30 in float32" in first
    before = tiny_run.tree(own_run / "hf")
    again = command(export, f"--checkpoint={own_run}", "--step=30")[1]
    assert f"{own_run}/hf/30 holds this export already: step 30 in float32" in again
    assert "from_pretrained" in again
    assert tiny_run.tree(own_run / "hf") == before
    # Another dtype or another step is not the same export.
    code, _, err = command(export, f"--checkpoint={own_run}", "--step=30", "--dtype=bfloat16")
    assert code == 1 and "hf/30 exists already; --overwrite replaces it" in err
    code, _, err = command(export, f"--checkpoint={own_run}", f"--output={own_run}/hf/30")
    assert code == 1 and "hf/30 exists already" in err
    assert tiny_run.tree(own_run / "hf") == before
    flags = f"--checkpoint={own_run}", "--step=30", "--dtype=bfloat16", "--overwrite"
    assert command(export, *flags)[0] == 0
    assert os.listdir(own_run / "hf") == ["30"]
    assert hf_folders.read(own_run / "hf" / "30")["ln_f.weight"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (1, 8, 1)])
def test_a_checkpoint_of_any_mesh(command, mesh_of, tmp_path, shape):
    params = random_params()
    _save(tmp_path / "run", mesh_of(*shape), params)
    flags = f"--checkpoint={tmp_path / 'run'}", f"--output={tmp_path / 'hf'}"
    assert command(export, *flags)[0] == 0
    hf_folders.assert_same(hf_folders.read(tmp_path / "hf"), expected(params))


def _save(folder, mesh, params, gin=""):
    """A MODEL_DIR with one checkpoint of step 1, sharded over `mesh`."""
    model, optimizer = tiny_run.tiny_model(), adamw()
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(model, optimizer, mesh))
    state = jax.device_put(state_of(optimizer, params), shardings)
    checkpoints = Checkpoints(save_every_steps=1)
    checkpoints.open(folder / "checkpoints")
    position = {
        "samples": 8, "record": {"step": 1}, "model": SHAPE,
        "data": {"vocabulary": None, "sequence_length": 16},
    }  # fmt: skip
    checkpoints.save(1, state, position)
    checkpoints.close()
    (folder / "config.gin").write_text(config_gin() + gin)


def random_params():
    return reference_bloom.random_params(**SHAPE, mlp_dim=128, seed=1)


@pytest.mark.slow
def test_masked_padding_rows_stay_behind(command, mesh_of, tmp_path):
    masked = "BloomConfig.num_tokens_in_vocab = 300\nBloomConfig.mask_padding_vocab = True\n"
    params = random_params()
    _save(tmp_path / "run", mesh_of(1, 2, 4), params, masked)
    flags = f"--checkpoint={tmp_path / 'run'}", f"--output={tmp_path / 'hf'}"
    assert command(export, *flags)[0] == 0
    found = hf_folders.read(tmp_path / "hf")["word_embeddings.weight"]
    np.testing.assert_array_equal(found, params["embedding"][:300])
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == 300


MUP_GIN = """BloomConfig.mup = @MuP()
MuP.base_emb_dim = 16
MuP.base_num_heads = 4
MuP.output_multiplier = 3.0
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_multipliers_of_mup_go_into_the_weights(command, mesh_of, tmp_path, dtype):
    """transformers has none; --verify compares our model with them and theirs without, rounded alike."""
    params = random_params()
    _save(tmp_path / "run", mesh_of(1, 1, 1), params, MUP_GIN)
    flags = [f"--checkpoint={tmp_path / 'run'}", f"--output={tmp_path / 'hf'}", f"--dtype={dtype}"]
    has_torch = all(map(importlib.util.find_spec, ("torch", "transformers")))
    code, out, _ = command(export, *flags, *["--verify"] * has_torch)
    assert code == 0 and (": equal\n" in out) == has_torch
    for name in ("scale", "bias"):  # twice as wide as the base
        params["final_norm"][name] = params["final_norm"][name] * np.float32(3.0 / 2)
    for name, array in params["layers"]["qkv"].items():
        part = array[:, :, 0] if name == "kernel" else array[:, 0]
        part *= np.float32(2**-0.5)  # heads of 8, not 4
    want = {n: x.astype(hf.NUMPY_DTYPES[dtype]) for n, x in expected(params).items()}
    hf_folders.assert_same(hf_folders.read(tmp_path / "hf"), want)


def test_a_number_too_large_for_float16(command, mesh_of, tmp_path):
    params = random_params()
    params["layers"]["mlp_in"]["kernel"][1, 3, 5] = 70_000.0
    _save(tmp_path / "run", mesh_of(1, 1, 1), params)
    flags = f"--checkpoint={tmp_path / 'run'}", f"--output={tmp_path / 'hf'}"
    code, _, err = command(export, *flags, "--dtype=float16")
    assert code == 1 and "h.1.mlp.dense_h_to_4h.weight does not fit into float16" in err
    assert os.listdir(tmp_path) == ["run"]
    assert command(export, *flags, "--dtype=bfloat16")[0] == 0


def test_a_damaged_checkpoint_is_not_exported(command, own_run):
    """Every file of the state, one flipped byte at a time: refused, or exported whole where nothing was hit."""
    whole = expected(restored_params(own_run))
    files = [
        path
        for path in sorted((own_run / "checkpoints" / "40" / "state").rglob("*"))
        if path.is_file() and path.parent.name == "d" and path.stat().st_size > 2000
    ]
    assert files
    num_refused = 0
    for number, path in enumerate(files):
        data = bytearray(path.read_bytes())
        for at in np.random.default_rng(number).integers(0, len(data), 4):
            damaged = bytearray(data)
            damaged[at] ^= 1 << (number % 8)
            path.write_bytes(damaged)
            code, _, err = command(export, f"--checkpoint={own_run}")
            if code == 0:
                hf_folders.assert_same(hf_folders.read(own_run / "hf" / "40"), whole)
                shutil.rmtree(own_run / "hf")
            else:
                num_refused += 1
                assert "40 is damaged: " in err and err.count("\n") == 1
                assert not (own_run / "hf").exists() or not os.listdir(own_run / "hf")
        path.write_bytes(data)
    assert num_refused >= len(files)


@pytest.mark.parametrize(
    "text, size",
    [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("2GiB", 2**31), ("700", 700), ("1KiB", 1024)],
)
def test_sizes(text, size):
    assert export.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "0", "5 TB", "five", "1e9", "0.1"])
def test_sizes_that_are_none(text):
    with pytest.raises(BadInput, match="is no size"):
        export.parse_size(text)


def test_flags_that_are_wrong(command, own_run, tmp_path):
    assert command(export)[2] == "bloomjax: give --checkpoint=MODEL_DIR\n"
    for flags, message in [
        ((f"--checkpoint={tmp_path}/none",), "none is no MODEL_DIR of a run: it has no config.gin"),
        ((f"--checkpoint={own_run}", "--step=7"), "no checkpoint of step 7 in"),
        ((f"--checkpoint={own_run}", "--dtype=int8"), "should be one of <float32|bfloat16|float16>"),
        ((f"--checkpoint={own_run}", f"--output={own_run}/config.gin"), "exists already and is no folder"),
        ((f"--checkpoint={own_run}", f"--output={own_run}/config.gin/x"), "cannot write"),
    ]:  # fmt: skip
        code, _, err = command(export, *flags)
        assert code == 1 and message in err and err.count("\n") == 1, err
    assert not (own_run / "hf").exists()


@pytest.mark.slow
def test_a_full_disk(own_run):
    """A limit on the size of files stands in for it: the kernel refuses the write in the middle."""
    code = (
        "import resource, signal; from bloomjax import export; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); "
        f"export.main(['export', '--checkpoint={own_run}'])"
    )
    result = tiny_run.execute([sys.executable, "-c", code])
    assert result.returncode == 1
    assert result.stderr == f"bloomjax: cannot write {own_run}/hf/40: File too large\n"
    assert os.listdir(own_run / "hf") == []


def test_neither_torch_nor_tensorflow_is_loaded(own_run):
    """`tiny_run.environment` ends a process that loads one of them with 97."""
    result = tiny_run.execute([sys.executable, "-m", "bloomjax.export", f"--checkpoint={own_run}"])
    assert result.returncode == 0 and result.stderr == "", result.stderr
    flags = f"--input={own_run}/hf/40", f"--output={own_run}/b"
    result = tiny_run.execute([sys.executable, "-m", "bloomjax.import_hf", *flags])
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert f"--gin_file={own_run}/b/config.gin" in result.stdout


def test_what_is_exported_comes_back(command, own_run, tiny_text):
    command(export, f"--checkpoint={own_run}")
    code, out, err = command(import_hf, f"--input={own_run}/hf/40", f"--output={own_run}/back")
    assert (code, err) == (0, "") and "vocabulary: tokenizer.model, 320 tokens" in out
    command(export, f"--checkpoint={own_run}/back", f"--output={own_run}/again")
    hf_folders.assert_same(
        hf_folders.read(own_run / "again"), hf_folders.read(own_run / "hf" / "40")
    )


def test_a_broken_folder_is_no_export(command, own_run):
    flags = f"--checkpoint={own_run}", "--max_shard_size=30KB"
    assert command(export, *flags)[0] == 0
    assert "holds this export already" in command(export, *flags)[1]
    output = own_run / "hf" / "40"
    one_file = command(export, f"--checkpoint={own_run}")
    assert one_file[0] == 1 and "exists already; --overwrite replaces it" in one_file[2]
    for name in ("tokenizer.json", sorted(output.glob("model-*"))[1].name):
        kept = (output / name).read_bytes()
        (output / name).unlink()
        assert command(export, *flags)[0] == 1
        (output / name).write_bytes(kept[: len(kept) // 2])
        assert command(export, *flags)[0] == 1
        (output / name).write_bytes(kept)
    assert command(export, *flags)[0] == 0
    (output / "tokenizer.json").unlink()
    assert command(export, *flags, "--overwrite")[0] == 0
    assert (output / "tokenizer.json").exists()


def test_overwrite_replaces_nothing_else(command, own_run, tmp_path):
    before = tiny_run.tree(own_run)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for output, message in [
        (own_run, "which is to be read; take another folder"),
        (tmp_path, "which is to be read; take another folder"),
        (own_run / "checkpoints", "take another folder"),
        (own_run / "checkpoints" / "99", "lies in"),
        (own_run / "vocabulary" / "hf", "lies in"),
        (tmp_path / "mine", "is not replaced: it has no config.json and no *.safetensors"),
    ]:
        flags = f"--checkpoint={own_run}", f"--output={output}", "--overwrite"
        code, _, err = command(export, *flags)
        assert code == 1 and message in err and err.count("\n") == 1, err
    assert tiny_run.tree(own_run) == before
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert sorted(os.listdir(tmp_path)) == ["mine", "run"]


def test_what_appears_meanwhile_is_kept(tmp_path):
    with pytest.raises(BadInput, match="out exists already; --overwrite replaces it"):
        with files.whole_folder(tmp_path / "out", reads=tmp_path / "x", marks=()) as folder:
            (folder / "new").write_text("")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "thesis").write_text("")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["thesis"]


def test_a_swap_that_fails_keeps_the_old(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")
    rename = Path.rename

    def failing(self, target):
        if ".partial-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(BadInput, match="cannot write .*out: Input/output error"):
        marks = ("config.json",)
        with files.whole_folder(
            tmp_path / "out", reads=tmp_path / "x", marks=marks, overwrite=True
        ) as folder:
            (folder / "config.json").write_text("new")
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == "old"


@pytest.mark.slow
def test_terminated_in_the_middle(own_run):
    """SIGTERM leaves nothing behind; what an earlier kill left is named."""
    code = (
        "import os, signal; from bloomjax import export, hf_folder\n"
        "def stop(*_): os.kill(os.getpid(), signal.SIGTERM)\n"
        "hf_folder.write_tensors = stop\n"
        f"export.main(['export', '--checkpoint={own_run}'])"
    )
    result = tiny_run.execute([sys.executable, "-c", code])
    assert result.returncode == 143, result.stderr
    assert os.listdir(own_run / "hf") == []
    (own_run / "hf" / "40.partial-abc").mkdir()
    result = tiny_run.execute([sys.executable, "-m", "bloomjax.export", f"--checkpoint={own_run}"])
    assert result.returncode == 0 and "40.partial-abc is of a run that was killed" in result.stderr


def test_a_checkpoint_that_a_run_deletes_meanwhile(command, own_run, monkeypatch):
    plan = hf_folder.plan_shards

    def deleting(*arguments):
        shutil.rmtree(own_run / "checkpoints" / "40")
        return plan(*arguments)

    monkeypatch.setattr(hf_folder, "plan_shards", deleting)
    code, _, err = command(export, f"--checkpoint={own_run}", "--step=40")
    assert code == 1 and "checkpoints/40 was deleted while it was read" in err, err
    assert os.listdir(own_run / "hf") == []


@pytest.mark.filterwarnings("ignore")  # of torch and transformers
def test_verify_sees_a_weight_and_a_token(command, own_run, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    output = tmp_path / "hf"
    flags = f"--checkpoint={own_run}", f"--output={output}", "--verify"
    code, out, _ = command(export, *flags)
    assert code == 0 and ": equal\n" in out and "AutoTokenizer gives the same token ids" in out
    whole = (output / "tokenizer.json").read_text()
    other = json.loads(whole)
    ids = other["model"]["vocab"]
    ids["a"], ids["e"] = ids["e"], ids["a"]
    trained = model_dir_module.open_model_dir(own_run)
    (output / "tokenizer.json").write_text(json.dumps(other))
    assert not hf_verify.verify(trained, output, "float32")
    assert "AutoTokenizer gives other token ids for" in capture(command)
    (output / "tokenizer.json").write_text(whole)
    assert hf_verify.verify(trained, output, "float32")
    tensors = {f"transformer.{n}": x.copy() for n, x in hf_folders.read(output).items()}
    tensors["transformer.h.1.mlp.dense_h_to_4h.weight"][3, 4] += 0.5
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    assert not hf_verify.verify(trained, output, "float32")
    assert "NOT EQUAL" in capture(command)


def capture(command):
    """What was printed since the last command."""
    return command.capsys.readouterr().out


@pytest.mark.slow
def test_memory_and_shards_of_1b1(tmp_path, monkeypatch):
    """A model of 1.07B parameters from 8 devices: never in memory as a whole, no file above the limit."""
    monkeypatch.syspath_prepend(tiny_run.REPOSITORY / "benchmarks")
    import bench_export

    bench_export.run_make("1b1.gin", tmp_path / "run")
    found = bench_export.run_verb(
        "export", f"--checkpoint={tmp_path}/run", f"--output={tmp_path}/hf", "--dtype=bfloat16",
        "--max_shard_size=1GB",
    )  # fmt: skip
    V, D, L = 250_880, 1536, 24
    assert found["peak_bytes"] < 2 * (2 * V * D) + 1e9  # in bfloat16, which is the harder bound
    shards = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(shards) == 3 and all(file.stat().st_size <= 10**9 for file in shards)

    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(random_params())]
    numbers = {jax.tree_util.keystr(path): number for number, path in enumerate(paths)}

    def ours(name, shape, *index):
        whole = tuple(slice(i, i + 1) for i in index) + (slice(None),) * (len(shape) - len(index))
        x = bench_export.leaf(numbers[name], shape, whole)
        return x[(0,) * len(index)].astype(ml_dtypes.bfloat16)

    def theirs(name):
        index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
        with safe_open(tmp_path / "hf" / index["weight_map"][name], "np") as shard:
            return shard.get_tensor(name)

    table = theirs("transformer.word_embeddings.weight")
    assert table.shape == (V, D)
    for row in (0, 62_719, 62_720, 250_879):
        np.testing.assert_array_equal(table[row], ours("['embedding']", (V, D), row))
    kernel = ours("['layers']['qkv']['kernel']", (L, D, 3, 16, 96), 23)  # [D, 3, H, K]
    rows = theirs("transformer.h.23.self_attention.query_key_value.weight")
    np.testing.assert_array_equal(rows, kernel.transpose(2, 1, 3, 0).reshape(3 * D, D))
    mlp = ours("['layers']['mlp_out']['kernel']", (L, 4 * D, D), 7)
    np.testing.assert_array_equal(theirs("transformer.h.7.mlp.dense_4h_to_h.weight"), mlp.T)
