"""How good a model is: held-out loss by language, and the tasks of lm-evaluation-harness.

    python -m bloomjax.evaluate --checkpoint=MODEL_DIR                          loss and bits per byte of held-out text
    python -m bloomjax.evaluate --checkpoint=MODEL_DIR --tasks=bigscience27     tasks, also of a Hugging Face folder

The configuration of the loss is that of `train`; `--gin_file` in place of `--checkpoint`, later gin files and bindings
may name other text, another mesh or dtype. A Hugging Face folder has no text: there `--gin_file` names that of a run.
"""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import jax
from absl import flags

from bloomjax import config, harness, language_report, results_table, task_presets
from bloomjax.errors import BadInput
from bloomjax.files import one_line_errors, write_whole
from bloomjax.hf_model import HFModel, open_model
from bloomjax.lm_eval_model import language_model
from bloomjax.model import Bloom
from bloomjax.model_dir import Trained, open_model_dir
from bloomjax.preflight import check_model, open_matching_vocabulary
from bloomjax.run import held_out_losses
from bloomjax.scoring import Scorer
from bloomjax.screen import print_columns
from bloomjax.startup import use_compilation_cache
from bloomjax.train_step import make_eval_step

_FLAGS = flags.FlagValues()
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "MODEL_DIR of a run, or a Hugging Face folder.",
    flag_values=_FLAGS,
)  # fmt: skip
_STEP = flags.DEFINE_integer(
    "step", None, "Checkpoint of this step; the newest by default.", flag_values=_FLAGS
)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.", flag_values=_FLAGS)
_TASKS = flags.DEFINE_string(
    "tasks", None,
    f"Tasks of lm-evaluation-harness with commas between, or {' or '.join(task_presets.PRESETS)}.",
    flag_values=_FLAGS,
)  # fmt: skip
_INCLUDE_PATH = flags.DEFINE_string(
    "include_path", None, "Folder with task files of your own.", flag_values=_FLAGS
)
_NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", None, "Solved examples before each question; by default as the tasks have it.",
    flag_values=_FLAGS, lower_bound=0,
)  # fmt: skip
_LIMIT = flags.DEFINE_integer(
    "limit", None, "Only the first documents of each task.", flag_values=_FLAGS, lower_bound=1
)
_SKIP_MISSING = flags.DEFINE_bool(
    "skip_missing", False, "Leave tasks out whose data is not there.", flag_values=_FLAGS
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "JSON file for the results of the tasks.", flag_values=_FLAGS
)
_BESIDE = flags.DEFINE_multi_string(
    "beside", [],
    "Results to print beside ours: a file of --output, or a *_agg.json of BigScience. Without --checkpoint and --tasks "
    "only these are printed.",
    flag_values=_FLAGS,
)  # fmt: skip
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Of the compute; the model's own by default.",
    flag_values=_FLAGS,
)  # fmt: skip
_MAX_LENGTH = flags.DEFINE_integer(
    "max_length", None, "Tokens that a task may put in; those of training by default.",
    flag_values=_FLAGS, lower_bound=2,
)  # fmt: skip
_BATCH_TOKENS = flags.DEFINE_integer(
    "batch_tokens", None, "Tokens a task computes at a time on each device that splits the batch.",
    flag_values=_FLAGS, lower_bound=1,
)  # fmt: skip
_PREFIX_TOKEN_ID = flags.DEFINE_integer(
    "prefix_token_id", None, "Stands before a text without context; <s> (1) by default.",
    flag_values=_FLAGS, lower_bound=0,
)  # fmt: skip
_BATCH_TOKENS_OF = {"cpu": 2048}  # by platform
_BATCH_TOKENS_OF_OTHERS = 16_384


def evaluate() -> None:
    """Prints what the flags ask for. BadInput for flags that do not fit together, and as the parts say."""
    beside = [results_table.read_results(Path(path)) for path in _BESIDE.value]
    if _TASKS.value is not None:
        evaluate_tasks(beside)
    elif beside and not _CHECKPOINT.value:
        print(results_table.markdown(beside))
    elif beside or _OUTPUT.value:
        raise BadInput("--beside and --output belong to --tasks")
    else:
        evaluate_losses()


