"""The tables of README and docs are what the committed result files say, and name nothing of one machine."""

import json
from pathlib import Path

import pytest

from benchmarks import readme

ROOT = Path(readme.ROOT)
RESULTS = sorted((ROOT / "benchmarks" / "results").rglob("*.json"))


@pytest.mark.parametrize(
    ("page", "markers"),
    [("README.md", ("quickstart", "comparison", "cpu", "train_step", "weight_swap")), ("docs/evaluation.md", ("grading", "sweep"))],
)
def test_pages_show_the_committed_results(page: str, markers: tuple[str, ...]) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text == readme.render(text), "run python -m benchmarks.readme"
    for marker in markers:
        assert len(text.split(f"<!-- begin: {marker} -->")[1].split(f"<!-- end: {marker} -->")[0].splitlines()) > 5


def test_a_changed_number_is_noticed() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    mean = json.loads((ROOT / "benchmarks/results/cpu/quickstart.json").read_text(encoding="utf-8"))["after"]["accuracy_t1"]["mean"]
    assert f"{mean:.3f}" in text
    assert readme.render(text.replace(f"{mean:.3f}", "0.999")) == text


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.name)
def test_results_name_no_place_of_one_machine(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert not any(place in text for place in ('"/', " /tmp", " /root", " /home", " /work")), file
