"""Read the names, signatures and members of Python modules from the sources of wheels, without importing
them.

A module's record maps each of its names to one of these:

    {"function": "x, y=..., *, z"}                          a function's arguments
    {"class": "x, y=...", "methods": {"name": "x"}, "attributes": "a b"}    its constructor's and its methods' arguments
    {"value": true}                                         anything else that is assigned
    {"from": "package.module:name"}                         a name that is imported from another module

Base classes within the same libraries are merged into a class; `"open": true` marks a class with a base from
elsewhere. The attributes of a class without __init__ (a dataclass) include its constructor's arguments, which
are not listed again.
"""

import ast
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LIBRARIES = ("vllm", "megatron", "transformer_engine")
Record = dict[str, Any]


class Sources:
    """The modules of several wheels."""

    def __init__(self, wheels: list[Path]) -> None:
        self.files: dict[str, tuple[zipfile.ZipFile, str]] = {}
        self._records: dict[str, dict[str, Record]] = {}
        self._classes: dict[tuple[str, str], ast.ClassDef] = {}
        for wheel in wheels:
            archive = zipfile.ZipFile(wheel)
            for name in archive.namelist():
                if name.endswith(".py"):
                    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
                    self.files[module] = (archive, name)

    def has_module(self, module: str) -> bool:
        """Tell whether a module, or a package without __init__.py, is in the wheels."""
        return module in self.files or any(name.startswith(module + ".") for name in self.files)

    def module(self, module: str) -> dict[str, Record]:
        """Return the record of every name of a module; empty for a package without __init__.py."""
        if module not in self._records:
            self._records[module] = {}  # ends the recursion of modules that import each other
            if module in self.files:
                self._records[module] = self._read(module)
        return self._records[module]

    def find(self, module: str, name: str, depth: int = 10) -> tuple[str, str] | None:
        """Follow imports to the module that defines `name`; return its module and name there, None where it
        is nowhere."""
        record = self.module(module).get(name)
        if record is None:
            if self.has_module(f"{module}.{name}"):
                return f"{module}.{name}", ""
            return None
        if "from" not in record:
            return module, name
        target, _, target_name = record["from"].partition(":")
        if depth == 0 or not target.startswith(LIBRARIES):
            return None
        return (target, "") if not target_name else self.find(target, target_name, depth - 1)

    def _read(self, module: str) -> dict[str, Record]:
        archive, path = self.files[module]
        is_package = path.endswith("__init__.py")
        records: dict[str, Record] = {}
        self._records[module] = records
        for node in _statements(ast.parse(archive.read(path)).body):
            if isinstance(node, ast.ClassDef):
                self._classes[module, node.name] = node
        for node in _statements(ast.parse(archive.read(path)).body):
            if isinstance(node, ast.ImportFrom):
                base = _absolute(module, is_package, node)
                for alias in node.names:
                    as_module = f"{base}.{alias.name}"
                    found = as_module in self.files
                    records.setdefault(
                        alias.asname or alias.name, {"from": as_module if found else f"{base}:{alias.name}"}
                    )
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    records.setdefault(
                        alias.asname or alias.name.partition(".")[0],
                        {"from": alias.name if alias.asname else alias.name.partition(".")[0]},
                    )
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                records[node.name] = {"function": signature(node.args)}
            elif isinstance(node, ast.ClassDef):
                records[node.name] = {"class": "", "methods": {}, "attributes": ""}
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for name in _assigned(node):
                    if "class" not in records.get(name, {}) and "function" not in records.get(name, {}):
                        records[name] = {"value": True}
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
                    records.update(_lazy_names(module, node.value, records))
        for (owner, name), node in list(self._classes.items()):
            if owner == module:
                records[name] = self._class_record(module, node)
        return records

    def _class_record(self, module: str, node: ast.ClassDef) -> Record:
        members: dict[str, str | None] = {}
        constructor: str | None = None
        is_open = False
        for base in reversed(node.bases):
            found = self._base(module, base)
            if found is None:
                is_open = is_open or ast.unparse(base) not in ("object", "ABC")
                continue
            members.update(dict.fromkeys(found["attributes"].split()) | found["methods"])
            if "__init__" not in found["methods"]:
                members.update(
                    dict.fromkeys(part.partition("=")[0] for part in found["class"].split(", ")[1:])
                )
            constructor = found["class"] or constructor
            is_open = is_open or found.get("open", False)
        fields: list[str] = []
        for item in _statements(node.body):
            if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
                members[item.name] = None if _is_property(item) else signature(item.args)
                members.update(
                    dict.fromkeys(_self_assigned(item)) | {k: v for k, v in members.items() if v is not None}
                )
            elif isinstance(item, ast.Assign | ast.AnnAssign):
                for name in _assigned(item):
                    members.setdefault(name, None)
                    if isinstance(item, ast.AnnAssign) and "ClassVar" not in ast.unparse(item.annotation):
                        fields.append(name if item.value is None else f"{name}=...")
        if "__init__" in {item.name for item in node.body if isinstance(item, ast.FunctionDef)}:
            constructor = members["__init__"]
        elif fields:
            inherited = [
                part
                for part in (constructor or "self").split(", ")
                if part.partition("=")[0] not in {f.partition("=")[0] for f in fields}
            ]
            constructor = ", ".join([*inherited, *fields])
        methods = {name: arguments for name, arguments in sorted(members.items()) if arguments is not None}
        fields = (
            []
            if "__init__" in methods
            else [part.partition("=")[0] for part in (constructor or "").split(", ")]
        )
        attributes = sorted(
            name for name, arguments in members.items() if arguments is None and name not in fields
        )
        record: Record = {"class": constructor or "", "methods": methods, "attributes": " ".join(attributes)}
        if is_open:
            record["open"] = True
        return record

    def _base(self, module: str, base: ast.expr) -> Record | None:
        if isinstance(base, ast.Subscript):
            base = base.value
        names = ast.unparse(base).split(".")
        place = self.find(module, names[0])
        for name in names[1:]:
            place = self.find(place[0], name) if place is not None else None
        if place is None or not place[1]:
            return None
        if place[0] == module:  # defined in this module, perhaps not read yet
            node = self._classes.get(place)
            return self._class_record(module, node) if node is not None else None
        record = self.module(place[0]).get(place[1])
        return record if record is not None and "class" in record else None


