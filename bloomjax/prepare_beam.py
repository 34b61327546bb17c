"""Tasks for an Apache Beam runner, where one machine and one Slurm job are too little.

Beam wants an environment of its own: its protobuf is older than the one the trainer's packages use.
"""

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

from bloomjax.errors import BadInput


def run(
    function: Callable[[Any], Any], tasks: Sequence[Any], runner: str, options: Sequence[str]
) -> None:
    """Calls `function(task)` for every task in a Beam pipeline, and waits for all of them.

    Args:
      function: and the tasks: things that can be pickled; workers can import bloomjax.
      tasks: done in any order, some perhaps more than once.
      runner: 'DirectRunner', 'FlinkRunner', 'SparkRunner', 'DataflowRunner'.
      options: flags of the runner, such as '--flink_master=host:8081'.

    Raises:
      BadInput: Beam is not installed, it does not know the runner, or the function raised it.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise BadInput(
            f"--runner={runner} needs Apache Beam ({error.name} is not installed): "
            f"pip install 'bloomjax[data,beam]' in an environment of its own"
        ) from None
    # It logs the traceback of an error that is raised here anyway.
    logging.getLogger("apache_beam.runners.common").setLevel(logging.CRITICAL)
    try:
        pipeline = beam.Pipeline(options=PipelineOptions([f"--runner={runner}", *options]))
    except (ValueError, SystemExit) as error:
        raise BadInput(f"Apache Beam: {' '.join(str(error).split())}") from None
    _ = (
        pipeline
        | "Shards" >> beam.Create(list(tasks))
        # Else the runner fuses this with the next step and one worker does everything.
        | "Spread" >> beam.Reshuffle()
        | "Tokenise" >> beam.Map(function)
    )
    try:
        state = pipeline.run().wait_until_finish()
    except Exception as error:
        # Runners say what was raised in their own words; one that is local raises it again.
        message = str(error) if isinstance(error, BadInput) else ""
        found = re.search(r"BadInput: (.*)", str(error))
        message = message or (found.group(1) if found else "")
        if not message:
            raise
        raise BadInput(re.split(r" \[while running|\\n", message)[0]) from None
    if state != "DONE":
        raise BadInput(f"the {runner} ended in the state {state}")
