"""Whether bloomjax and transformers compute the same from the two sides of an export or import."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bloomjax import hf
from bloomjax.errors import BadInput
from bloomjax.model import Bloom
from bloomjax.model_dir import Trained
from bloomjax.mup import widths_of

# What transformers, in float32 too, may differ by: the order in which sums are taken.
TOLERANCE = 1e-5
_MAX_TOKENS = 64
_TEXTS = (
    "The market opens at eight, and by nine all the bread is gone.",
    "Demain, s'il fait beau, nous irons à pied jusqu'à la rivière.",
    "हम कल सुबह नदी के किनारे मिलेंगे।",
    "明天早上我们在河边见面，好吗？",
    "سنلتقي غدا صباحا عند النهر.",
    "def mean(values):\n    return sum(values) / len(values)\n",
)


def check_installed() -> None:
    """BadInput unless torch and transformers can be imported."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise BadInput(
            f"--verify compares with transformers and needs torch: pip install torch transformers ({error})"
        ) from None


def relative_difference(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, int]:
    """Largest |difference| over the largest |theirs|, and at how many positions the likeliest token differs.

    Logits [N, V] of N positions that hold tokens; NaN if one of them is.
    """
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    difference = float(np.abs(a - b).max() / np.abs(b).max())
    return difference, int((a.argmax(-1) != b.argmax(-1)).sum())


def verify(trained: Trained, folder: Path, dtype: str) -> bool:
    """Prints how far the logits of `trained` and `folder` differ in float32, and token ids; whether both are equal.

    `dtype` is that of the folder's weights: ours are rounded as they were, so that nothing but the conversion shows.
    """
    rows = _sample_rows(trained)
    numbers = hf.NUMPY_DTYPES[dtype]
    params = widths_of(trained.model.config).rounded(trained.read_params(), numbers)
    difference, num_other = relative_difference(
        our_logits(trained.model, params, rows), their_logits(folder, rows)
    )
    num = sum(map(len, rows))
    same = difference <= TOLERANCE and num_other == 0
    print(
        f"verify: {num} tokens of sample text, float32 on both sides: largest difference {difference:.1e} of the "
        f"largest logit (at most {TOLERANCE:.0e}), likeliest token differs at {num_other}: "
        f"{'equal' if same else 'NOT EQUAL'}"
    )
    if trained.vocabulary is None:
        return same
    theirs = their_ids(folder, _TEXTS)
    wrong = [
        text
        for text, ids in zip(_TEXTS, theirs, strict=True)
        if ids != trained.vocabulary.encode(text)
    ]
    found = f"other token ids for {wrong[0]!r}" if wrong else "the same token ids"
    print(f"verify: AutoTokenizer gives {found}")
    return same and not wrong


def _sample_rows(trained: Trained) -> list[list[int]]:
    vocabulary = trained.vocabulary
    if vocabulary is not None:
        return [vocabulary.encode(text)[:_MAX_TOKENS] for text in _TEXTS]
    rng = np.random.default_rng(0)
    size = trained.model.config.num_valid_tokens or trained.model.config.vocab_size
    return rng.integers(0, size, (len(_TEXTS), _MAX_TOKENS)).tolist()


def our_logits(model: Bloom, params: Any, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """float32 logits [all tokens of all rows, V without masked padding] of the model in float32."""
    exact = dataclasses.replace(model.config, dtype="float32", alibi_rounding="exact")
    model = Bloom(exact)

    @jax.jit
    def logits(params, tokens_BL):
        x_BLD = model.apply({"params": params}, tokens_BL)
        return model.apply({"params": params}, x_BLD, method="logits")

    longest = max(map(len, rows))
    tokens_BL = np.zeros((len(rows), longest), np.int32)
    for row, ids in enumerate(rows):
        tokens_BL[row, : len(ids)] = ids
    with jax.default_matmul_precision("highest"):
        logits_BLV = np.asarray(logits(params, tokens_BL))
    logits_BLV = logits_BLV[..., : model.config.num_valid_tokens]
    return np.concatenate([logits_BLV[row, : len(ids)] for row, ids in enumerate(rows)])


def their_logits(folder: Path, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """The same of transformers, row by row."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()
    with torch.no_grad():
        found = [model(torch.tensor([ids])).logits[0].numpy() for ids in rows]
    return np.concatenate(found)


def their_ids(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    """Token ids that AutoTokenizer gives."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    return [tokenizer(text)["input_ids"] for text in texts]
