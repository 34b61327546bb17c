"""What the gin file of a test may name besides the library; the only module here that imports gin for it."""

import time

import gin
import tiny_run

gin.external_configurable(tiny_run.FirstDevices)


@gin.configurable
class SlowWriter:
    """Makes each step take 50 ms at least, so that a test can end a run in the middle."""

    def __init__(self, logdir: str, first_step: int):
        del logdir, first_step

    def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
        del step, scalars
        time.sleep(0.05)

    def write_texts(self, step: int, texts: dict[str, str]) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass
