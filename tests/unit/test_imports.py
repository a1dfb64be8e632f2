"""The import graph has no cycle, imports inside functions included (TYPE_CHECKING blocks excepted)."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

import rlsc_mcore

ROOT = Path(rlsc_mcore.__file__).parent


def _modules() -> dict[str, Path]:
    names = {}
    for file in ROOT.rglob("*.py"):
        parts = file.relative_to(ROOT.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


def _imports(tree: ast.AST, known: set[str]) -> set[str]:
    """Return the modules of `known` that a module imports anywhere but for type checking."""
    found = set()
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & known
            found |= submodules or {node.module}
        pending += ast.iter_child_nodes(node)
    return found & known


def import_graph() -> dict[str, set[str]]:
    modules = _modules()
    return {
        name: _imports(ast.parse(file.read_text(encoding="utf-8")), set(modules)) - {name}
        for name, file in modules.items()
    }


def test_there_is_no_import_cycle() -> None:
    graph = import_graph()
    assert len(graph) > 100 and "rlsc_mcore.commands.train" in graph
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_the_graph_sees_imports_inside_functions() -> None:
    known = {"rlsc_mcore.a", "rlsc_mcore.b", "rlsc_mcore.c"}
    text = "if TYPE_CHECKING:\n    import rlsc_mcore.c\ndef f():\n    from rlsc_mcore import a\n    import rlsc_mcore.b\n"
    assert _imports(ast.parse(text), known) == {"rlsc_mcore.a", "rlsc_mcore.b"}


def test_only_the_backend_asks_whether_there_is_a_gpu() -> None:
    asks = re.compile(r"cuda\.(is_available|device_count|is_initialized)\b")
    found = {
        name: matches
        for name, file in _modules().items()
        if (matches := asks.findall(file.read_text(encoding="utf-8")))
    }
    assert set(found) == {"rlsc_mcore.parallel.backend"}, found
