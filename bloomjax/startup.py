"""What a process settles before it computes: where compiled programs are kept, how freed memory is reused."""

import ctypes
import os

import jax

from bloomjax.distributed import Cluster


def use_compilation_cache(directory: str | None = None) -> None:
    """Keeps compiled programs, so that a second start compiles nothing.

    In `directory`, else in JAX_COMPILATION_CACHE_DIR, else in ~/.cache/bloomjax/xla.
    """
    directory = directory or os.environ.get("JAX_COMPILATION_CACHE_DIR")
    directory = directory or os.path.expanduser("~/.cache/bloomjax/xla")
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def claim_gpu_memory() -> None:
    """Lets JAX take 92 % of a GPU's memory, which `plan` reckons with, unless the environment says otherwise (its own
    default is 75 %). Works only before JAX has looked for devices.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")


def keep_freed_memory() -> None:
    """Makes glibc reuse the buffers of a step on the CPU, which it would unmap and fault in again at every step.

    That is a quarter of a tiny step. Works only before JAX has started its threads; without glibc it does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in (
            (-4, 0),
            (-1, -1),
            (-8, 1),
        ):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX
            mallopt(parameter, value)


def begin_process(
    cluster: Cluster | None, reuse_host_memory: bool, compilation_cache_dir: str | None
) -> None:
    """All of it for a process that trains, in the order it has to be done; joins the other processes."""
    claim_gpu_memory()
    if reuse_host_memory:
        keep_freed_memory()
    if cluster is not None:
        cluster.start()
    use_compilation_cache(compilation_cache_dir)
