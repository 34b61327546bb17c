"""The gradient noise scale of one language after the other, measured in a run with rows of that language alone."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bloomjax import partitioning
from bloomjax.data import OpenTrainData, held_out_key, host_rows, put_batch
from bloomjax.errors import BadInput
from bloomjax.model import Bloom
from bloomjax.train_step import Batch, StepOptions, make_gradient


class LanguageNoise:
    """Every so many steps the gradient of one language, in turn, as a whole and of a part of its rows.

    No parameter is changed by it. It costs `num_samples` rows of forward and backward passes each `every_steps` steps,
    and as much memory as a microbatch and its gradient.

    Args:
      every_steps: with 46 languages each is seen once in 46 times this.
      num_samples: rows of a measurement, at random from the language's training text; rounded up to what fills the
      mesh. num_parts: into how many parts they are dealt, one of which is compared with the whole.
    """

    def __init__(self, *, every_steps: int = 10, num_samples: int = 32, num_parts: int = 4):
        for name, value, least in (
            ("every_steps", every_steps, 1),
            ("num_samples", num_samples, 2),
            ("num_parts", num_parts, 2),
        ):
            if value < least:
                raise BadInput(f"LanguageNoise.{name} must be at least {least}, got {value}")
        self._every_steps, self._num_samples, self._num_parts = every_steps, num_samples, num_parts

    def open(
        self, model: Bloom, options: StepOptions, mesh: Mesh, data: OpenTrainData
    ) -> "OpenLanguageNoise":
        """Of the languages that have two training windows."""
        num_shards = partitioning.num_batch_shards(mesh)
        rows_of_a_shard = -(-self._num_samples // num_shards)
        parts = min(
            max(self._num_parts, options.num_microbatches(rows_of_a_shard)), rows_of_a_shard
        )
        parts = max(2, parts)
        num_rows = num_shards * parts * -(-rows_of_a_shard // parts)
        program = jax.jit(
            make_noise_step(model, options, parts),
            out_shardings=NamedSharding(mesh, PartitionSpec()),
        )
        return OpenLanguageNoise(program, data, mesh, num_rows, self._every_steps)


class OpenLanguageNoise:
    """A LanguageNoise with the text of a run.

    Attributes:
      program: that of `make_noise_step`.
    """

    def __init__(
        self,
        program: Callable[[Any, Batch], dict[str, jax.Array]],
        data: OpenTrainData,
        mesh: Mesh,
        num_rows: int,
        every_steps: int,
    ):
        self.program, self._data, self._mesh = program, data, mesh
        self._num_rows, self._every_steps = num_rows, every_steps
        length = data.sequence_length
        self._names = [
            name for name in data.mixture.names
            if data.sources[name][0].num_windows(data.sources[name][1], "train", length) > 1
        ]  # fmt: skip

    def batch_of(self, step: int) -> tuple[dict[str, Any], Batch] | None:
        """What is to be measured after `step`: the first entries of its record, `language` and `language_samples`, and
        the rows; None if nothing is due."""
        if step % self._every_steps or not self._names:
            return None
        name = self._names[step // self._every_steps % len(self._names)]
        store, language = self._data.sources[name]
        length = self._data.sequence_length
        # Of the step alone, so that a run that goes on after a stop measures the same.
        rng = np.random.default_rng([self._data.mixture.seed, step])
        num_windows = store.num_windows(language, "train", length)
        windows = rng.choice(num_windows, min(self._num_rows, num_windows), replace=False)
        mine = host_rows(self._num_rows, self._mesh)
        mine = mine[mine < len(windows)]
        rows = store.read_windows(language, "train", windows[mine], length) if len(mine) else []
        tokens = dict(zip(mine.tolist(), rows, strict=True))
        entries = {"language": name, "language_samples": len(windows)}
        keys = {row: (*held_out_key(language, int(windows[row])), step) for row in tokens}
        return entries, put_batch(
            tokens, self._num_rows, length + 1, self._mesh, self._data.objective, keys
        )


def make_noise_step(
    model: Bloom, options: StepOptions, num_parts: int
) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """noise(params, batch) -> `language_norm` of the gradient of the mean over rows, `language_part_norm` of that of
    every num_parts-th row, and `language_part_samples`, how many those are. Without dropout."""
    gradient = make_gradient(model, options)

    def noise(params, batch):
        _, grads, parts = gradient(params, batch, None, num_parts)
        parts |= {"norm": jnp.asarray(optax.tree.norm(grads))}
        return {f"language_{name}": value for name, value in parts.items()}

    return noise
