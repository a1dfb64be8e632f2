"""Every vLLM, Megatron-Core and TransformerEngine name, argument and attribute in use exists in every GPU
stack."""

import functools
import importlib
import inspect
import json
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from rlsc_mcore.commands.stacks import read_stacks
from tests.libraries.check import Table, problems
from tests.libraries.sources import Sources, signature
from tests.libraries.table import DISTRIBUTIONS, TABLE, gpu_stacks
from tests.libraries.uses import RECEIVERS, ROOT, Use, _Collector, product_uses, uses_of

STACKS = [stack.name for stack in gpu_stacks()]


@functools.cache
def tables() -> dict[str, Any]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


@functools.cache
def uses() -> tuple[Use, ...]:
    return tuple(product_uses())


@pytest.mark.parametrize("stack", STACKS)
def test_every_use_exists_and_every_call_fits(stack: str) -> None:
    assert len(uses()) > 100
    assert problems(uses(), Table(tables()[stack]["modules"])) == []


def test_what_one_stack_may_lack_exists_in_another() -> None:
    alternatives = [replace(use, is_alternative=False) for use in uses() if use.is_alternative]
    lacking = [set(problems(alternatives, Table(content["modules"]))) for content in tables().values()]
    assert alternatives and set.intersection(*lacking) == set()


@pytest.mark.parametrize("stack", STACKS)
def test_the_optimizer_that_megatron_makes_takes_what_is_passed(stack: str) -> None:
    """It is reached through Megatron's objects, so that its class is not seen in the product's files."""
    initialize_state = Table(tables()[stack]["modules"]).signature(
        "transformer_engine.pytorch.optimizers", "FusedAdam", "initialize_state"
    )
    assert initialize_state is not None and "store_param_remainders" in initialize_state


def test_the_table_is_of_the_stacks_versions() -> None:
    expected = {stack.name: {name: stack.pins[name] for name in DISTRIBUTIONS} for stack in gpu_stacks()}
    assert {name: content["versions"] for name, content in tables().items()} == expected
    assert expected.keys() == {stack.name for stack in read_stacks() if stack.device == "cuda"}


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("from vllm import LLM\nLLM(model='x', kv_cache_bytes=1)", "has no argument kv_cache_bytes"),
        ("from vllm import LLM\nLLM(model='x', kv_cache_memory_bytes=1)", ""),
        (
            "from vllm import LLM\ndef f(x):\n    o = {}\n    o.update(block_sizes=3)\n    LLM(model='x', **o)",
            "has no argument block_sizes",
        ),
        ("from vllm import LLMs", "there is no such name"),
        ("import megatron.core.optimizer as optimizer\noptimizer.Adamm", "there is no such name"),
        (
            "def f():\n    from transformer_engine.pytorch.optimizers import FusedAdam\n    FusedAdam.initialize_state(None)",
            "needs store_param_remainders",
        ),
        (
            "from transformer_engine.pytorch.optimizers import FusedAdam\nFusedAdam([], use_decoupled_grads=True)",
            "has no argument use_decoupled_grads",
        ),
        (
            "from megatron.core.models.gpt import GPTModel\nclass M(GPTModel):\n    def f(self):\n        self.output_layers",
            "GPTModel has no member output_layers",
        ),
        (
            "from megatron.core.models.gpt import GPTModel\nclass M(GPTModel):\n    def f(self):\n        self.output_layer, self.training",
            "",
        ),
        (
            "from megatron.core.packed_seq_params import PackedSeqParams\nPackedSeqParams(max_seqlen=3)",
            "has no argument max_seqlen",
        ),
        (
            "from megatron.core.optimizer import clip_grads\nclip_grads.clip_grad_by_total_norm_fp32([])",
            "needs max_norm",
        ),
        ("try:\n    from vllm import LLMs\nexcept ImportError:\n    LLMs = None", ""),
    ],
)
def test_a_wrong_use_is_found(source: str, problem: str) -> None:
    found = problems(uses_of(source, "here.py"), Table(tables()["gpu"]["modules"]))
    assert problem in "".join(found) if problem else found == []
    assert len(found) == bool(problem)


def test_every_receiver_is_in_use() -> None:
    """A stale entry of RECEIVERS would check nothing."""
    unused = []
    for ending, expressions in RECEIVERS.items():
        used: set[str] = set()
        for path in sorted((ROOT / "rlsc_mcore").rglob("*.py")):
            if str(path).endswith(ending):
                collector = _Collector(str(path), expressions)
                collector.visit(compile(path.read_text(encoding="utf-8"), str(path), "exec", flags=1024))
                used |= collector.used_receivers
        unused += [f"{ending}: {expression}" for expression in expressions if expression not in used]
    assert unused == []


def test_signatures_read_from_sources_are_those_that_python_has() -> None:
    """The installed Megatron-Core against the table of the stack that has its version."""
    version = metadata.version("megatron-core")
    stack = next(
        (name for name, content in tables().items() if content["versions"]["megatron-core"] == version), None
    )
    if stack is None:
        pytest.skip(f"no stack has megatron-core {version}")
    compared = 0
    for module, names in tables()[stack]["modules"].items():
        if not module.startswith("megatron.core"):
            continue
        imported = importlib.import_module(module)
        for name, record in names.items():
            function = getattr(imported, name, None)
            if (
                "function" in record
                and inspect.isfunction(function)
                and function.__module__ == module
                and not hasattr(function, "__wrapped__")
            ):
                parameters = [
                    part.partition("=")[0].lstrip("*")
                    for part in record["function"].split(", ")
                    if part not in ("", "*", "/")
                ]
                assert parameters == list(inspect.signature(function).parameters), f"{module}.{name}"
                compared += 1
    assert compared > 50


def test_a_class_is_read_with_its_bases(tmp_path: Path) -> None:
    import ast
    import zipfile

    wheel = tmp_path / "megatron-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("megatron/core/__init__.py", "from .base import Base as B\n")
        archive.writestr(
            "megatron/core/base.py",
            "from dataclasses import dataclass\n@dataclass\nclass Base:\n    a: int\n    b: int = 3\n    def f(self, x): ...\n",
        )
        archive.writestr(
            "megatron/core/child.py",
            "import torch\nfrom . import B\nclass Child(B):\n    c: int = 1\n    def g(self, y=2, *, z):\n        self.d = y\n"
            "class Module(torch.nn.Module):\n    def __init__(self, n): self.n = n\n",
        )
    sources = Sources([wheel])
    assert sources.find("megatron.core", "B") == ("megatron.core.base", "Base")
    child = sources.module("megatron.core.child")
    assert child["Child"] == {
        "class": "self, a, b=..., c=...",
        "methods": {"f": "self, x", "g": "self, y=..., *, z"},
        "attributes": "d",
    }
    assert child["Module"] == {
        "class": "self, n",
        "methods": {"__init__": "self, n"},
        "attributes": "n",
        "open": True,
    }
    function = ast.parse("def f(a, b=1, /, c=2, *d, e, g=3, **h): ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    assert signature(function.args) == "a, b=..., /, c=..., *d, e, g=..., **h"
