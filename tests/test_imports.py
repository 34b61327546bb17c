"""Who imports whom, what a run must not load, how long things may be, and that every gin file can be read."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
from tiny_run import REPOSITORY

from bloomjax import config

# A module imports only from its own layer and those below; verbs stand above all others.
LAYERS = (
    {"errors", "files", "examples", "out_of_memory"},
    {
        "config",
        "attention",
        "losses",
        "loss_chunks",
        "schedules",
        "partitioning",
        "flops",
        "startup",
        "job",
        "journal",
        "checkpoint_manifest",
        "checkpoint_folder",
        "checkpoint_saving",
        "ledger",
        "distributed",
        "hlo",
        "jaxpr_flops",
        "float8",
        "pointwise",
        "gradients",
        "mup",
    },
    {"chips", "targets", "roofline"},
    {"energy", "noise_scale"},
    {"minimise", "scaling_laws", "scaling_runs", "scaling_fits"},
    {"frontier_fits", "language_laws", "loss_curves"},
    {
        "embedding",
        "dense",
        "blocked_attention",
        "block_skipping",
        "cached_attention",
        "activations",
        "layers",
        "positions",
        "cudnn_attention",
        "hopper_blocks",
    },
    {"flash_attention"},
    {"triton_kernels"},
    {"flash_attention_gpu", "flash_attention_hopper", "flash_attention_tpu"},
    {"attention_kernels"},
    {"kernel_check"},
    {"local_shards", "kvstores"},
    {"watchdog", "stragglers", "guard", "stops", "energy_meter", "predicted_loss"},
    {
        "model",
        "optimizer",
        "mixture",
        "mixture_weights",
        "phases",
        "skips",
        "token_store",
        "vocabulary",
        "doremi",
        "objectives",
    },
    {"hf", "curriculum"},
    {"task_text", "prepare_pool", "prepare_beam", "prepare_shards"},
    {"prefix_cache", "task_presets"},
    {"decoding", "hf_tokenizer", "vocabulary_report", "language_report"},
    {"scoring", "decoding_until", "results_table"},
    {"harness", "lm_eval_model"},
    {"train_state"},
    {"train_step", "data", "checkpoints", "health", "metrics", "drift", "fault"},
    {"position", "screen", "language_noise", "reweighting"},
    {"run", "preflight", "model_dir", "checkpoint_arrays", "hf_folder"},
    {"hf_verify", "hf_model"},
    {"plan_measure", "plan_suggest", "plan_report"},
    {"plan"},
    {"train", "evaluate", "generate", "prepare", "verify_store", "export", "import_hf"},
)
MAY_IMPORT_CONFIG = {
    "preflight", "model_dir", "train", "evaluate", "generate", "prepare", "verify_store", "export",
    "import_hf", "plan",
}  # fmt: skip
HEAVY = {
    "tensorflow", "tensorflow_text", "tensorflow_datasets", "seqio", "torch", "transformers", "lm_eval", "datasets",
}  # fmt: skip


def modules():
    return {path.stem: path for path in sorted((REPOSITORY / "bloomjax").glob("*.py"))}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(tree: ast.AST) -> set[str]:
    """Full names of what is imported anywhere below `tree`: 'bloomjax.model', 'numpy', ..."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(names: set[str]) -> set[str]:
    """Which modules of bloomjax these names come from ('tasks' for any below it)."""
    return {name.split(".")[1] for name in names if name.startswith("bloomjax.")}


def imported_when_loaded(tree: ast.Module) -> set[str]:
    """Imports that are executed when the module is: not those inside functions."""
    found: set[str] = set()
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            found |= imported(node)
    return found


def edges() -> dict[str, set[str]]:
    return {
        name: own(imported(parse(path))) & modules().keys() - {name}
        for name, path in modules().items()
    }


def test_every_module_has_a_layer():
    placed = [name for layer in LAYERS for name in layer]
    assert len(placed) == len(set(placed))
    assert set(placed) == modules().keys() - {"__init__"}, "put a new module into LAYERS"


def test_imports_go_downwards():
    level = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    graph = edges()
    assert graph["train"] and graph["model"] and not graph["errors"]  # the walk sees something
    upward = [
        (a, b) for a, found in graph.items() if a in level for b in found if level[b] > level[a]
    ]
    assert not upward
    assert {a for a, found in graph.items() if "config" in found} <= MAY_IMPORT_CONFIG


def test_no_circle():
    graph, state = edges(), {}

    def visit(name, path):
        assert state.get(name) != "open", f"circle: {' -> '.join([*path, name])}"
        if name not in state:
            state[name] = "open"
            for other in graph[name]:
                visit(other, [*path, name])
            state[name] = "done"

    for name in graph:
        visit(name, [])


