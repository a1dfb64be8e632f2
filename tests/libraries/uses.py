"""Collect what the product uses of vLLM, Megatron-Core and TransformerEngine, from its own sources.

Found without help: imported names, attributes of imported modules and classes, arguments of calls to them,
what subclasses read from `self`, and (owner, "name") pairs of what is patched. Attributes of instances are
found for the expressions in RECEIVERS.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.libraries.sources import LIBRARIES

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("rlsc_mcore", "benchmarks")

_DDP = "megatron.core.distributed:DistributedDataParallel"
_MEMBER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
_OPTIMIZER = "megatron.core.optimizer:MegatronOptimizer"
RECEIVERS: dict[str, dict[str, str]] = {
    "": {"self.ddp": _DDP, "trainer.ddp": _DDP, "trainer.optimizer": _OPTIMIZER},
    "training/step.py": {"self.optimizer": _OPTIMIZER},
    "training/optimizer.py": {"member": _MEMBER},
    "training/offload.py": {"chained": _MEMBER},
    "training/optimizer_state.py": {
        "member": _MEMBER,
        "buffer": "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBuffer",
    },
    "training/checkpoint.py": {
        "request": "megatron.core.dist_checkpointing.strategies.async_utils:AsyncRequest"
    },
    "rollout/engine.py": {
        "self._llm": "vllm:LLM",
        "self._llm.llm_engine": "vllm.v1.engine.llm_engine:LLMEngine",
        "engine": "vllm.v1.engine.llm_engine:LLMEngine",
        "output": "vllm.outputs:RequestOutput",
        "sample": "vllm.outputs:CompletionOutput",
        "current_platform": "vllm.platforms.interface:Platform",
    },
}
"""By the end of a file's path: expressions and the class of what they are."""


@dataclass(frozen=True)
class Use:
    """One use of a library: `member` of `name` in `module`; "" where the name, or the module, itself is
    used."""

    place: str
    module: str
    name: str = ""
    member: str = ""
    is_call: bool = False
    num_positional: int = 0
    keywords: tuple[str, ...] = ()
    has_star: bool = False  # *args or **kwargs: missing arguments cannot be found
    is_alternative: bool = (
        False  # in megatron_versions.py or within try ... except ImportError: a stack may lack it
    )

    def __str__(self) -> str:
        dotted = ".".join(part for part in (self.module, self.name, self.member) if part)
        return f"{self.place}: {dotted}"


