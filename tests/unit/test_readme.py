"""The tables of README and docs are what the committed result files say, and name nothing of one machine."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import readme

ROOT = Path(readme.ROOT)
OPTION_NAMES = Path(__file__).with_name("option_names.txt")
RESULTS = sorted((ROOT / "benchmarks" / "results").rglob("*.json"))


@pytest.mark.parametrize(
    ("page", "markers"),
    [
        ("README.md", ("quickstart_short",)),
        ("docs/results.md", ("quickstart", "comparison", "cpu", "train_step", "weight_swap")),
        ("docs/evaluation.md", ("grading", "sweep")),
    ],
)
def test_pages_show_the_committed_results(page: str, markers: tuple[str, ...]) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text == readme.render(text), "run python -m benchmarks.readme"
    for marker in markers:
        assert (
            len(text.split(f"<!-- begin: {marker} -->")[1].split(f"<!-- end: {marker} -->")[0].splitlines())
            > 5
        )


def test_a_changed_number_is_noticed() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    mean = json.loads((ROOT / "benchmarks/results/cpu/quickstart.json").read_text(encoding="utf-8"))["after"][
        "accuracy_t0.5"
    ]["mean"]
    assert f"{mean:.3f}" in text
    assert readme.render(text.replace(f"{mean:.3f}", "0.999")) == text


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.name)
def test_results_name_no_place_of_one_machine(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert not any(place in text for place in ('"/', " /tmp", " /root", " /home", " /work")), file


def test_the_readme_is_short_and_names_existing_pages() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    links = re.findall(r"\]\(([^)#]+)\)|(?:src|srcset)=\"([^\"]+)\"", text)
    targets = [target for pair in links for target in pair if target and "://" not in target]
    assert len(targets) > 10 and all((ROOT / target).is_file() for target in targets)


def test_generated_pages_are_current() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "make_reference.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_reference_names_every_field() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    names = OPTION_NAMES.read_text(encoding="utf-8").split()
    assert len(names) > 50 and all(f"### `{name}`" in text for name in names)
