"""Make the table of library names that the product may use, for every GPU stack, from the sources of the
stacks' wheels.

    python -m tests.libraries.table [--wheels FOLDER]

Downloads the wheels that FOLDER lacks with pip, by name and version, writes table.json and prints what
differs between the stacks among the names in use. Run it after a change of a GPU stack's versions, and where
a test says that a name is missing.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rlsc_mcore.commands.stacks import Stack, read_stacks
from tests.libraries.check import Table, problems
from tests.libraries.sources import Record, Sources
from tests.libraries.uses import RECEIVERS, product_uses

TABLE = Path(__file__).with_name("table.json")
DISTRIBUTIONS = ("vllm", "megatron-core", "transformer-engine")
ALWAYS = ("vllm.engine.arg_utils:EngineArgs", "transformer_engine.pytorch.optimizers:FusedAdam")
"""Classes that are reached through others: the options of `LLM`, and the optimizer that Megatron-Core
makes."""
CONSTRUCTOR_ONLY = ("EngineArgs",)


def gpu_stacks() -> list[Stack]:
    """Return one line per GPU stack: that of its newest Python."""
    newest: dict[str, Stack] = {}
    for stack in read_stacks():
        if stack.device == "cuda" and (
            stack.name not in newest or stack.pythons[-1] > newest[stack.name].pythons[-1]
        ):
            newest[stack.name] = stack
    return list(newest.values())


def download(stack: Stack, folder: Path) -> list[Path]:
    """Return the wheels of a stack's libraries, downloaded where `folder` lacks them."""
    wheels = []
    for distribution in DISTRIBUTIONS:
        version = stack.pins[distribution]
        pattern = f"{distribution.replace('-', '_')}-{version}-*.whl"
        if not any(folder.glob(pattern)):
            python = ["--python-version", stack.pythons[-1], "--only-binary", ":all:"]
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                *python,
                "--dest",
                str(folder),
            ]
            subprocess.run([*command, f"{distribution}=={version}"], check=True)
        wheels += sorted(folder.glob(pattern))[:1]
    return wheels


def make_table(sources: Sources, places: set[tuple[str, str]]) -> dict[str, dict[str, Record]]:
    """Return the records of every module that `places` (module, name) lead to; of their classes only those in
    use have members."""
    table: dict[str, dict[str, Record]] = {}
    classes: set[tuple[str, str]] = set()
    for module, name in sorted(places):
        while True:  # the module that is named, and those that it imports the name from
            if sources.has_module(module):
                table.setdefault(module, {})
            record = sources.module(module).get(name)
            if record is None or "from" not in record:
                break
            module, _, name = record["from"].partition(":")
        if record is not None and "class" in record:
            classes.add((module, name))
        elif sources.has_module(f"{module}.{name}".rstrip(".")):
            table.setdefault(f"{module}.{name}".rstrip("."), {})
    imported = {(module, name) for module, name in places}
    for module, names in table.items():
        for name, record in sorted(sources.module(module).items()):
            if "class" in record and ((module, name) not in classes or name in CONSTRUCTOR_ONLY):
                names[name] = {"class": record["class"], "is_short": True}
            elif (
                "from" not in record
                or (module, name) in imported
                or record["from"].partition(":")[0] in table
            ):
                names[name] = record
    return dict(sorted(table.items()))


def main() -> None:
    """Write the table and print what differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--wheels", type=Path, help="folder that has, or gets, the wheels (1 GB)")
    folder = parser.parse_args().wheels
    with tempfile.TemporaryDirectory() as scratch:
        folder = folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        uses = product_uses()
        receivers = {
            tuple(place.split(":")) for expressions in RECEIVERS.values() for place in expressions.values()
        }
        members = {
            (f"{use.module}.{use.name}", use.member) for use in uses if use.member
        }  # of modules imported by name
        places = (
            {(use.module, use.name) for use in uses}
            | members
            | receivers
            | {tuple(place.split(":")) for place in ALWAYS}
        )
        tables: dict[str, Any] = {}
        for stack in gpu_stacks():
            sources = Sources(download(stack, folder))
            versions = {name: stack.pins[name] for name in DISTRIBUTIONS}
            tables[stack.name] = {"versions": versions, "modules": make_table(sources, places)}
    TABLE.write_text(compact(tables), encoding="utf-8")
    print(f"{TABLE}: {TABLE.stat().st_size >> 10} KiB")
    for line in differences(tables, uses):
        print(line)
    for name, content in tables.items():
        for problem in problems(uses, Table(content["modules"])):
            print(f"{name}: {problem}")


def compact(tables: dict[str, Any]) -> str:
    """Return JSON with one line per name of a module, so that a change is a small diff."""
    lines = ["{"]
    for stack, content in tables.items():
        lines.append(f'"{stack}": {{"versions": {json.dumps(content["versions"])}, "modules": {{')
        for module, names in content["modules"].items():
            lines.append(f"{json.dumps(module)}: {{")
            lines += [f"{json.dumps(name)}: {json.dumps(record)}," for name, record in names.items()]
            lines[-1] = lines[-1].removesuffix(",")
            lines.append("},")
        lines[-1] = "}"
        lines.append("}},")
    lines[-1] = "}}"
    return "\n".join([*lines, "}", ""])


def differences(tables: dict[str, Any], uses: list[Any]) -> list[str]:
    """Return one line for every used name whose signature differs between two stacks."""
    names = list(tables)
    lines = []
    for first, second in itertools.pairwise(names):
        for module, name, member in sorted({(use.module, use.name, use.member) for use in uses}):
            before, after = (
                Table(tables[stack]["modules"]).signature(module, name, member) for stack in (first, second)
            )
            if before != after:
                old, new = (
                    signature.split(", ") if signature is not None else ["(missing)"]
                    for signature in (before, after)
                )
                changes = [f"-{each}" for each in old if each not in new] + [
                    f"+{each}" for each in new if each not in old
                ]
                dotted = ".".join(part for part in (module, name, member) if part)
                lines.append(f"{first} -> {second}: {dotted}: {' '.join(changes) or 'other order'}")
    return lines


if __name__ == "__main__":
    main()
