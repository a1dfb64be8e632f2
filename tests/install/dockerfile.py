"""Read a Dockerfile of launch/images, and print it as bash variables for tests/install/bare_machine.sh.

`python3 -m tests.install.dockerfile FILE` prints `distribution`, the name in `FROM debian:NAME-slim`;
`destination`, the folder of `COPY . FOLDER`; `build`, a script of the ARG, ENV, WORKDIR and RUN instructions;
and `settings`, a script of those that hold in a container too (ENV and WORKDIR). Only the standard library is
used.
"""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

INSTRUCTIONS = ("FROM", "ARG", "ENV", "COPY", "RUN", "WORKDIR", "CMD")


def read_instructions(file: Path) -> list[tuple[str, str]]:
    """Return (instruction, argument) of each line; raises ValueError for an instruction not in
    `INSTRUCTIONS`."""
    found = []
    text = re.sub(r"\\\n\s*", "", file.read_text(encoding="utf-8"))
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        instruction, _, argument = line.partition(" ")
        if instruction not in INSTRUCTIONS:
            raise ValueError(f"{file}: expected one of {', '.join(INSTRUCTIONS)}, got {line!r}")
        found.append((instruction, argument.strip()))
    return found


def shell_variables(instructions: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return the four variables that the module's docstring names."""
    variables = {"distribution": "", "destination": ""}
    build, settings = ["set -e"], ["set -e"]
    for instruction, argument in instructions:
        if instruction == "FROM":
            image = re.fullmatch(r"debian:(\w+)-slim", argument)
            if image is None:
                raise ValueError(f"FROM: expected debian:NAME-slim, got {argument!r}")
            variables["distribution"] = image[1]
        elif instruction == "COPY":
            copied = re.fullmatch(r"\. (/\S+)", argument)
            if copied is None:
                raise ValueError(f"COPY: expected . FOLDER, got {argument!r}")
            variables["destination"] = copied[1]
        elif instruction == "RUN":
            build.append(f"(\n{argument}\n)")
        elif instruction == "ARG":
            name, _, default = argument.partition("=")
            build.append(f"export {name}=${{{name}-{default}}}")
        elif instruction in ("ENV", "WORKDIR"):
            folder = shlex.quote(argument)
            line = f"export {argument}" if instruction == "ENV" else f"mkdir -p {folder} && cd {folder}"
            build.append(line)
            settings.append(line)
    return variables | {"build": "\n".join(build), "settings": "\n".join(settings)}


if __name__ == "__main__":
    for name, value in shell_variables(read_instructions(Path(sys.argv[1]))).items():
        print(f"{name}={shlex.quote(value)}")
