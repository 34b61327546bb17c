"""Named lists of evaluation tasks."""

import dataclasses

from bloomjax.errors import BadInput


@dataclasses.dataclass(frozen=True)
class TaskName:
    """A task under the name that was published, and what lm-evaluation-harness 0.4.13 calls it.

    Attributes:
      remark: what keeps numbers of today from being compared with those published.
      is_script: whether its data set is a script, which `datasets` 4 and later refuse
        (EleutherAI/lm-evaluation-harness issues 3171 and 3645).
    """

    published: str
    current: str
    remark: str = ""
    is_script: bool = False


# What BigScience evaluated its 1.3B models on, zero-shot (bigscience-workshop/bigscience, evaluation/results/tr3:
# *_agg.json; a 28th, mc_taco, has no accuracy there).
BIGSCIENCE_27 = (
    TaskName("arc_challenge", "arc_challenge"),
    TaskName("arc_easy", "arc_easy"),
    TaskName("boolq", "boolq"),
    TaskName("copa", "copa"),
    TaskName("headqa_en", "headqa_en"),
    TaskName("hellaswag", "hellaswag"),
    TaskName("lambada", "lambada_openai"),
    TaskName("logiqa", "logiqa", is_script=True),
    TaskName("mathqa", "mathqa"),
    TaskName("mrpc", "mrpc"),
    TaskName("multirc", "multirc", remark="accuracy by question then, by answer now"),
    TaskName("openbookqa", "openbookqa"),
    TaskName("piqa", "piqa"),
    TaskName("prost", "prost"),
    TaskName("pubmedqa", "pubmedqa", is_script=True),
    TaskName("qnli", "qnli"),
    TaskName("qqp", "qqp"),
    TaskName("race", "race"),
    TaskName("rte", "rte"),
    TaskName("sciq", "sciq"),
    TaskName("sst", "sst2"),
    TaskName("triviaqa", "triviaqa", remark="answers scored then, generated now (exact_match)"),
    TaskName("webqs", "webqs", remark="called exact_match now"),
    TaskName("wic", "wic"),
    TaskName("winogrande", "winogrande"),
    TaskName("wnli", "wnli"),
    TaskName("wsc", "wsc"),
)
PRESETS = {"bigscience27": BIGSCIENCE_27}
CURRENT_NAMES: dict[str, str] = {task.published: task.current for task in BIGSCIENCE_27}
SCRIPTS = {task.current for task in BIGSCIENCE_27 if task.is_script}
# The metric of a task's row in a table: the first of these that it has.
MAIN_METRICS = (
    "acc", "exact_match", "em", "f1", "bits_per_byte", "word_perplexity", "perplexity",
)  # fmt: skip


def expand(names: str) -> list[str]:
    """Task names of `--tasks`: presets replaced by their tasks, each task once. BadInput if there are none."""
    found: list[str] = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        found += [task.current for task in PRESETS[name]] if name in PRESETS else [name]
    if not found:
        raise BadInput(f"--tasks names no task; presets: {', '.join(PRESETS)}")
    return list(dict.fromkeys(found))
