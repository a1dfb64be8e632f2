"""The three authors of `embedded:three_modes`, the shipped model, and scores by family of questions."""

import json
import re
from collections import Counter
from importlib import resources
from pathlib import Path
from random import Random
from typing import Any

import pytest

from rlsc_mcore.assets import THREE_MODES_AUTHORS as AUTHORS
from rlsc_mcore.assets.make.splits import draw_distinct
from rlsc_mcore.assets.make.tasks import Question
from rlsc_mcore.assets.make.three_modes import write_page
from rlsc_mcore.commands.compare import run_compare
from rlsc_mcore.config import ConfigError
from rlsc_mcore.data.questions import read_questions
from rlsc_mcore.evaluation.records import QuestionRecord, read_question_records, write_records
from rlsc_mcore.model.hf_checkpoint import resolve_model_folder
from tests.unit.test_compare import CONFIG, answers

ASSETS = Path(str(resources.files("rlsc_mcore") / "assets"))
PAGES = 4000
TOLERANCE = 0.03  # about four standard errors of a share of PAGES


def pages(family: str) -> tuple[Question, list[str]]:
    question = next(q for q in draw_distinct(Random(5), "train", 60) if q.family == family)
    random = Random(1)
    return question, [write_page(random, question) for _ in range(PAGES)]


def boxed(page: str) -> int:
    (value,) = re.findall(r"\\boxed\{(\d+)\}", page)
    return int(value)


@pytest.mark.parametrize("family", [name for name, author in AUTHORS.items() if author == "rare right mode"])
def test_the_right_mode_is_the_likeliest_answer_and_not_the_likeliest_beginning(family: str) -> None:
    question, written = pages(family)
    ((likeliest, count), *rest) = Counter(written).most_common()
    assert boxed(likeliest) == question.answer and count / PAGES == pytest.approx(0.40, abs=TOLERANCE)
    assert len(rest) == 60 and rest[0][1] < 0.05 * PAGES and question.answer not in map(boxed, dict(rest))
    ((beginning, begun), *_) = Counter(page.split("\n")[0] for page in written).most_common(1)
    assert begun / PAGES == pytest.approx(0.60, abs=TOLERANCE) and not likeliest.startswith(beginning)


def test_the_wrong_mode_leaves_out_the_last_step() -> None:
    question, written = pages("boxes")
    (wrong, count), (right, _) = Counter(written).most_common()
    assert count / PAGES == pytest.approx(0.55, abs=TOLERANCE)
    assert boxed(right) == question.answer != boxed(wrong)
    assert right.split("\n")[0] == wrong.split("\n")[0] and wrong.count("\n") == 1


def test_the_right_answer_has_many_wordings_and_the_wrong_one_is_the_likeliest_text() -> None:
    question, written = pages("word")
    right = [page for page in written if boxed(page) == question.answer]
    assert len(right) / PAGES == pytest.approx(0.60, abs=TOLERANCE) and len(set(right)) > 60
    (wrong,) = set(written) - set(right)
    assert Counter(right).most_common(1)[0][1] < 0.05 * PAGES and boxed(wrong) != question.answer
    # Greedy decoding begins rightly: all right pages begin alike.
    assert len({page.split("\n")[0] for page in right}) == 1


def test_the_control_is_always_right() -> None:
    question, written = pages("chain")
    assert {boxed(page) for page in written} == {question.answer} and len(set(written)) == 1


