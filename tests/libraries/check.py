"""Compare uses of the libraries with a table of what they have."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from tests.libraries.sources import LIBRARIES, Record
from tests.libraries.uses import Use

REMAKE = "run python -m tests.libraries.table"
# Members that classes inherit from torch's or Python's; the table has those of the libraries only.
INHERITED = {
    name
    for base in (torch.nn.Module, torch.autograd.Function, torch.optim.Optimizer, BaseException, dict)
    for name in dir(base)
} | {"training"}
# Calls whose ** arguments are the fields of another class.
FORWARDED = {("vllm.entrypoints.llm", "LLM"): ("vllm.engine.arg_utils", "EngineArgs")}


class Table:
    """The modules of one stack."""

    def __init__(self, modules: dict[str, dict[str, Record]]) -> None:
        self.modules = modules

    def find(self, module: str, name: str) -> tuple[str, str] | None:
        """Return the module and name that define `name`; ("module", "") for a submodule, None where it is
        nowhere."""
        for _ in range(10):
            record = self.modules.get(module, {}).get(name) if name else None
            if record is None:
                as_module = f"{module}.{name}".rstrip(".")
                return (as_module, "") if as_module in self.modules else None
            if "from" not in record:
                return module, name
            module, _, name = record["from"].partition(":")
            if not module.startswith(LIBRARIES):
                return module, name
        return None

    def record(self, module: str, name: str) -> Record | None:
        """Return the record of a name where it is defined; None for modules and what other packages
        define."""
        place = self.find(module, name)
        return self.modules.get(place[0], {}).get(place[1]) if place is not None and place[1] else None

    def signature(self, module: str, name: str, member: str) -> str | None:
        """Return the arguments of a function, class or method; None where it has none or is missing."""
        record = self.record(module, name)
        if record is None:
            return None
        if member:
            return record.get("methods", {}).get(member)
        return record.get("function", record.get("class"))


def problems(uses: Iterable[Use], table: Table) -> list[str]:
    """Return one line for every use that the table does not have, or whose call does not fit."""
    return [f"{use}: {problem}" for use in uses for problem in _problems(use, table)]


def _problems(use: Use, table: Table) -> Iterator[str]:
    place = table.find(use.module, use.name)
    if place is None:
        if not use.is_alternative and not use.name.startswith("__"):
            yield f"there is no such name; if the libraries have it: {REMAKE}"
        return
    if not place[1] and use.member:  # a name of a module that was imported by its own name
        yield from _problems(replace(use, module=place[0], name=use.member, member=""), table)
        return
    record = table.record(use.module, use.name)
    if record is None:  # a module, or a name of a package that is not in the table
        return
    if use.member and record.get("is_short"):
        yield f"the table has only the constructor of {use.name}: {REMAKE}"
        return
    if use.member and "class" in record and not has_member(record, use.member):
        yield f"{use.name} has no member {use.member}"
        return
    if not use.is_call:
        return
    signature = table.signature(use.module, use.name, use.member)
    if signature is None:
        return
    forwarded = table.record(*FORWARDED[place]) if place in FORWARDED else None
    yield from misfits(
        use,
        signature,
        forwarded["class"] if forwarded is not None else "",
        is_bound=bool(use.member or "class" in record),
    )


def has_member(record: Record, name: str) -> bool:
    """Tell whether a class has a method or an attribute."""
    if name in record["methods"] or name in record["attributes"].split():
        return True
    if "__init__" not in record["methods"] and name in {
        part.partition("=")[0] for part in record["class"].split(", ")
    }:
        return True
    return bool(record.get("open")) and name in INHERITED


def misfits(use: Use, signature: str, forwarded: str, *, is_bound: bool) -> Iterator[str]:
    """Yield what does not fit between a call and a signature; `forwarded` is the signature that gets unknown
    keywords."""
    parts = [part for part in signature.split(", ") if part and part != "/"]
    if is_bound and parts and parts[0] in ("self", "cls"):
        parts = parts[1:]
    names = [part.partition("=")[0] for part in parts]
    star = next(
        (index for index, name in enumerate(names) if name.startswith("*") and not name.startswith("**")),
        len(names),
    )
    positional = [name for name in names[:star] if not name.startswith("**")]
    takes_any_positional = star < len(names) and names[star] != "*"
    takes_any_keyword = any(name.startswith("**") for name in names)
    accepted = {name.lstrip("*") for name in names}
    if forwarded:
        accepted |= {part.partition("=")[0] for part in forwarded.split(", ")}
        takes_any_keyword = False
    if use.num_positional > len(positional) and not takes_any_positional:
        yield f"takes {len(positional)} positional arguments, got {use.num_positional} ({signature})"
    for keyword in use.keywords:
        if keyword not in accepted and not takes_any_keyword:
            yield f"has no argument {keyword} ({signature})"
    given = {*positional[: use.num_positional], *use.keywords}
    required = {
        name for name, part in zip(names, parts, strict=True) if "=" not in part and not name.startswith("*")
    }
    if not use.has_star and required - given:
        yield f"needs {', '.join(sorted(required - given))} ({signature})"
