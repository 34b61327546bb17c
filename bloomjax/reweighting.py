"""DoReMi in a run: the rows of each batch weigh what their domain does (doremi.py), against a reference checkpoint."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bloomjax import partitioning
from bloomjax.checkpoints import Checkpoints
from bloomjax.data import OpenTrainData
from bloomjax.doremi import DomainWeights
from bloomjax.errors import BadInput
from bloomjax.model import Bloom
from bloomjax.objectives import CausalLM
from bloomjax.train_step import Batch, StepOptions, row_losses


class DoReMi:
    """Makes a run the proxy of DoReMi (arXiv 2305.10429); `tools/doremi.py` prints what it has found.

    Each step first takes the losses of its batch under the proxy and under the reference, one forward pass each, and
    changes the weights of the languages by them; then it is an ordinary step with these weights.
    """

    def __init__(
        self,
        *,
        reference_dir: str,
        reference_step: int | None = None,
        step_size: float = 1.0,
        smoothing: float = 1e-3,
        record_every_steps: int = 10,
    ):
        """
        Args:
          reference_dir: MODEL_DIR of an ordinary run of the same model and vocabulary.
          reference_step: its checkpoint; None for the newest.
          step_size, smoothing: eta and c of the paper, with its values.
          record_every_steps: how often metrics.jsonl gets the weights and excess losses.
        """
        if record_every_steps < 1:
            raise BadInput(
                f"DoReMi.record_every_steps must be at least 1, got {record_every_steps}"
            )
        DomainWeights(("a", "b"), step_size=step_size, smoothing=smoothing)  # says what is wrong
        self._reference_dir, self._reference_step = reference_dir, reference_step
        self._step_size, self._smoothing = step_size, smoothing
        self._record_every_steps = record_every_steps

    def open(
        self, model: Bloom, options: StepOptions, mesh: Mesh, data: OpenTrainData, params: Any
    ) -> "Reweighting":
        """Reads the reference, which has parameters like the abstract `params`.

        BadInput if there is none, it is damaged, of another model or vocabulary, or if the mixture changes on the way.
        """
        if data.curriculum or not isinstance(data.objective, CausalLM):
            raise BadInput(
                "DoReMi weighs whole samples of CausalLM: no TrainData.curriculum, no other TrainData.objective"
            )
        if len(data.mixture.stretches) > 1:
            raise BadInput(
                f"DoReMi weighs the languages of one phase; TrainData.phases has "
                f"{len(data.mixture.stretches) - 1} more"
            )
        weights = DomainWeights(
            data.mixture.names, step_size=self._step_size, smoothing=self._smoothing
        )
        path = Path(self._reference_dir) / "checkpoints"
        if not path.is_dir():
            raise BadInput(f"DoReMi.reference_dir={self._reference_dir} has no checkpoints")
        checkpoints = Checkpoints(save_every_steps=1)
        checkpoints.open(path, read_only=True)
        try:
            position = checkpoints.read_position(self._reference_step)
            theirs = position["data"]
            if theirs["vocabulary"] != data.store.vocabulary_fingerprint:
                raise BadInput(
                    f"the reference {self._reference_dir} was trained with another vocabulary than that of the store "
                    f"{data.store.path}"
                )
            reference = checkpoints.restore_params(position["step"], params)
        finally:
            checkpoints.close()
        described = {
            "dir": self._reference_dir,
            "step": position["step"],
            "fingerprint": _fingerprint(position),
            "shares": theirs.get("shares") or {},
        }
        program = jax.jit(
            make_excess_step(model, options, mesh),
            out_shardings=NamedSharding(mesh, PartitionSpec()),
        )
        return Reweighting(weights, program, reference, described, self._record_every_steps)


class Reweighting:
    """A DoReMi whose reference is in memory. On every process it holds the same numbers."""

    def __init__(
        self,
        weights: DomainWeights,
        excess_step: Callable[[Any, Any, Batch], jax.Array],
        reference_params: Any,
        reference: dict[str, Any],
        record_every_steps: int,
    ):
        """`reference`: dir, step, fingerprint and shares of it."""
        self._weights = weights
        self._excess_step, self._reference_params = excess_step, reference_params
        self._reference = reference
        self._record_every_steps = record_every_steps

    def reweigh(self, batch: Batch, params: Any, domains: np.ndarray) -> Batch:
        """The batch with the weights of its rows, after a step of the domains' weights.

        Waits for the device. `domains`: of the real rows, which come first.
        """
        excess = np.asarray(self._excess_step(params, self._reference_params, batch))
        self._weights.update(excess[: len(domains)], domains)
        rows = np.zeros(len(excess), np.float32)
        rows[: len(domains)] = self._weights.row_weights(domains)
        sharding = batch["weights"].sharding
        weights = jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])
        return batch | {"weights": weights}

    def undo(self) -> None:
        """The step whose batch was reweighed last was not taken."""
        self._weights.undo()

    def record(self, step: int) -> dict[str, Any]:
        """What metrics.jsonl gets of this step."""
        if step % self._record_every_steps:
            return {}
        found = {
            "domain_weight_by_language": self._weights.weights,
            "excess_loss_by_language": self._weights.excess,
        }
        return {
            key: {name: float(f"{x:.6g}") for name, x in self._weights.by_name(values).items()}
            for key, values in found.items()
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to keep (JSON)."""
        return self._weights.state() | {"reference": self._reference}

    def restore(self, state: dict[str, Any] | None) -> None:
        """From `state` of a checkpoint; None before step 1. BadInput for another reference or other settings."""
        if state is None:
            self._weights.reset()
            return
        there, here = state["reference"], self._reference
        if there["fingerprint"] != here["fingerprint"]:
            raise BadInput(
                f"the run began with step {there['step']} of {there['dir']} as its reference; step {here['step']} of "
                f"{here['dir']} holds other parameters (DoReMi.reference_dir, reference_step)"
            )
        self._weights.restore(state)


def make_excess_step(
    model: Bloom, options: StepOptions, mesh: Mesh
) -> Callable[[Any, Any, Batch], jax.Array]:
    """excess(params, reference_params, batch) -> mean over tokens of max(0, loss - loss of the reference) in nats of
    each row, float32 [B]; as many rows at a time as in a train step."""

    def excess_of(params, reference_params, batch):
        num_rows, length = batch["tokens"].shape
        ones_BL = jnp.ones((num_rows, length - 1), jnp.float32)
        proxy_BL, reference_BL = (
            row_losses(model, options, each, batch, ones_BL)[1]
            for each in (params, reference_params)
        )
        return jnp.mean(jnp.maximum(proxy_BL - reference_BL, 0.0), axis=1)

    def excess(params, reference_params, batch):
        tokens = batch["tokens"]
        num_rows = tokens.shape[0]
        num_parts = options.num_microbatches(num_rows // partitioning.num_batch_shards(mesh))
        if num_parts == 1:
            return excess_of(params, reference_params, {"tokens": tokens})

        def part(tokens):  # row r is of part r % num_parts: no row leaves its device
            tokens = partitioning.constrain_activation(tokens, "batch", None)
            return excess_of(params, reference_params, {"tokens": tokens})

        parts = jnp.swapaxes(tokens.reshape(num_rows // num_parts, num_parts, -1), 0, 1)
        return jnp.swapaxes(jax.lax.map(part, parts), 0, 1).reshape(num_rows)

    return excess


def _fingerprint(position: dict[str, Any]) -> int:
    """Of the parameters of a checkpoint."""
    found = {k: v for k, v in position["fingerprints"].items() if k.startswith(".params")}
    return zlib.crc32(json.dumps(found, sort_keys=True).encode())