@pytest.mark.parametrize("name", modules())
def test_what_a_module_of_the_library_may_import(name):
    tree = parse(modules()[name])
    everything = {each.split(".")[0] for each in imported(tree)}
    at_once = {each.split(".")[0] for each in imported_when_loaded(tree)}
    assert not everything & {"tools", "tests", "tasks", "benchmarks"}
    assert "tasks" not in own(imported(tree)), "tasks are imported by the name that gin gives"
    assert name == "config" or "gin" not in everything
    assert not at_once & HEAVY
    may = {"task_text", "hf_verify", "harness", "lm_eval_model"}
    assert name in may or not everything & HEAVY


def test_tasks_load_nothing_heavy_and_import_little():
    paths = sorted((REPOSITORY / "tasks").glob("*.py"))
    assert len(paths) >= 4
    for path in paths:
        tree = parse(path)
        assert not {each.split(".")[0] for each in imported_when_loaded(tree)} & HEAVY, path
        assert own(imported(tree)) <= {
            "errors",
            "examples",
            "mixture_weights",
            "vocabulary",
            "tasks",
        }, path
    assert (
        not {each.split(".")[0] for each in imported(parse(REPOSITORY / "tasks/languages.py"))}
        & HEAVY
    )


def test_importing_train_loads_no_tensorflow():
    program = (
        "import sys, bloomjax.train, bloomjax.generate, bloomjax.evaluate; print(*sys.modules)"
    )
    result = tiny_run.execute([sys.executable, "-c", program])
    assert result.returncode == 0, result.stderr
    loaded = {name.split(".")[0] for name in result.stdout.split()}
    assert "jax" in loaded and not loaded & HEAVY


def test_the_guard_of_the_commands_works():
    """tiny_run.environment, under which test_train.py runs whole runs: what tries to load TensorFlow dies."""
    finds = "import importlib.util; print(importlib.util.find_spec('json') is not None)"
    assert tiny_run.execute([sys.executable, "-c", finds]).stdout == "True\n"
    loads = "import sys\ntry:\n    import torch\nexcept BaseException: pass\nprint('alive')"
    if importlib_finds("torch"):
        result = tiny_run.execute([sys.executable, "-c", loads])
        assert result.returncode == 97 and "torch was loaded" in result.stderr
    program = "import sys; print(sys.meta_path[0].__name__)"
    assert tiny_run.execute([sys.executable, "-c", program]).stdout == "_Finder\n"


def importlib_finds(name: str) -> bool:
    result = subprocess.run(
        [sys.executable, "-c", f"import importlib.util; print(importlib.util.find_spec('{name}') is not None)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return result.stdout.strip() == "True"


def python_files() -> list[Path]:
    found = []
    for folder in ("bloomjax", "tasks", "tools"):
        found += (REPOSITORY / folder).rglob("*.py")
    return sorted(path for path in found if "demo_corpus" not in path.parts)


def test_no_function_has_more_than_100_lines():
    long, longest = [], 0
    for path in python_files():
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                num_lines = node.end_lineno - first + 1
                longest = max(longest, num_lines)
                if num_lines > 100:
                    long.append(f"{path.name}: {node.name} has {num_lines}")
    assert longest > 30 and not long, long


def test_from_command_to_train_step_is_a_short_way():
    names = ("train", "train_step", "model", "attention", "partitioning", "losses")
    num_lines = {name: len(modules()[name].read_text().splitlines()) for name in names}
    assert sum(num_lines.values()) <= 1250, num_lines


# ---- gin files ----

REQUIRED = {
    "MODEL_DIR": "'runs/x'", "STORE_DIR": "'runs/y'", "VOCABULARY": "'v.model'", "TEXT_DIR": "'text'",
    "REFERENCE_DIR": "'runs/z'",
}  # fmt: skip


@pytest.mark.parametrize("path", sorted((REPOSITORY / "gin").glob("*.gin")), ids=lambda p: p.stem)
def test_every_gin_file_is_whole(path):
    """Every key exists and has a value of its type, and nothing is missing but what a person gives."""
    # A part of others: bloom.gin, pretrain.gin and roots.gin below a size, text_files.gin and continue.gin above one.
    parts = {
        "bloom": ["tiny.gin"],
        "pretrain": ["tiny.gin"],
        "roots": ["176b.gin"],
        "text_files": ["tiny.gin", "text_files.gin"],
        "continue": ["tiny.gin", "continue.gin"],
        "doremi": ["tiny.gin", "doremi.gin"],
    }
    files = parts.get(path.stem, [path.name])
    texts = [config.find(file).read_text() for file in (*files, "pretrain.gin")]
    names = set(re.findall(r"%([A-Z_]+)", "".join(texts)))
    bindings = [f"{name} = {value}" for name, value in REQUIRED.items() if name in names]
    try:
        config._parse(files, bindings, config.CONFIGURABLES)
        reach = config._Reach()
        for verb in ("train", "prepare"):
            reach.call(config._configurable(verb))
        config._check(reach)
        assert not [key for key in config._keys() if key not in reach.used]
    finally:
        config._parse([], [], config.CONFIGURABLES)  # nothing of it for the next test
    assert config.build("train.seed", files[0]) == (1234 if path.stem == "1b3" else 42)
