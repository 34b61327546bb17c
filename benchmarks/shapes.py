"""Models, optimizers and options of a step by the name of a size, as the shipped gin files have them.

Read by gin itself: of all that a run is made of, a benchmark needs three objects, and only their modules are imported.
"""

import ast
import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from bloomjax.errors import BadInput

# Not in gin/: "small" and "head" are what two CPU cores can measure, the latter mostly head; "toy" is for tests.
_OWN = {
    "toy": (512, 2, 64, 4),
    "small": (16_384, 4, 512, 8),
    "head": (65_536, 2, 512, 8),
}  # vocab_size, num_layers, emb_dim, num_heads
_GIN = ("560m", "1b1", "1b7", "3b", "7b1")
SIZES = (*_OWN, *_GIN)
# Rows and tokens of a step if none are given.
_BATCHES = {"toy": (2, 32), "small": (4, 512), "head": (4, 512)} | dict.fromkeys(_GIN, (8, 2048))
_HARDWARE = {"cpu": ["hardware/laptop.gin"], "gpu": ["hardware/h200_1.gin"], "tpu": []}
_CONFIGURABLES = (
    ("bloomjax.model", ("BloomConfig", "Bloom")),
    (
        "bloomjax.positions",
        ("NoPositions", "LearnedPositions", "SinusoidalPositions", "Rotary", "Alibi"),
    ),
    ("bloomjax.activations", ("Gelu", "SquaredRelu", "SwiGlu", "GeGlu", "ReGlu", "LiGlu")),
    ("bloomjax.optimizer", ("adamw",)),
    ("bloomjax.train_step", ("StepOptions",)),
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a step is made of.

    Attributes:
      model, optimizer, step: Bloom, an optax transformation and StepOptions.
      rows, length: of the batch; a row has `length` tokens to predict.
    """

    size: str
    model: Any
    optimizer: Any
    step: Any
    rows: int
    length: int

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.rows * self.length

    @property
    def dims(self) -> dict[str, int]:
        """As the functions of `bloomjax.flops` want them."""
        return self.config.shape

    def with_config(self, **changes: Any) -> "Setting":
        """The same with another BloomConfig."""
        model = type(self.model)(dataclasses.replace(self.config, **changes))
        return dataclasses.replace(self, model=model)

    def __str__(self) -> str:
        c = self.config
        return (
            f"{self.size}: {c.num_layers} layers x {c.emb_dim}, {c.num_heads} heads of {c.head_dim}, vocabulary "
            f"{c.vocab_size:,}, {self.rows} rows x {self.length} tokens"
        )


def setting(
    size: str, platform: str, *, rows: int | None = None, length: int | None = None,
    hardware: Sequence[str] | None = None, changes: Sequence[str] = (),
) -> Setting:  # fmt: skip
    """The size's gin file, then those of the hardware, then changes such as "StepOptions.loss_chunk_tokens=4096".

    Args:
      hardware: gin files; None for laptop.gin on CPUs and h200_1.gin on GPUs. Their mesh is not used.
      changes: values as Python writes them; what is no such value is text.

    Raises:
      BadInput: for a size, file, name or value that does not exist.
    """
    if size not in SIZES:
        raise BadInput(f"no size {size!r}; there are: {', '.join(SIZES)}")
    files = [] if size in _OWN else [f"{size}.gin"]
    files += _HARDWARE[platform] if hardware is None else hardware
    own = []
    if size in _OWN:
        files.insert(0, "bloom.gin")
        names = "VOCAB_SIZE", "NUM_LAYERS", "EMB_DIM", "NUM_HEADS"
        own = [f"{name} = {value}" for name, value in zip(names, _OWN[size], strict=True)]
        own.append("BloomConfig.scan_layers = False")
    model, optimizer, step = _build(files, own, [_binding(change) for change in changes])
    default_rows, default_length = _BATCHES[size]
    return Setting(size, model, optimizer, step, rows or default_rows, length or default_length)


def _binding(change: str) -> str:
    name, equals, text = (part.strip() for part in change.partition("="))
    if not equals or name.count(".") != 1:
        raise BadInput(f"--set={change}: write NAME.FIELD=VALUE, as BloomConfig.remat_policy=full")
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = text
    return f"{name} = {value!r}"


def _build(files: Sequence[str], own: Sequence[str], changes: Sequence[str]) -> tuple[Any, ...]:
    """Bloom, optimizer and StepOptions."""
    try:
        import gin
    except ImportError:
        raise BadInput("no gin here: pip install gin-config==0.5.0") from None
    from bloomjax import config

    config.register(_CONFIGURABLES)
    gin.clear_config()
    logging.disable(logging.ERROR)  # gin: an include is not in the working directory
    try:
        gin.add_config_file_search_path(str(config.gin_dir()))
        text = "\n".join([f"include {str(config.find(file))!r}" for file in files] + list(own))
        gin.parse_config(text, skip_unknown=True)  # data, checkpoints, schedules: of no use here
        for change in changes:
            gin.parse_config(change)
        return tuple(gin.get_configurable(name)() for name in ("Bloom", "adamw", "StepOptions"))
    except BadInput as error:  # gin appends where it was called
        raise BadInput(str(error).split("\n")[0]) from None
    except (ValueError, TypeError, OSError) as error:
        raise BadInput(
            f"gin: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        ) from None
    finally:
        logging.disable(logging.NOTSET)
        gin.clear_config()
