"""The module map as a test: who may import whom, and who may import the heavy libraries.

A module imports its own layer or lower ones, never in a circle; imports inside functions and under TYPE_CHECKING count.
A new module gets its layer here.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import sparselt_dist

PACKAGE = Path(sparselt_dist.__file__).parent

# A name with a dot at its end stands for all modules of that package.
LAYERS: dict[int, str] = {
    # the configuration and what can be checked of it without torch
    0: "errors redaction config config_layers config_checks architectures budget ds_config run_plan objectives.settings",
    # parts that know neither a model nor an objective
    1: """allocator config_loading device distributed expected_curve extensions follower journal landing metrics planning
          hang launcher_watch rank_line rank_log rank_report remote_environment remote_ranks supervisor spikes watchdog
          data.
          objectives objectives.base objectives.cost""",
    # models, objectives, and what is written and read of them
    2: """models. objectives. optim checkpoint checkpoint_writer committing engine_state snapshot tensor_files uploading
          mlflow_sink""",
    # what is done with them
    3: """evaluation. trainer held_out saving non_finite health preflight timekeeping drawing step_sums compile_check profiling
          micro_batch_search run_folder closing comparison compare_report diagnosis utilisation typing_report""",
    # command lines, and the jobs that they start
    4: """cli compare convert doctor evaluate export launch mlflow_sync plan plan_report prepare prelude pretrain run run_start
          dry_run engine_start shards typing""",
}

# Library -> the only modules that may import it.
OWNERS: dict[str, str] = {
    "deepspeed": "distributed trainer held_out checkpoint engine_state saving launch run engine_start utilisation",
    "mlflow": "mlflow_sink comparison",
    "webdataset": "data.",
    "datasets": "data.",
    "datatrove": "data.",
    "transformers": "models. data. evaluation. export",
    "requests": "data.transports",
    "boto3": "data.transports",
    "botocore": "data.transports",
    "spacy": "data.parsing evaluation.parts_of_speech",
}

# Modules whose import must stay cheap: command lines answer --help and configuration errors in under a second.
LIGHT = """errors config config_loading budget cli objectives objectives.settings compare convert doctor evaluate export launch
mlflow_sync plan prepare pretrain shards typing data.storage data.cache""".split()
HEAVY = "torch transformers deepspeed mlflow datasets webdataset datatrove requests boto3 botocore spacy".split()


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name inside it."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    del found[""]
    return found


@cache
def imported(module: str) -> frozenset[str]:
    """Full dotted names that a module imports, at any depth of its code; `from a import b` gives `a.b`."""
    return frozenset(_imports(ast.parse(modules()[module].read_text())))


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant):
                yield str(first.value)


def siblings(module: str) -> set[str]:
    """Modules of this package that a module imports."""
    found = set()
    for name in imported(module):
        inside = name.removeprefix("sparselt_dist.")
        if inside == name:
            continue
        found.add(inside if inside in modules() else inside.rpartition(".")[0])
    return (found & set(modules())) - {module}


def belongs(module: str, names: str) -> bool:
    """Whether a module is among the names; the most specific name of LAYERS wins, see `layer`."""
    return any(module == name or (name.endswith(".") and f"{module}.".startswith(name)) for name in names.split())


def layer(module: str) -> int | None:
    """The layer that lists the module itself, else the one that lists its package."""
    exact = [number for number, names in LAYERS.items() if module in names.split()]
    return next(iter(exact or [number for number, names in LAYERS.items() if belongs(module, names)]), None)


@pytest.mark.parametrize("module", modules())
def test_module_imports_its_own_layer_or_lower(module: str) -> None:
    own = layer(module)
    assert own is not None, f"{module} has no layer; give it one in {Path(__file__).name}"
    higher = {other: layer(other) for other in siblings(module) if (layer(other) or 0) > own}
    assert not higher, f"{module} (layer {own}) imports from higher layers: {higher}"


def test_no_layer_names_a_module_that_is_gone() -> None:
    for names in [*LAYERS.values(), *OWNERS.values()]:
        for name in names.split():
            assert any(belongs(module, name) for module in modules()), f"{name} is listed and does not exist"


def test_no_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"imports in a circle: {' -> '.join([*path, module])}"
        if module not in done:
            for other in siblings(module):
                visit(other, (*path, module))
            done.add(module)

    for module in modules():
        visit(module, ())


@pytest.mark.parametrize("library", OWNERS)
def test_a_heavy_library_has_few_owners(library: str) -> None:
    users = {module for module in modules() if any(name.split(".")[0] == library for name in imported(module))}
    strangers = {module for module in users if not belongs(module, OWNERS[library])}
    assert not strangers, f"{library} is imported by {strangers}; only {OWNERS[library]} may"


def test_objectives_see_batches_stored_pairs_and_their_own_kind_alone() -> None:
    for module in modules():
        if module.startswith("objectives"):
            foreign = {
                other
                for other in siblings(module)
                if not belongs(other, "errors data.batch data.randomness data.pair_files objectives.")
            }
            assert not foreign, f"{module} imports {foreign}"


def test_trainer_and_data_code_name_no_objective() -> None:
    for module in modules():
        if belongs(module, "trainer data. checkpoint optim distributed"):
            named = {other for other in siblings(module) if other.startswith("objectives.")} - {"objectives.base"}
            assert not named, f"{module} imports {named}"


_PROBE = """
import importlib, json, sys
loaded = {}
for name in sys.argv[2].split():
    importlib.import_module(name)
    loaded[name] = sorted(set(sys.argv[1].split()) & set(sys.modules))
print(json.dumps(loaded))
"""


def test_command_lines_and_configuration_import_nothing_heavy() -> None:
    names = ["sparselt_dist", *(f"sparselt_dist.{module}" for module in LIGHT)]
    result = subprocess.run(
        [sys.executable, "-c", _PROBE, " ".join(HEAVY), " ".join(names)], capture_output=True, text=True, check=True
    )
    for name, heavy in json.loads(result.stdout).items():
        assert not heavy, f"import {name} imports {heavy}"
