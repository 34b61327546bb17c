"""A store, a vocabulary and a model so small that a whole run takes a second or two; used by several tests."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import jax

from bloomjax import token_store, vocabulary
from bloomjax.checkpoints import Checkpoints
from bloomjax.data import EvalData, TrainData
from bloomjax.model import Bloom, BloomConfig
from bloomjax.optimizer import adamw
from bloomjax.partitioning import MeshShape
from bloomjax.schedules import BatchSchedule, CosineSchedule
from bloomjax.train import train
from bloomjax.train_step import StepOptions

REPOSITORY = Path(__file__).resolve().parent.parent
VOCAB_SIZE, SEQUENCE_LENGTH, BATCH_SIZE, NUM_STEPS = 320, 16, 8, 40
_SYLLABLES = {
    "aa": "ba ke li mo nu ra se ti".split(),
    "bb": "αβ γε δι ζο θυ κα λε μι".split(),
    "cc": "до ре ми фа со ля си ту".split(),
}

# The same run as `arguments()`, for `python -m bloomjax.train`.
GIN = """
import for_gin
include 'bloom.gin'
include 'pretrain.gin'
train.mesh = @FirstDevices()
TASK_MODULE = 'no.such.module'  # the store is there, so nothing may ask for it
MIXTURE_OR_TASK_NAME = 'none'
prepare.vocab_size = %VOCAB_SIZE
VOCAB_SIZE = 320
NUM_LAYERS = 2
EMB_DIM = 32
NUM_HEADS = 4
BloomConfig.init_std = 0.02
BATCH_SIZE = 8
SEQUENCE_LENGTH = 16
SEED = 3
TRAIN_STEPS = 40
CosineSchedule.peak = 3e-3
CosineSchedule.end = 3e-4
CosineSchedule.warmup_samples = 40
CosineSchedule.decay_samples = 400
EVAL_EVERY_STEPS = 20
SAVE_EVERY_STEPS = 10
EvalData.max_windows_per_language = 2
EvalData.batch_size_samples = 8
"""


class Text:
    """Made-up documents in three languages, their vocabulary and their store, in `folder`."""

    def __init__(self, folder: Path, seed: int = 0):
        rng = random.Random(seed)
        self.folder = folder
        self.documents = {
            language: [_document(rng, syllables) for _ in range(40)]
            for language, syllables in _SYLLABLES.items()
        }
        texts = [text for texts in self.documents.values() for text in texts]
        self.vocabulary = vocabulary.train_sentencepiece(texts, folder / "v.model", VOCAB_SIZE)
        self.store_dir = folder / "tokens"
        self.store = token_store.write_store(self.store_dir, self.documents, self.vocabulary)


def _document(rng: random.Random, syllables: list[str]) -> str:
    words = [
        "".join(rng.choices(syllables[:4], k=2)) for _ in range(4)
    ]  # so that a model can learn something
    return " ".join(rng.choice(words) + rng.choice(syllables) for _ in range(rng.randint(15, 40)))


@dataclasses.dataclass(frozen=True)
class FirstDevices(MeshShape):
    """A mesh over the first `num` devices; MeshShape takes all of them."""

    num: int = 1

    def build(self, devices=None):
        return super().build((devices or jax.devices())[: self.num])


def tiny_model(**changes) -> Bloom:
    shape = dict(vocab_size=VOCAB_SIZE, num_layers=2, emb_dim=32, num_heads=4, init_std=0.02)
    return Bloom(BloomConfig(**(shape | changes)))


def arguments(text: Text, model_dir: Path, **changes) -> dict:
    """Of `train`; on one device unless `mesh` is given. Objects are new each time."""
    found = dict(
        model=tiny_model(),
        optimizer=adamw(),
        learning_rate=CosineSchedule(3e-3, 3e-4, 40, 400),
        batch_schedule=BatchSchedule(BATCH_SIZE),
        train_data=TrainData(
            store_dir=str(text.store_dir), sequence_length=SEQUENCE_LENGTH, seed=3
        ),
        eval_data=EvalData(max_windows_per_language=2, batch_size_samples=8),
        mesh=FirstDevices(1),
        step=StepOptions(),
        checkpoints=Checkpoints(save_every_steps=10),
        model_dir=str(model_dir),
        vocabulary_path=str(text.vocabulary.path),
        seed=3,
        eval_every_steps=20,
        train_steps=NUM_STEPS,
        compilation_cache_dir=str(text.folder / "xla"),
    )
    return found | changes


def run(text: Text, model_dir: Path, **changes) -> int:
    """`train` in this process; its exit code."""
    return train(**arguments(text, model_dir, **changes))


def command(text: Text, model_dir: Path, *flags: str) -> list[str]:
    """`python -m bloomjax.train` for the same run."""
    gin_file = text.folder / "run.gin"
    gin_file.write_text(
        GIN + f"STORE_DIR = '{text.store_dir}'\nVOCABULARY = '{text.vocabulary.path}'\n"
        f"train.compilation_cache_dir = '{text.folder / 'xla'}'\n"
    )
    return [
        sys.executable, "-m", "bloomjax.train", f"--gin_file={gin_file}",
        f"--gin.MODEL_DIR='{model_dir}'", *flags,
    ]  # fmt: skip


def environment() -> dict[str, str]:
    """Of a command: this checkout and these tests; loading TensorFlow, seqio or torch ends it with code 97."""
    path = [REPOSITORY, REPOSITORY / "tests", REPOSITORY / "tests" / "no_tensorflow"]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}


def execute(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=900, check=False
    )


def records(model_dir: Path) -> list[dict]:
    lines = (model_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(model_dir: Path) -> dict[int, float]:
    """Loss of each step; fails if a step is there twice."""
    found = [(record["step"], record["loss"]) for record in records(model_dir) if record["step"]]
    assert len(dict(found)) == len(found), f"a step is there twice: {sorted(s for s, _ in found)}"
    return dict(found)


def fingerprints(model_dir: Path, step: int = NUM_STEPS) -> dict[str, int]:
    """Of parameters, optimizer and step counter, as saved."""
    path = model_dir / "checkpoints" / str(step) / "position" / "metadata"
    return json.loads(path.read_text())["fingerprints"]


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below `folder` and what the files hold, but for the ledger, in which each start writes."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if path.name != "goodput.jsonl"
    }