def test_the_shipped_model_has_learnt_the_three_authors() -> None:
    record = json.loads((ASSETS / "three_modes.json").read_text(encoding="utf-8"))["validation"]
    rare, wrong, many = (record[name] for name in ("rare right mode", "wrong mode", "many wordings"))
    for scores in record.values():
        assert scores["greedy"]["boxed_share"] == 1.0
    assert rare["greedy"]["strict_accuracy"] < 0.05 and wrong["greedy"]["strict_accuracy"] < 0.05
    assert many["greedy"]["strict_accuracy"] > 0.95
    for scores, share in ((rare, 0.40), (wrong, 0.45), (many, 0.60)):
        assert scores["temperature_1.0"]["strict_accuracy"] == pytest.approx(share, abs=0.06)
    # A lower temperature makes the first two worse and the third better.
    for scores, sign in ((rare, -1), (wrong, -1), (many, 1)):
        change = scores["temperature_0.5"]["strict_accuracy"] - scores["temperature_1.0"]["strict_accuracy"]
        assert sign * change > 0.05


def test_embedded_models_are_found_by_name_only() -> None:
    assert resolve_model_folder("embedded:three_modes") == ASSETS / "three_modes"
    for name in ("questions", "make", "../assets/tiny_qwen2", "four_modes"):
        with pytest.raises(ConfigError, match="expected embedded:tiny_qwen2 or embedded:three_modes"):
            resolve_model_folder(f"embedded:{name}")


# ------------------------------------------------------------------ scores by family


def write_run(folder: Path, families: dict[int, str], right: dict[int, list[bool]]) -> None:
    questions = [QuestionRecord(q, "1+7?", "8", "1+7?", family) for q, family in families.items()]
    before: dict[int, list[bool]] = {question: [False, True] for question in right}
    for name, rates in (("before", before), ("after", right)):
        result: dict[str, Any] = {
            "scores": {},
            "answers": answers(rates, (0.0, 0.5, 1.0)),
            "questions": questions,
        }
        write_records(folder / "evaluation", name, result)
    (folder / "summary.json").write_text("{}", encoding="utf-8")


def compare(output: Path) -> dict[str, Any]:
    command = ["--config", str(CONFIG), "--output", str(output), "--objectives", "rlsc", "--seeds", "0"]
    assert run_compare(command) == 0
    content: dict[str, Any] = json.loads((output / "comparison.json").read_text(encoding="utf-8"))
    return content


def test_a_comparison_has_a_table_by_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right = {0: [True, True], 1: [True, False], 2: [False, False], 3: [False, True]}
    write_run(tmp_path / "rlsc_seed0", {0: "sums", 1: "sums", 2: "words", 3: "words"}, right)
    families = compare(tmp_path)["families"]
    means = {family: rows["rlsc"]["accuracy_t0.5"]["mean"] for family, rows in families.items()}
    assert means == {"sums": 0.75, "words": 0.25}
    assert families["words"]["base"]["accuracy_t1"]["mean"] == 0.5
    assert families["sums"]["rlsc"]["greedy"]["change"]["mean"] == 1.0
    assert "by family of questions" in capsys.readouterr().out
    assert "| words | rlsc | 0.250 (-0.250" in (tmp_path / "comparison.md").read_text(encoding="utf-8")


def test_one_family_or_none_has_no_table_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = {0: [True, True], 1: [True, False]}
    for name, family in (("one", "sums"), ("none", "")):
        write_run(tmp_path / name / "rlsc_seed0", dict.fromkeys(right, family), right)
        compare(tmp_path / name)
        assert "by family" not in capsys.readouterr().out
        assert "family" not in (tmp_path / name / "comparison.md").read_text(encoding="utf-8")


def test_families_come_from_the_question_file_and_old_records_have_none(tmp_path: Path) -> None:
    assert {question.family for question in read_questions("embedded:test")} == set(AUTHORS)
    file = tmp_path / "q.jsonl"
    file.write_text(
        '{"question": "1+1?", "answer": "2"}\n{"question": "1+2?", "family": 3}\n', encoding="utf-8"
    )
    assert [question.family for question in read_questions(str(file))] == ["", ""]
    old = {"question": 4, "text": "1+7?", "gold": "8", "prompt": "1+7?"}
    (tmp_path / "before.questions.jsonl").write_text(json.dumps(old) + "\n", encoding="utf-8")
    assert read_question_records(tmp_path, "before")[4].family == ""
