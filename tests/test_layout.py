"""The shape of the code: imports go down, heavy libraries have one door, functions stay small."""

import ast
import importlib
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from captioner.lab import grid
from loops.cli import COMMANDS

REPO = Path(__file__).resolve().parent.parent
LEVELS = (
    {
        "errors",
        "config",
        "files",
        "presets",
        "processes",
        "progress",
        "records",
        "prompts",
        "statements",
        "runs",
        "laboratory",
    },
    {"views", "sources", "layouts"},
    {"models"},
    {"engines"},
    {"pipeline", "fit", "method", "judges"},
    {"report"},
    {"lab"},
)
LEVEL = {name: level for level, names in enumerate(LEVELS, 1) for name in names}
DOORS = {
    "adapters": {"captioner.models.library_adapters"},
    "peft": {"captioner.models.adapters"},
    "trl": {"captioner.fit"},
    "datasets": {
        "captioner.records",
        "captioner.sources",
        "captioner.layouts",
        "captioner.fit",
    },  # fit: the type that TRL takes
    "vllm": {"captioner.engines"},
    "ray": {"captioner.engines"},
    "imagehash": {"captioner.sources.screen"},
    "sklearn": {"captioner.method.asking"},
}
SERVING = (
    "captioner.views",
    "captioner.models.render",
    "captioner.engines",
    "captioner.sources",
    "captioner.layouts",
    "captioner.pipeline",
    "loops.caption",
)
MAY_IMPORT_LOOPS = {"loops.iterate", "loops.demo", "loops.data.recaption"}  # and the studies: whole loops
# word lists for any photograph, in which a square is a square
ENGLISH = {f"captioner.method.{name}" for name in ("asking", "kinds", "shorthand", "tool", "words")}
LONGEST_FUNCTION, LONGEST_MODULE = 60, 500  # lines
TO_SPLIT = {"captioner.lab.grid"}


def _name(file: Path) -> str:
    parts = file.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    _name(file): file for folder in ("captioner", "loops") for file in sorted((REPO / folder).rglob("*.py"))
}
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in FILES.items()}


def imports(name: str) -> Iterator[str]:
    """Every module a module imports, wherever it does so, but for type hints only."""
    queue: list[ast.AST] = [TREES[name]]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            queue.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{name}: imports name the whole module"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in FILES else node.module
        queue.extend(ast.iter_child_nodes(node))


LOOPS = {  # the modules of commands
    name for name in FILES if name.startswith("loops.") and "studies" not in name
} - {"loops.cli", "loops.data", "loops.data.edge", "loops.few", "loops.stages"}
IMPORTS = {name: set(imports(name)) for name in FILES}


def part(module: str) -> str:
    """The part of the layout that a module of captioner belongs to: `engines` for captioner.engines.hf."""
    return module.split(".")[1] if "." in module else ""


def test_every_module_has_a_level() -> None:
    assert {part(name) for name in FILES if name.startswith("captioner.")} - set(LEVEL) == set()


def test_imports_go_down() -> None:
    up = [
        f"{name} (level {LEVEL[part(name)]}) imports {other} (level {LEVEL[part(other)]})"
        for name in FILES
        for other in IMPORTS[name]
        if name.startswith("captioner.")
        and other.startswith("captioner.")
        and LEVEL[part(other)] > LEVEL[part(name)]
    ]
    up += [
        f"{name} imports {other}"
        for name in FILES
        for other in IMPORTS[name]
        if name[0] == "c" and other[:5] == "loops"
    ]
    assert up == []


def test_the_laboratory_is_no_part_of_the_product() -> None:
    """It comes in as a plug-in does; only what draws, demonstrates and studies names it."""
    allowed = ("captioner.lab", "loops.scenes", "loops.demo", "loops.study", "loops.studies")
    guilty = [
        f"{name} imports {other}"
        for name in FILES
        for other in IMPORTS[name]
        if f"{other}.".startswith("captioner.lab.")
        and not any(f"{name}.".startswith(f"{each}.") for each in allowed)
    ]
    assert guilty == []


