"""Held-out loss by language of a checkpoint: `python -m bloomjax.evaluate --gin_file=MODEL_DIR/config.gin`.

The configuration is that of `train`; later gin files and bindings may name other text, another mesh or dtype.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import jax
from absl import flags

from bloomjax import config, language_report
from bloomjax.model_dir import open_model_dir
from bloomjax.preflight import check_model, open_matching_vocabulary
from bloomjax.run import held_out_losses
from bloomjax.screen import print_columns
from bloomjax.startup import use_compilation_cache
from bloomjax.train_step import make_eval_step

_FLAGS = flags.FlagValues()
_STEP = flags.DEFINE_integer(
    "step", None, "Checkpoint of this step; the newest by default.", flag_values=_FLAGS
)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.", flag_values=_FLAGS)


def evaluate() -> None:
    """Prints the losses. BadInput where `train` would refuse the same configuration, or there is no such checkpoint."""
    model_dir = Path(config.build("train.model_dir"))
    trained = open_model_dir(model_dir, _STEP.value)
    model, options = config.build("train.model"), config.build("train.step")
    mesh = config.build("train.mesh").build()
    use_compilation_cache()
    data = config.build("train.train_data").open()
    check_model(model, mesh, [data.sequence_length])
    vocabulary = open_matching_vocabulary(config.build("train.vocabulary_path"), data, model)
    trained.check_vocabulary(vocabulary)
    params = trained.read_params(model, mesh)
    batches = config.build("train.eval_data").batches(data, mesh)
    with jax.set_mesh(mesh):
        found = held_out_losses(jax.jit(make_eval_step(model, options)), params, batches)
    bits = language_report.held_out_bits_per_byte(found["loss_by_language"], data.sources)
    found["bits_per_byte_by_language"] = bits
    found["validation_bits_per_byte"] = statistics.fmean(bits.values())
    if _JSON.value:
        print(json.dumps({"step": trained.step, **found}))
        return
    print(f"{model_dir}, step {trained.step}: held-out loss in nats a token")
    print_columns([f"{name:<16}{loss:6.3f}" for name, loss in found["loss_by_language"].items()])
    print(f"all languages: {found['validation_loss']:.3f}")
    print(f"bits per byte, mean over languages: {found['validation_bits_per_byte']:.3f}")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command, also with the arguments of a test."""
    config.call(evaluate, argv, _FLAGS)


if __name__ == "__main__":
    main()