def product_uses() -> list[Use]:
    """Return every use in the product's files."""
    uses = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            uses += uses_of(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    return uses


def uses_of(source: str, path: str) -> list[Use]:
    """Return the uses of one file."""
    receivers: dict[str, str] = {}
    for ending, expressions in RECEIVERS.items():
        if path.endswith(ending):
            receivers |= expressions
    collector = _Collector(path, receivers)
    collector.visit(ast.parse(source))
    return collector.uses


@dataclass(frozen=True)
class _Target:
    """What an expression refers to: a module (no name), a name of a module, or a member of a class."""

    module: str
    name: str = ""
    member: str = ""
    is_instance: bool = False


class _Collector(ast.NodeVisitor):
    def __init__(self, path: str, receivers: dict[str, str]) -> None:
        self.path = path
        self.receivers = {
            text: _Target(*place.split(":"), is_instance=True) for text, place in receivers.items()
        }
        self.scopes: list[dict[str, _Target]] = [{}]
        self.uses: list[Use] = []
        self.used_receivers: set[str] = set()
        self.alternatives = 0
        self.functions: list[ast.FunctionDef] = []

    # --- names
    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module and node.module.split(".")[0] in LIBRARIES:
            for alias in node.names:
                self.scopes[-1][alias.asname or alias.name] = _Target(node.module, alias.name)
                self._add(node, _Target(node.module, alias.name))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] in LIBRARIES:
                bound = _Target(alias.name) if alias.asname else _Target(alias.name.split(".")[0])
                self.scopes[-1][alias.asname or alias.name.split(".")[0]] = bound
                self._add(node, _Target(alias.name))

    def visit_Try(self, node: ast.Try) -> None:
        catches = " ".join(ast.unparse(handler.type) for handler in node.handlers if handler.type is not None)
        self.alternatives += "ImportError" in catches
        self.generic_visit(node)
        self.alternatives -= "ImportError" in catches

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.scopes.append({})
        self.functions.append(node)
        self.generic_visit(node)
        self.functions.pop()
        self.scopes.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        targets = [target for base in node.bases if (target := self._target(base)) is not None]
        own = {item.name for item in node.body if isinstance(item, ast.FunctionDef)} | set(
            _assigned_to_self(node)
        )
        for target in targets:
            for child in ast.walk(node):
                if (
                    isinstance(child, ast.Attribute)
                    and isinstance(child.ctx, ast.Load)
                    and _is_self(child.value)
                    and child.attr not in own
                ):
                    self._add(child, _Target(target.module, target.name, child.attr))
        self.generic_visit(node)

    # --- what is read, called and patched
    def visit_Attribute(self, node: ast.Attribute) -> None:
        target = self._target(node)
        if target is not None and isinstance(node.ctx, ast.Load) and not target.is_instance:
            self._add(node, target)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        target = self._target(node.func)
        if target is not None and (target.name or target.member) and not target.is_instance:
            keywords = tuple(keyword.arg for keyword in node.keywords if keyword.arg is not None)
            has_star = len(keywords) < len(node.keywords) or any(
                isinstance(each, ast.Starred) for each in node.args
            )
            for keyword in node.keywords:
                if keyword.arg is None and self.functions:
                    keywords += tuple(_keys(self.functions[-1], ast.unparse(keyword.value)))
            positional = sum(not isinstance(each, ast.Starred) for each in node.args)
            self._add(
                node, target, is_call=True, num_positional=positional, keywords=keywords, has_star=has_star
            )
        self.generic_visit(node)

    def visit_Tuple(self, node: ast.Tuple) -> None:
        if (
            len(node.elts) == 2
            and isinstance(node.elts[1], ast.Constant)
            and isinstance(node.elts[1].value, str)
        ):
            owner = self._target(node.elts[0])
            if owner is not None and not owner.member:
                self._add(node, _child(owner, node.elts[1].value))
        self.generic_visit(node)

    def _target(self, node: ast.expr) -> _Target | None:
        receiver = (
            self.receivers.get(ast.unparse(node)) if isinstance(node, ast.Name | ast.Attribute) else None
        )
        if receiver is not None:
            self.used_receivers.add(ast.unparse(node))
            return receiver
        if isinstance(node, ast.Name):
            return next((scope[node.id] for scope in reversed(self.scopes) if node.id in scope), None)
        if isinstance(node, ast.Attribute):
            owner = self._target(node.value)
            return _child(owner, node.attr) if owner is not None and not owner.member else None
        return None

    def _add(self, node: ast.stmt | ast.expr, target: _Target, **call: object) -> None:
        place = f"{self.path}:{node.lineno}"
        is_alternative = self.alternatives > 0 or self.path.endswith("parallel/megatron_versions.py")
        self.uses.append(
            Use(place, target.module, target.name, target.member, is_alternative=is_alternative, **call)
        )  # type: ignore[arg-type]


def _child(owner: _Target, attribute: str) -> _Target:
    if owner.name:
        return _Target(owner.module, owner.name, attribute)
    return _Target(owner.module, attribute)


def _keys(function: ast.FunctionDef, name: str) -> Iterator[str]:
    """Yield the keys that a function puts into its dictionary `name`, which it passes on by **."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == f"{name}.update":
            yield from (keyword.arg for keyword in node.keywords if keyword.arg is not None)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if (
                    isinstance(target, ast.Subscript)
                    and ast.unparse(target.value) == name
                    and isinstance(target.slice, ast.Constant)
                ):
                    yield str(target.slice.value)
            if any(ast.unparse(target) == name for target in targets):
                yield from _literal_keys(node.value)


def _literal_keys(value: ast.expr | None) -> Iterator[str]:
    if isinstance(value, ast.Dict):
        yield from (str(key.value) for key in value.keys if isinstance(key, ast.Constant))
    elif isinstance(value, ast.Call) and ast.unparse(value.func) == "dict":
        yield from (keyword.arg for keyword in value.keywords if keyword.arg is not None)


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _assigned_to_self(node: ast.ClassDef) -> Iterator[str]:
    for child in ast.walk(node):
        if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store) and _is_self(child.value):
            yield child.attr
