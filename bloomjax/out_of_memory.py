"""What a program wanted of a device that has no more memory, in one line, and what a person can change."""

import re
from typing import Any

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# XLA:TPU says at compilation what all of a program needs, and of how much.
NEEDED = (
    r"total memory required[^(]*\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)",
    r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm",
)
# Others, when a program starts: its temporaries are one allocation, and this one has failed.
_ASKED = r"[Oo]ut of memory.*?allocat\w+ ([\d.]+) ?([KMGT]?)(?:i?B\b|bytes)"
_REMEDY = (
    "`python -m bloomjax.plan` with the same gin files says what takes it; change StepOptions.microbatch_size_samples "
    "or --batch_tokens to less, BloomConfig.remat_policy to 'full', add ablations/bf16_state.gin, or take more devices"
)


def needed(message: str) -> tuple[float, float] | None:
    """Bytes that a TPU's compiler says a program needs, and bytes that there are; None if it says nothing of that."""
    for pattern in NEEDED:
        if found := re.search(pattern, message):
            return float(found[1]) * UNITS[found[2]], float(found[3]) * UNITS[found[4]]
    return None


def line(error: BaseException) -> str | None:
    """One line on an error of JAX that blames a device's memory; None for another error."""
    import jax

    message = str(error)
    if not isinstance(error, jax.errors.JaxRuntimeError):
        return None
    if both := needed(message):
        return _sentence(f"{_gib(both[0])} are needed and {_gib(both[1])} are there")
    if not (asked := re.search(_ASKED, message, re.DOTALL)):
        return None
    wanted = float(asked[1]) * UNITS[asked[2]]
    stats: dict[str, Any] = jax.local_devices()[0].memory_stats() or {}
    what = f"{_gib(wanted)} more were needed"
    if "bytes_in_use" in stats:
        what = f"{_gib(stats['bytes_in_use'])} are in use, and {what}"
    if "bytes_limit" in stats:
        what += f", of {_gib(stats['bytes_limit'])}"
    return _sentence(what)


def _sentence(what: str) -> str:
    import jax

    return f"out of memory on {jax.local_devices()[0].device_kind}: {what}; {_REMEDY}"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB"