def test_no_product_module_speaks_the_language_of_the_laboratory() -> None:
    """Its compass names, shapes and marks are in no string of the product, docstrings aside."""
    words = {*grid.POSITIONS, *grid.SHAPES, *grid.MARKS} - {"center"}
    found = [
        f"{name}, line {node.lineno}: {sorted(said)}"
        for name, tree in TREES.items()
        if name.startswith("captioner.") and part(name) != "lab" and name not in ENGLISH
        for node in _strings(tree)
        if (said := words & set(re.findall(r"[a-z]+", str(node.value).casefold())))
    ]
    assert found == []


def _strings(tree: ast.Module) -> Iterator[ast.Constant]:
    """Every text in the code that is no docstring."""
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    fields = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs | fields:
            yield node


def test_imports_have_no_circle() -> None:
    list(TopologicalSorter({name: IMPORTS[name] & set(FILES) - {name} for name in FILES}).static_order())


def test_loops_do_not_import_each_other() -> None:
    guilty = {name: IMPORTS[name] & LOOPS for name in LOOPS - MAY_IMPORT_LOOPS if IMPORTS[name] & LOOPS}
    assert guilty == {}


@pytest.mark.parametrize("library", DOORS)
def test_one_door_per_library(library: str) -> None:
    users = {name for name in FILES for other in IMPORTS[name] if other.split(".")[0] == library}
    strangers = {
        name for name in users if not any(f"{name}.".startswith(f"{door}.") for door in DOORS[library])
    }
    assert strangers == set()


def test_serving_needs_no_training_library() -> None:
    """views, render, engines, formats and bulk captioning run where adapters and trl are not installed."""
    reached: dict[str, str] = {}
    queue = [name for name in FILES if any(f"{name}.".startswith(f"{start}.") for start in SERVING)]
    while queue:
        name = queue.pop()
        for other in IMPORTS[name] - set(reached):
            reached[other] = name
            if other in FILES:
                queue.append(other)
    found = {
        other: name for other, name in reached.items() if other.split(".")[0] in ("adapters", "peft", "trl")
    }
    assert found == {}


def test_level_one_imports_no_torch() -> None:
    for name in LEVELS[0]:
        assert not {
            other
            for other in IMPORTS[f"captioner.{name}"]
            if other.split(".")[0] in ("torch", "transformers")
        }


def test_functions_and_modules_stay_small() -> None:
    long = [
        f"{name}.{node.name}: {(node.end_lineno or 0) - node.lineno + 1} lines"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= LONGEST_FUNCTION
    ]
    long += [
        f"{name}: {lines} lines"
        for name, file in FILES.items()
        if (lines := file.read_text(encoding="utf-8").count("\n")) > LONGEST_MODULE and name not in TO_SPLIT
    ]
    assert long == []


@pytest.mark.parametrize("name", FILES)
def test_module_imports(name: str) -> None:
    importlib.import_module(name)


def test_every_command_has_its_loop_and_every_loop_its_command() -> None:
    assert {command.verb.partition(":")[0] for command in COMMANDS.values()} == LOOPS
    for command, row in COMMANDS.items():
        module, _, verb = row.verb.partition(":")
        assert (ast.get_docstring(TREES[module]) or "").startswith(f"captioner {command.split()[0]}"), module
        names = {n.name for n in TREES[module].body if isinstance(n, ast.FunctionDef)}
        shared = {a.name for n in TREES[module].body if isinstance(n, ast.ImportFrom) for a in n.names}
        assert verb in names and "plan" in names | shared, verb


def test_every_module_says_what_it_is() -> None:
    assert [
        name for name, tree in TREES.items() if name != "captioner.sources" and not ast.get_docstring(tree)
    ] == []


def test_no_pickle_and_no_remote_code() -> None:
    for name, file in FILES.items():
        text = file.read_text(encoding="utf-8")
        assert "trust_remote_code=True" not in text, name
        assert not IMPORTS[name] & {"pickle", "dill", "joblib", "cloudpickle"}, name
        for line in text.splitlines():
            assert "torch.load(" not in line or "weights_only=True" in line, name
