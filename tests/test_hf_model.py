"""A Hugging Face folder that is only read: the same parameters as after import_hf, on any mesh."""

import hf_folders
import jax
import numpy as np
import pytest

from bloomjax import import_hf
from bloomjax.errors import BadInput
from bloomjax.hf_model import HFModel, open_model
from bloomjax.model_dir import Trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "model"
    return hf_folders.write(path, hf_folders.random_tensors(), hf_folders.config())


def test_parameters_are_those_of_an_import(folder, tmp_path, command, mesh_of):
    output = tmp_path / "run"
    assert command(import_hf, f"--input={folder}", f"--output={output}")[0] == 0
    imported, read = open_model(output), open_model(folder)
    assert isinstance(imported, Trained) and isinstance(read, HFModel)
    assert read.sequence_length == imported.sequence_length and read.vocabulary is None
    mesh = mesh_of(2, 2, 2)
    ours, theirs = (each.read_params(each.model, mesh) for each in (read, imported))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.array_equal(a, b) and a.dtype == b.dtype and a.sharding == b.sharding


def test_what_is_no_model(folder, tmp_path):
    with pytest.raises(BadInput, match="is neither a MODEL_DIR .* nor a Hugging Face folder"):
        open_model(tmp_path)
    with pytest.raises(BadInput, match="has no steps; leave --step out"):
        open_model(folder, step=3)
