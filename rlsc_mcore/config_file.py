"""Read, write and compare configurations: YAML files and command-line flags. Imports no torch.

A YAML file is converted to flags: `optimizer: {lr: 1e-5}` becomes `--optimizer.lr 1e-5`. The file and the
command line therefore share one parser, the same types and the same error messages.
"""

import contextlib
import dataclasses
import io
import itertools
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro
import yaml

from rlsc_mcore.config import Config, ConfigError
from rlsc_mcore.objectives import OBJECTIVES
from rlsc_mcore.shipped import shipped_folder

# YAML spellings of Python constants
_YAML_WORDS = {
    "null": "None",
    "Null": "None",
    "NULL": "None",
    "~": "None",
    "": "None",
    "true": "True",
    "false": "False",
}
_SECTIONS = frozenset(
    name for name, kind in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(kind)
)
_DEEPEST = 8  # levels of nested mappings; ends the recursion of a file that refers to itself


def parse_config(flags: Sequence[str], *, prog: str = "rlsc train", description: str | None = None) -> Config:
    """Build a `Config` from flags (`--optimizer.lr 1e-5 ...`); a later flag wins.

    Raises `ConfigError` naming the field for an unknown flag, a missing field, or a value of the wrong type
    or out of range.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(
                Config,
                args=[*_objective_defaults(flags), *flags],
                prog=prog,
                description=description,
                config=(tyro.conf.FlagConversionOff,),
            )
    except SystemExit as exit_:
        if exit_.code in (0, None):  # --help
            raise
        raise ConfigError(_one_line(printed.getvalue())) from None


def shipped_configs() -> list[Path]:
    """Return the configuration files that ship with the program."""
    return [shipped_name(file) for file in sorted(shipped_folder("configs").glob("*.yaml"))]


def shipped_name(file: Path) -> Path:
    """Return `file` relative to the working directory if it lies below it."""
    here = Path.cwd()
    return file.relative_to(here) if file.is_relative_to(here) else file


def read_flags(file: Path) -> list[str]:
    """Read a YAML configuration file as a list of flags.

    Raises `ConfigError` naming the file (and the line if known) when it does not exist or is not a YAML
    mapping.
    """
    if not file.is_file():
        raise ConfigError(f"--config {file}: no such file; shipped: {', '.join(map(str, shipped_configs()))}")
    try:
        root = yaml.compose(file.read_text(encoding="utf-8-sig"), Loader=yaml.BaseLoader)  # text only
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file}: not a YAML file: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"--config {file}: not a configuration: its values are nested too deeply") from None
    if not isinstance(root, yaml.MappingNode):
        kind = "nothing" if root is None else root.tag.rpartition(":")[2]
        raise ConfigError(f"--config {file}: expected a mapping of sections, got {kind}")
    flags: dict[str, tuple[list[str], int]] = {}
    for name, values, line in _leaves(root, f"--config {file}"):
        if name in flags:
            field = name.removeprefix("--").replace("-", "_")
            raise ConfigError(
                f"--config {file}, line {line}: {field} stands on line {flags[name][1]} already; keep one of "
                "them"
            )
        flags[name] = (values, line)
    return [text for values, _ in flags.values() for text in values]


def load_config(file: Path, overrides: Sequence[str] = ()) -> Config:
    """Build a `Config` from a YAML file and flags; a flag overrides the file."""
    return parse_config([*read_flags(file), *overrides])


def dump_config(config: Config) -> str:
    """Return the resolved configuration as YAML; `load_config` reads it back to an equal object."""
    return yaml.safe_dump(_plain(config), sort_keys=False)


def changed_fields(old: Config, new: Config) -> list[str]:
    """List the fields in which two configurations differ, as `section.field: old -> new`."""

    def walk(a: Any, b: Any, prefix: str) -> Iterator[str]:
        for entry in dataclasses.fields(a):
            left, right, name = getattr(a, entry.name), getattr(b, entry.name), prefix + entry.name
            if dataclasses.is_dataclass(left):
                yield from walk(left, right, name + ".")
            elif left != right:
                yield f"{name}: {left!r} -> {right!r}"

    return list(walk(old, new, ""))


def _objective_defaults(flags: Sequence[str]) -> list[str]:
    """Return the default flags of the chosen objective. They come before the given flags, which override
    them."""
    values = []
    for flag, following in itertools.zip_longest(flags, flags[1:], fillvalue=""):
        name, separator, after = flag.partition("=")
        if name == "--algorithm.objective":
            values.append(after if separator else following)
    chosen = OBJECTIVES.get(values[-1]) if values else None
    return [] if chosen is None else list(chosen.defaults)


def _one_line(box: str) -> str:
    """Reduce tyro's boxed, wrapped error to its message, without the hints."""
    lines = [line.strip("│ ") for line in box.splitlines()]
    frame = [
        i for i, line in enumerate(lines) if "──" in line or "----" in line
    ]  # the first frame line holds the title; the second precedes the hints
    said = " ".join(lines[frame[0] + 1 : frame[1]] if len(frame) > 1 else lines)
    if said.startswith("Missing from"):
        return "missing " + ", ".join(line.split()[0] for line in lines if re.match(r"--\w", line))
    meant = re.search(r"Perhaps you meant:?\s+(--\S+)", " ".join(lines))
    return said + (f"; perhaps you meant {meant[1]}" if meant else "")


def _leaves(
    mapping: yaml.MappingNode, source: str, prefix: str = "--", depth: int = 1
) -> Iterator[tuple[str, list[str], int]]:
    """Yield every value of a mapping as (flag, arguments, line).

    Raises `ConfigError` naming `source` and the line for a key that occurs twice in one mapping, and for a
    node that is not an option.
    """
    lines: dict[str, int] = {}
    for key, value in mapping.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{source}, line {line}: expected the name of an option, got a {key.id}")
        if key.value == "<<":
            raise ConfigError(f"{source}, line {line}: merge keys (<<) are not read; write the options out")
        name = f"{prefix}{key.value}".replace("_", "-")
        if name in lines:
            field = name.removeprefix("--").replace("-", "_")
            raise ConfigError(
                f"{source}, line {line}: {field} stands on line {lines[name]} already; keep one of them"
            )
        lines[name] = line
        if isinstance(value, yaml.MappingNode):
            if depth == _DEEPEST:
                raise ConfigError(f"{source}, line {line}: {key.value}: nested too deeply for an option")
            yield from _leaves(value, source, f"{name}.", depth + 1)
        elif isinstance(value, yaml.SequenceNode):
            if not all(isinstance(item, yaml.ScalarNode) for item in value.value):
                raise ConfigError(
                    f"{source}, line {line}: {key.value}: expected a list of values, got a list of lists or "
                    "mappings"
                )
            yield name, [name, *map(_text, value.value)], line
        elif (
            depth > 1 or key.value not in _SECTIONS or _text(value) != "None"
        ):  # a section without options is empty
            # The "=" keeps a value that begins with a dash from being parsed as a flag.
            yield name, [f"{name}={_text(value)}"], line


def _text(node: yaml.ScalarNode) -> str:
    """Return the text of a scalar, so that the declared type of the field decides how 1e-5 or `no` is read.

    Unquoted null, true and false become Python's words.
    """
    text = str(node.value)
    return _YAML_WORDS.get(text, text) if node.style is None else text


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value
