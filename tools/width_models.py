"""The model of a configuration at other widths, in standard parametrization and in muP, trained on one device."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from bloomjax import config
from bloomjax.data import OpenTrainData
from bloomjax.errors import BadInput
from bloomjax.model import Bloom, BloomConfig
from bloomjax.mup import MuP
from bloomjax.partitioning import MeshShape
from bloomjax.schedules import BatchSchedule, CosineSchedule
from bloomjax.startup import use_compilation_cache
from bloomjax.train_state import TrainState, abstract_state
from bloomjax.train_step import StepOptions, jit_programs

# sp: nothing changes with the width, as in BLOOM's family, whose init_std is the same for all sizes. sp_fan_in: all
# matrices begin with init_std * sqrt(base width / width), the usual rule for one size.
PARAMETRIZATIONS = ("sp", "sp_fan_in", "mup")
GROW = ("head_dim", "num_heads")


@dataclasses.dataclass(frozen=True)
class Base:
    """What is varied, read from the gin files on the command line.

    Attributes:
      mup: the base; BloomConfig.mup, or the shape in the gin files itself.
    """

    model: BloomConfig
    mup: MuP
    optimizer: Any
    data: OpenTrainData
    batches: BatchSchedule
    learning_rate: CosineSchedule
    seed: int

    @property
    def batch_size_samples(self) -> int:
        return self.batches.batch_size_samples

    def at(self, width: int, parametrization: str, grow: str) -> BloomConfig:
        """The model `width` wide, in float32. What grows with it: heads in size ("head_dim") or in number."""
        c, mup = self.model, self.mup
        head_dim = mup.base_emb_dim // mup.base_num_heads
        heads = mup.base_num_heads if grow == "head_dim" else width // head_dim
        if not heads or width % heads or (grow == "num_heads" and width % head_dim):
            raise BadInput(f"--widths: {width} is no multiple of {heads or head_dim}, see --grow")
        is_fan_in = parametrization == "sp_fan_in"
        std = c.init_std * ((mup.base_emb_dim / width) ** 0.5 if is_fan_in else 1.0)
        return dataclasses.replace(
            c, emb_dim=width, num_heads=heads, init_std=std, dtype="float32", expected_params=None,
            mlp_dim=round((mup.base_mlp_dim or 4 * mup.base_emb_dim) * width / mup.base_emb_dim),
            mup=mup if parametrization == "mup" else None, remat_policy="none", scan_layers=True,
        )  # fmt: skip


def read_base() -> Base:
    """Of the gin flags of this process. BadInput where they lack something, or the store is not there."""
    use_compilation_cache()
    model = config.build("Bloom.config")
    mup = model.mup or MuP(model.emb_dim, model.num_heads, model.mlp_dim)
    return Base(
        model, mup, config.build("train.optimizer"), config.build("train.train_data").open(),
        config.build("train.batch_schedule"), config.build("train.learning_rate"), config.build("train.seed"),
    )  # fmt: skip


def parse_widths(text: str) -> list[int]:
    """Of "64,128,256": growing. BadInput unless there are two or more."""
    try:
        widths = sorted({int(word) for word in text.split(",")})
    except ValueError:
        widths = []
    if len(widths) < 2 or widths[0] < 1:
        raise BadInput(f"--widths={text}: give two or more, such as 64,128,256,512")
    return widths


def parse_parametrizations(text: str) -> list[str]:
    """Of "sp,mup". BadInput for one that does not exist."""
    names = text.split(",")
    for name in names:
        if name not in PARAMETRIZATIONS:
            raise BadInput(f"--parametrizations={text}: there are {', '.join(PARAMETRIZATIONS)}")
    return names


class Training:
    """Steps of the train step that runs are made of, on the first device; compiled once for any learning rate."""

    def __init__(self, base: Base, model: BloomConfig):
        self._base, self._mesh = base, MeshShape(1, 1, 1).build(jax.devices()[:1])
        abstract = abstract_state(Bloom(model), base.optimizer, self._mesh)
        self._init, _, self._step, _ = jit_programs(
            Bloom(model), base.optimizer, StepOptions(), self._mesh, abstract
        )

    def tokens(self, step: int) -> np.ndarray:
        """int32 [B, L + 1] of step `step`, without the ramp of the batch."""
        num = self._base.batch_size_samples
        return self._base.data.rows(np.arange((step - 1) * num, step * num))

    def states(
        self, rate_of: Callable[[int], float], num_steps: int, seed: int
    ) -> Iterator[tuple[TrainState, float]]:
        """The state before step 1 and after each, valid until the next is asked for, and the loss of the step.

        `rate_of` gives the learning rate by the samples consumed before a step, as in a run.
        """
        state = self._init(seed)
        yield state, float("nan")
        num = self._base.batch_size_samples
        key = jax.random.key(seed + 1)
        for step in range(1, num_steps + 1):
            batch = {"tokens": self.tokens(step), "weights": np.ones(num, np.float32)}
            with jax.set_mesh(self._mesh):
                state, metrics = self._step(
                    state, batch, np.float32(rate_of((step - 1) * num)), key
                )
            yield state, float(metrics["loss"])


def slope(widths: Sequence[int], sizes: Sequence[float]) -> float:
    """Exponent of the power law of width through these sizes, by least squares of the logarithms."""
    return float(np.polyfit(np.log(widths), np.log(np.maximum(sizes, 1e-30)), 1)[0])
