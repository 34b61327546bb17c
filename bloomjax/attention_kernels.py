"""The attention kernels by name, all with the signature of `attention.xla_attention`."""

from collections.abc import Callable

import jax

from bloomjax.attention import xla_attention
from bloomjax.blocked_attention import blocked_attention
from bloomjax.errors import BadInput

KERNELS: dict[str, Callable[..., jax.Array]] = {
    "xla": xla_attention,
    "xla_blocked": blocked_attention,
}


def get_kernel(name: str) -> Callable[..., jax.Array]:
    """The attention function called `name`; BadInput names those that exist."""
    if name not in KERNELS:
        raise BadInput(f"no attention kernel {name!r}; there are: {', '.join(KERNELS)}")
    return KERNELS[name]