def evaluate_losses() -> None:
    """Held-out loss by language. BadInput where `train` would refuse the same configuration, or there is no such
    checkpoint."""
    if _CHECKPOINT.value:
        trained = open_model(Path(_CHECKPOINT.value), _STEP.value)
    else:
        trained = open_model_dir(Path(config.build("train.model_dir")), _STEP.value)
    if isinstance(trained, Trained):
        config.use_gin_file(trained.path / "config.gin")
        model = _of_dtype(config.build("train.model"))
    else:
        if not any(flag.startswith("--gin_file=") for flag in config.arguments()):
            raise BadInput(
                f"{trained.path} is a Hugging Face folder and has no held-out text: --gin_file=MODEL_DIR/config.gin "
                "takes that of a run with this vocabulary; --tasks needs none"
            )
        model = _of_dtype(trained.model)
    options = config.build("train.step")
    mesh = config.build("train.mesh").build()
    use_compilation_cache()
    data = config.build("train.train_data").open()
    check_model(model, mesh, [data.sequence_length])
    path = config.build("train.vocabulary_path")
    trained.check_vocabulary(open_matching_vocabulary(path, data, model))
    params = trained.read_params(model, mesh)
    batches = config.build("train.eval_data").batches(data, mesh)
    with jax.set_mesh(mesh):
        found = held_out_losses(jax.jit(make_eval_step(model, options)), params, batches)
    found |= language_report.bits_of(found["loss_by_language"], data.sources, data.objective)
    if _JSON.value:
        print(json.dumps({"step": trained.step, **found}))
        return
    step = "" if trained.step is None else f", step {trained.step}"
    bits = found.get("bits_per_byte_by_language", {})
    print(f"{trained.path}{step}: held-out loss in nats a token" + ", bits per byte" * bool(bits))
    print_columns([
        f"{name:<16}{loss:6.3f}" + (f" {bits[name]:6.3f}" if bits else "")
        for name, loss in found["loss_by_language"].items()
    ])  # fmt: skip
    print(f"all languages: {found['validation_loss']:.3f}")
    if "validation_bits_per_byte" in found:
        print(f"bits per byte, mean over languages: {found['validation_bits_per_byte']:.3f}")


def evaluate_tasks(beside: Sequence[results_table.Results]) -> None:
    """The tasks of --tasks: a table, and JSON where it is asked for."""
    names = task_presets.expand(_TASKS.value or "")
    if not _CHECKPOINT.value:
        raise BadInput("--tasks needs --checkpoint=MODEL_DIR or a Hugging Face folder")
    harness.check_installed()
    path = Path(_CHECKPOINT.value)
    trained = open_model(path, _STEP.value)
    if trained.vocabulary is None:
        raise BadInput(f"{path} has no tokenizer, so no task can be put to it")
    use_compilation_cache()
    loaded = harness.load_tasks(names, _INCLUDE_PATH.value, skip_missing=_SKIP_MISSING.value)
    scorer = open_scorer(trained)
    model = language_model(scorer, trained.vocabulary, prefix_token_id=_PREFIX_TOKEN_ID.value)
    start = time.monotonic()
    found = harness.run_tasks(
        model, loaded, num_fewshot=_NUM_FEWSHOT.value, limit=_LIMIT.value
    )  # fmt: skip
    seconds = time.monotonic() - start
    found = {
        "checkpoint": str(path), "step": trained.step, "dtype": scorer.model.config.dtype,
        "max_length": scorer.max_length, **found,
    }  # fmt: skip
    text = json.dumps(found)
    if _OUTPUT.value:
        with one_line_errors(f"cannot write {_OUTPUT.value}"):
            write_whole(Path(_OUTPUT.value), text.encode() + b"\n")
    if _JSON.value:
        print(text)
        return
    num = sum(found["num_documents"].values())
    step = "" if trained.step is None else f", step {trained.step}"
    print(
        f"{path}{step} in {found['dtype']}: {num:,} documents, {seconds:.0f} s, {len(scorer.shapes)} shapes compiled"
    )
    ours = results_table.Results("this model", found["results"], found["groups"])
    print(results_table.markdown([ours, *beside]))


def open_scorer(trained: Trained | HFModel) -> Scorer:
    """The model on its mesh: that of the run, or of --gin.MeshShape.*; BadInput if it does not fit."""
    is_run = isinstance(trained, Trained)
    config.use_gin_file(trained.path / "config.gin" if is_run else "pretrain.gin")
    mesh = config.build("train.mesh").build()
    model = _of_dtype(trained.model)
    check_model(model, mesh, [])
    platform = mesh.devices.flat[0].platform
    return Scorer(
        model, trained.read_params(model, mesh), mesh,
        max_length=_MAX_LENGTH.value or trained.sequence_length,
        batch_tokens=_BATCH_TOKENS.value or _BATCH_TOKENS_OF.get(platform, _BATCH_TOKENS_OF_OTHERS),
        sees_whole_context=trained.objective.sees_whole_prompt(),
    )  # fmt: skip


def _of_dtype(model: Bloom) -> Bloom:
    """That of --dtype, or its own."""
    if not _DTYPE.value:
        return model
    return Bloom(dataclasses.replace(model.config, dtype=_DTYPE.value))


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command, also with the arguments of a test."""
    config.call(evaluate, argv, _FLAGS)


if __name__ == "__main__":
    main()