def signature(arguments: ast.arguments) -> str:
    """Return arguments without annotations, defaults as "..."."""
    parts: list[str] = []
    positional = [*arguments.posonlyargs, *arguments.args]
    without_default = len(positional) - len(arguments.defaults)
    for index, argument in enumerate(positional):
        parts.append(argument.arg if index < without_default else f"{argument.arg}=...")
        if arguments.posonlyargs and index + 1 == len(arguments.posonlyargs):
            parts.append("/")
    if arguments.vararg:
        parts.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        parts.append("*")
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parts.append(argument.arg if default is None else f"{argument.arg}=...")
    if arguments.kwarg:
        parts.append(f"**{arguments.kwarg.arg}")
    return ", ".join(parts)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements, those within if, try and with included."""
    for node in body:
        yield node
        for name in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from _statements(getattr(node, name, []))
        for handler in getattr(node, "handlers", []):
            yield from _statements(handler.body)


def _absolute(module: str, is_package: bool, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    keep = len(parts) - node.level + (1 if is_package else 0)
    return ".".join([*parts[:keep], *([node.module] if node.module else [])])


def _assigned(node: ast.Assign | ast.AnnAssign) -> Iterator[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    for target in targets:
        for part in target.elts if isinstance(target, ast.Tuple) else [target]:
            if isinstance(part, ast.Name):
                yield part.id


def _self_assigned(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    for node in ast.walk(function):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and ast.unparse(node.value) == "self"
        ):
            yield node.attr


def _is_property(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(
        ast.unparse(decorator).rpartition(".")[2] in ("property", "cached_property", "setter")
        for decorator in function.decorator_list
    )


def _lazy_names(module: str, table: ast.Dict, records: dict[str, Record]) -> dict[str, Record]:
    """Read vLLM's table of names that are imported at first use: {"LLM": ".entrypoints.llm:LLM"}."""
    names: dict[str, Record] = {}
    for key, value in zip(table.keys, table.values, strict=True):
        if (
            isinstance(key, ast.Constant)
            and isinstance(value, ast.Constant)
            and isinstance(key.value, str)
            and isinstance(value.value, str)
        ):
            place, colon, name = value.value.partition(":")
            if place.startswith(".") and colon:
                names[key.value] = {"from": f"{module}{place}:{name}"}
    return names
