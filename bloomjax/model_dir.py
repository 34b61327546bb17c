"""What a MODEL_DIR holds for those who read it: the model, a checkpoint, its parameters, the vocabulary."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from bloomjax import config, partitioning
from bloomjax.checkpoints import Checkpoints, is_imported
from bloomjax.errors import BadInput
from bloomjax.model import Bloom
from bloomjax.objectives import CausalLM, Objective
from bloomjax.train_state import abstract_params
from bloomjax.vocabulary import Vocabulary, open_vocabulary


@dataclasses.dataclass(frozen=True)
class Trained:
    """One checkpoint of a run, or an imported one.

    Attributes:
      path: MODEL_DIR.
      position: what the checkpoint says about itself.
      vocabulary: None for an imported model that brought none.
      sequence_length: of training, in tokens.
      objective: of training; CausalLM where config.gin names none.
    """

    path: Path
    model: Bloom
    position: dict[str, Any]
    vocabulary: Vocabulary | None
    sequence_length: int
    objective: Objective = CausalLM()

    @property
    def step(self) -> int:
        return self.position["step"]

    @property
    def checkpoint(self) -> Path:
        """The folder of the checkpoint."""
        return self.path / "checkpoints" / str(self.step)

    def check_vocabulary(self, vocabulary: Vocabulary) -> None:
        """BadInput unless the model was trained with it."""
        if self.vocabulary and self.vocabulary.fingerprint != vocabulary.fingerprint:
            raise BadInput(
                f"{self.path} was trained with the vocabulary {self.vocabulary.path}, not with {vocabulary.path}"
            )

    def read_params(self, model: Bloom | None = None, mesh: Mesh | None = None) -> Any:
        """float32 parameters of `model` (this one) on `mesh` (one device), verified.

        BadInput if they are damaged or of another model.
        """
        mesh = mesh or partitioning.MeshShape(1, 1, 1).build(jax.devices()[:1])
        checkpoints = Checkpoints(save_every_steps=1)
        checkpoints.open(self.path / "checkpoints", read_only=True)
        try:
            return checkpoints.restore_params(self.step, abstract_params(model or self.model, mesh))
        finally:
            checkpoints.close()


def open_model_dir(path: Path, step: int | None = None) -> Trained:
    """The checkpoint of `step` (the newest by default); reads no parameters.

    Raises BadInput if the folder is no MODEL_DIR, has no such step, the checkpoint's position is damaged, or the
    vocabulary is not the one it was trained with.
    """
    if not (path / "config.gin").is_file():
        raise BadInput(f"{path} is no MODEL_DIR of a run: it has no config.gin")
    model = config.build("train.model", path / "config.gin")
    checkpoints = Checkpoints(save_every_steps=1)
    checkpoints.open(path / "checkpoints", read_only=True)
    try:
        position = checkpoints.read_position(step)
    finally:
        checkpoints.close()
    data = position["data"]
    vocabulary = None
    if data["vocabulary"] is not None:
        vocabulary = _open_vocabulary(path, data["vocabulary"])
    source = position["imported"] if is_imported(position) else data
    objective = None
    if "TrainData.objective" in (path / "config.gin").read_text(encoding="utf-8"):
        objective = config.build("TrainData.objective", path / "config.gin")
    length = source["sequence_length"]
    return Trained(path, model, position, vocabulary, length, objective or CausalLM())


def _open_vocabulary(path: Path, fingerprint: str) -> Vocabulary:
    files = sorted((path / "vocabulary").glob("*"))
    if len(files) != 1:
        raise BadInput(f"{path}/vocabulary should hold one file, it holds {len(files)}")
    vocabulary = open_vocabulary(files[0])
    if vocabulary.fingerprint != fingerprint:
        raise BadInput(f"{files[0]} is not the vocabulary that {path} was trained with")
    return vocabulary
