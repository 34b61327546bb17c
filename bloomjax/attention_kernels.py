"""The attention kernels by name, the choice among them by platform, and their place on a mesh.

Dimension key: B batch, L query length, S key length, H heads, K head_dim. Arrays end in their letters.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from bloomjax import partitioning
from bloomjax.attention import xla_attention
from bloomjax.blocked_attention import blocked_attention
from bloomjax.cudnn_attention import cudnn_attention
from bloomjax.errors import BadInput
from bloomjax.flash_attention import flash_attention

_ON_CPU_WHOLE_UP_TO = 1024  # tokens; beyond, blocks of queries spare 3/8 of the scores
# Imported when used: Pallas takes its time.
_FLASH = {
    "flash_gpu": ("bloomjax.flash_attention_gpu", "KERNEL"),
    "flash_hopper": ("bloomjax.flash_attention_hopper", "KERNEL"),
    "flash_tpu": ("bloomjax.flash_attention_tpu", "TPU_KERNEL"),
}
KERNELS = ("auto", "xla", "xla_blocked", "cudnn", *_FLASH)
_PLATFORM_OF = {"cudnn": "gpu", "flash_gpu": "gpu", "flash_hopper": "gpu", "flash_tpu": "tpu"}


def attend(
    name: str,
    q_BLHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    slopes_H: jax.Array | None,
    *,
    documents_BL: jax.Array | None = None,
    last_key_BL: jax.Array | None = None,
    rounding: str = "exact",
    dropout_rate: float = 0.0,
    dropout_rng: jax.Array | None = None,
    skip_far_blocks: bool = True,
) -> jax.Array:
    """`attention.xla_attention` by the kernel called `name`.

    xla holds all scores of a window, xla_blocked those of 512 queries; the others hold none. "auto" takes the kernel of
    the platform (that of the mesh, else JAX's default): flash_gpu, flash_tpu, on a CPU and where those cannot do it one
    of the two of XLA. A kernel that was named is never replaced: what it cannot do is BadInput.
    With `skip_far_blocks` flash kernels leave out keys too far away for float32 (`block_skipping`). `slopes_H` None is
    attention without a bias: flash kernels compute none, and nothing is far away.
    """
    check_kernel(name)
    is_plain = rounding == "exact" and (dropout_rate == 0.0 or dropout_rng is None)
    if name == "auto":
        name = _kernel_of(platform(), is_plain, q_BLHK.shape[1], q_BLHK.shape[3], q_BLHK.dtype)
    no_bias_H = jnp.zeros(q_BLHK.shape[2])
    if name in ("xla", "xla_blocked"):
        kernel = xla_attention if name == "xla" else blocked_attention
        return kernel(
            q_BLHK, k_BSHK, v_BSHK, no_bias_H if slopes_H is None else slopes_H, documents_BL=documents_BL,
            last_key_BL=last_key_BL,
            rounding=rounding, dropout_rate=dropout_rate, dropout_rng=dropout_rng,
        )  # fmt: skip
    if not is_plain:
        what = "attention dropout" if rounding == "exact" else f"alibi_rounding={rounding!r}"
        raise BadInput(f"attention kernel {name!r} has no {what}; take 'xla' or 'xla_blocked'")
    if platform() != _PLATFORM_OF[name]:
        raise BadInput(
            f"attention kernel {name!r} is for {_PLATFORM_OF[name].upper()}s, and this is a {platform().upper()}; "
            "'auto' takes what fits"
        )
    if name == "cudnn":
        if documents_BL is not None or last_key_BL is not None:
            raise BadInput(
                "attention kernel 'cudnn' is causal over whole windows: no documents, no prefix; take 'flash_gpu'"
            )
        slopes_H = no_bias_H if slopes_H is None else slopes_H
        return _on_each_device(_cudnn, q_BLHK, k_BSHK, v_BSHK, slopes_H, None, None)
    kernel = functools.partial(_flash, flash_kernel(name), skip_far_blocks and slopes_H is not None)
    return _on_each_device(kernel, q_BLHK, k_BSHK, v_BSHK, slopes_H, documents_BL, last_key_BL)


def check_kernel(name: str) -> None:
    """BadInput, naming those that exist, for a kernel that does not."""
    if name not in KERNELS:
        raise BadInput(f"no attention kernel {name!r}; there are: {', '.join(KERNELS)}")


def flash_kernel(name: str) -> Any:
    """The `flash_attention.FlashKernel` of this name."""
    module, attribute = _FLASH[name]
    return getattr(importlib.import_module(module), attribute)


def platform() -> str:
    """ "cpu", "gpu" or "tpu": of the devices of `jax.set_mesh`, absent ones included; without them JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = device.platform if device is not None else jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def _kernel_of(platform_name: str, is_plain: bool, length: int, head_dim: int, dtype: Any) -> str:
    if is_plain and platform_name in ("gpu", "tpu"):
        flash = f"flash_{platform_name}"
        if flash_kernel(flash).takes(head_dim, dtype):
            return flash
    is_short = platform_name == "cpu" and length <= _ON_CPU_WHOLE_UP_TO
    return "xla" if is_short else "xla_blocked"


def _cudnn(q_BLHK, k_BSHK, v_BSHK, slopes_H, documents_BL, last_key_BL):
    del documents_BL, last_key_BL
    return cudnn_attention(q_BLHK, k_BSHK, v_BSHK, slopes_H)


def _flash(kernel, skip_far_blocks, q_BLHK, k_BSHK, v_BSHK, slopes_H, documents_BL, last_key_BL):
    return flash_attention(
        kernel, q_BLHK, k_BSHK, v_BSHK, slopes_H, documents_BL=documents_BL, last_key_BL=last_key_BL,
        skip_far_blocks=skip_far_blocks,
    )  # fmt: skip


def _on_each_device(kernel: Callable[..., jax.Array], *arrays: Any) -> jax.Array:
    """Compilers cannot split a kernel: every device runs it on its rows and heads, and there is nothing to exchange."""
    if not partitioning.on_mesh():
        return kernel(*arrays)
    rows = P(partitioning.BATCH_AXES)
    heads = P(partitioning.BATCH_AXES, None, "tensor")
    in_specs = (heads, heads, heads, P("tensor"), rows, rows)
    return jax.shard_map(kernel, in_specs=in_specs, out_specs=heads, check_vma=False)(*arrays)
