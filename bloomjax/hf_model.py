"""A Hugging Face BLOOM as it lies there, for verbs that only read: no checkpoint is made of it."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from bloomjax import hf_tokenizer
from bloomjax.errors import BadInput
from bloomjax.files import one_line_errors
from bloomjax.hf_folder import CONFIG, HFFolder
from bloomjax.model import Bloom
from bloomjax.model_dir import Trained, open_model_dir
from bloomjax.objectives import CausalLM, Objective
from bloomjax.train_state import abstract_params
from bloomjax.vocabulary import Vocabulary, open_vocabulary


@dataclasses.dataclass(frozen=True)
class HFModel:
    """The part of model_dir.Trained that a reader needs, of a Hugging Face folder.

    Attributes:
      vocabulary: None for a folder without a tokenizer.
      sequence_length: of training, in tokens.
      objective: what transformers does with any.
    """

    source: HFFolder
    model: Bloom
    vocabulary: Vocabulary | None
    sequence_length: int
    step: None = None
    objective: Objective = CausalLM()

    @property
    def path(self) -> Path:
        return self.source.path

    def check_vocabulary(self, vocabulary: Vocabulary) -> None:
        """BadInput if the folder has another."""
        if self.vocabulary and self.vocabulary.fingerprint != vocabulary.fingerprint:
            raise BadInput(f"{self.path} has another vocabulary than {vocabulary.path}")

    def read_params(self, model: Bloom | None = None, mesh: Mesh | None = None) -> Any:
        """float32 parameters of `model` (this one) on `mesh`; the host holds one of them at a time."""
        assert mesh is not None
        expected: dict[tuple[str, ...], Any] = flatten_dict(
            abstract_params(model or self.model, mesh)
        )
        self.source.check_head()
        found = {}
        for path, leaf in expected.items():
            array = np.empty(leaf.shape, np.float32)
            for tensor in self.source.tensors:
                if tensor.path != path:
                    continue
                for start, block in self.source.blocks(tensor):
                    if tensor.layer is None:
                        array[start : start + len(block)] = block
                    else:
                        array[tensor.layer] = tensor.from_hf(block)
            # Waits, so that the next array takes the place of this one.
            found[path] = jax.block_until_ready(jax.device_put(array, leaf.sharding))
        return unflatten_dict(found)


def open_model(path: Path, step: int | None = None) -> Trained | HFModel:
    """A MODEL_DIR or a Hugging Face folder. BadInput if it is neither, or as those who read them."""
    if (path / "config.gin").is_file():
        return open_model_dir(path, step)
    if not (path / CONFIG).is_file():
        raise BadInput(
            f"{path} is neither a MODEL_DIR (it has no config.gin) nor a Hugging Face folder (no {CONFIG})"
        )
    if step is not None:
        raise BadInput(f"{path} is a Hugging Face folder and has no steps; leave --step out")
    with one_line_errors(f"cannot read {path}"):
        source = HFFolder(path)
        vocabulary = hf_tokenizer.find_vocabulary(path)
    return HFModel(
        source, Bloom(source.config), vocabulary and open_vocabulary(vocabulary), source.sequence_length
    )  # fmt: skip
