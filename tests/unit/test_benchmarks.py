"""Benchmarks: every published record layout, every bad file named by line and field, and what to bring where
there is nothing."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlsc_mcore.commands.eval import run_eval
from rlsc_mcore.config import ConfigError
from rlsc_mcore.config_file import parse_config
from rlsc_mcore.data.questions import read_questions
from rlsc_mcore.data.records import read_question
from rlsc_mcore.data.templates import render_text
from rlsc_mcore.evaluation.benchmarks import BENCHMARKS, load_benchmark, missing_benchmarks
from rlsc_mcore.evaluation.sampling_scores import sampling_scores
from rlsc_mcore.grading.formats import grade_answer
from rlsc_mcore.types import Question

PUBLIC_SETS = Path(os.environ.get("RLSC_DATA_DIR") or Path(__file__).parents[3] / "shared" / "data")
GPQA = {
    "Question": "Which?",
    "Correct Answer": "right",
    **{f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)},
}


def write(folder: Path, name: str, *records: Any) -> Path:
    file = folder / name
    file.write_text(
        "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records),
        encoding="utf-8",
    )
    return file


@pytest.mark.parametrize(
    ("record", "answer"),
    [
        ({"problem": "p", "answer": "204", "solution": "\\boxed{1}"}, "204"),
        ({"question": "p", "answer": 27.0}, "27"),
        ({"question": "p", "answer": "so 5+13=18\n#### 1,018"}, "1018"),
        ({"problem": "p", "solution": "thus \\boxed{\\frac{1}{2}}."}, "\\frac{1}{2}"),
        ({"question": "p", "final_answer": ["$\\frac{1}{2}$"], "error": None}, "$\\frac{1}{2}$"),
    ],
)
def test_plain_records(record: dict[str, Any], answer: str) -> None:
    question = read_question(3, record, "file")
    assert (question.index, question.text, question.answer, question.answer_format) == (
        3,
        "p",
        answer,
        "math",
    )


def test_names_of_fields_that_data_sets_use() -> None:
    for name in ("answer", "expected_answer", "Answer", "final_answer", "target"):
        assert read_question(0, {"Problem": " p ", name: 5}, "file") == Question(0, "p", "5")
    svamp = {
        "Body": "There are 87 oranges",
        "Question": "How many are left?",
        "Answer": 14.0,
        "Equation": "( 87.0 - 73.0 )",
    }
    assert read_question(0, svamp, "file") == Question(0, "There are 87 oranges. How many are left?", "14")
    assert read_question(0, {"question": "", "problem": "p", "answer": "1"}, "file").text == "p"
    assert read_question(0, {"question": "q"}, "file") == Question(0, "q", None)
    assert read_question(0, {"question": "q", "solution": "thus $\\boxed{4}$"}, "file").answer == "4"


OPTION_LAYOUTS: dict[str, dict[str, Any]] = {
    "list": {"choices": ["3", "4", "5"], "answer": 1},
    "own letters": {"options": ["A) 3", "B) 4", "C) 5"], "correct": "B"},
    "own letters in brackets": {"options": ["(A) 3", "(B) 4", "(C) 5"], "answer": "(B)"},
    "own letters with points": {"options": ["A. 3", "B. 4", "C. 5"], "answer": "b"},
    "object": {"options": {"A": "3", "B": "4", "C": "5"}, "answer": "B"},
    "objects": {
        "choices": [{"label": "A", "text": "3"}, {"label": "B", "text": "4"}, {"label": "C", "text": "5"}],
        "answerKey": "B",
    },
    "text and label": {"choices": {"text": ["3", "4", "5"], "label": ["A", "B", "C"]}, "answerKey": "B"},
    "one text": {"options": "A) 3 B) 4 C) 5", "Answer": "B"},
    "lines": {"options": "(A) 3\n(B) 4\n(C) 5", "answer": "B"},
    "fields": {"A": "3", "B": "4", "C": "5", "answer": "B"},
    "named fields": {"option_a": "3", "option_b": "4", "option_c": "5", "answer": "B"},
    "text of the option": {"choices": ["3", "4", "5"], "answer": "4"},
}


@pytest.mark.parametrize("layout", OPTION_LAYOUTS)
def test_options_in_every_layout_are_asked_alike(layout: str) -> None:
    record = {"question": "2+2?", **OPTION_LAYOUTS[layout]}
    if layout == "text of the option":
        record = {"question": "2+2?", "choices": ["three", "four", "five"], "answer": "four"}
        assert read_question(0, record, "file").answer == "B"
        return
    assert read_question(0, record, "file") == Question(
        0, "2+2?\nAnswer Choices: (A) 3 (B) 4 (C) 5", "B", answer_format="choice"
    )


def test_options_within_the_question_make_it_multiple_choice() -> None:
    text = "Which is even?\n$\\textbf{(A)}\\ 3 \\qquad \\textbf{(B)}\\ 4 \\qquad \\textbf{(C)}\\ 5$"
    for answer in ("B", "(B)", "\\text{(B)}"):
        question = read_question(0, {"problem": text, "answer": answer}, "file")
        assert (question.answer, question.answer_format) == ("B", "choice")
    assert (
        read_question(0, {"problem": "Which point is nearest?", "answer": "B"}, "file").answer_format
        == "math"
    )


def test_gpqa_is_asked_as_evalchemy_asks_it(tmp_path: Path) -> None:
    write(tmp_path, "gpqa_diamond.jsonl", GPQA)
    question = load_benchmark("gpqa_diamond", tmp_path)[0]
    assert question.text == (
        "Return your final response within \\boxed{} and only include the letter choice (A, B, C, or D) as your final response.\n"
        "Problem: Which?\nOptions: A) wrong 2, B) wrong 1, C) wrong 3, D) right\nAnswer:"
    )
    assert question.answer == "D"


def test_training_and_evaluation_read_the_same_questions(tmp_path: Path) -> None:
    records = [
        {"question": "q", "choices": ["a", "b"], "answer": 1},
        {"question": "q", "final_answer": ["$1$", "2"], "error": "0.1"},
        {"problem": "p", "solution": "so $\\boxed{7}$"},
        GPQA,
    ]
    file = write(tmp_path, "mixed.jsonl", *records)
    assert read_questions(str(file)) == load_benchmark(str(file))
    (tmp_path / "mixed.json").write_text(json.dumps(records), encoding="utf-8")


@pytest.mark.parametrize("field", ["image", "images", "image_1", "decoded_image"])
def test_a_question_with_an_image_says_so(field: str) -> None:
    with pytest.raises(ConfigError, match=f"^file: `{field}`: this question needs an image"):
        read_question(0, {"question": "q", "answer": "1", field: {"bytes": "..."}}, "file")
    assert read_question(0, {"question": "q", "answer": "1", field: None}, "file").answer == "1"


@pytest.mark.parametrize("options", [None, [], "", {}])
def test_a_question_without_its_options_says_so(options: Any) -> None:
    with pytest.raises(ConfigError, match=r"^file: `choices`: expected the 2 to 10 options of this question"):
        read_question(0, {"question": "q", "choices": options, "answer": "B"}, "file")


def test_olympiad_lists_tolerances_and_context() -> None:
    question = read_question(
        0, {"question": "q", "context": "c", "final_answer": ["1.2", "3"], "error": "1e-1"}, "file"
    )
    assert (question.text, question.answer, question.tolerance) == ("c\nq", "1.2, 3", 0.1)
    assert grade_answer("\\boxed{3.05, 1.25}", question).strict
    assert (
        read_question(0, {"question": "q", "final_answer": ["1"], "error": "1e-1,1e-2"}, "file").tolerance
        == 0.1
    )


@pytest.mark.parametrize(("answer", "letter"), [(1, "B"), ("1", "B"), ("B", "B"), ("(b)", "B"), (0, "A")])
def test_multiple_choice(answer: Any, letter: str) -> None:
    question = read_question(0, {"question": "2+2?", "choices": ["3", "4", 5], "answer": answer}, "file")
    assert (question.answer, question.answer_format) == (letter, "choice")
    assert question.text.splitlines()[:4] == ["2+2?", "Answer Choices: (A) 3 (B) 4 (C) 5"]


def test_gpqa_order_hides_the_answer_and_is_the_same_everywhere() -> None:
    letters = [read_question(0, GPQA | {"Question": f"Which {i}?"}, "file").answer for i in range(200)]
    assert all(20 < letters.count(letter) < 80 for letter in "ABCD")
    question = read_question(0, GPQA, "file")
    assert question == read_question(0, GPQA, "elsewhere")
    assert f"{question.answer}) right" in question.text


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ([1], "expected a JSON object"),
        ({"answer": "1"}, "without text"),
        ({"question": " ", "answer": "1"}, "`question`: expected the question's text"),
        ({"question": "q"}, "`answer`"),
        ({"question": "q", "solution": "no box"}, "`answer`"),
        ({"question": "q", "answer": float("nan")}, "`answer`"),
        ({"question": "q", "answer": ""}, "`answer`"),
        ({"question": "q", "answer": True}, "`answer`"),
        ({"question": "q", "answer": ["1"]}, "`answer`"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "`choices`"),
        ({"question": "q", "choices": "ab", "answer": 0}, "`choices`"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "`answer`"),
        ({"question": "q", "choices": ["a", "b"], "answer": "C"}, "`answer`"),
        ({"question": "q", "choices": ["a", "b"]}, "`answer`"),
        ({"question": "q", "final_answer": []}, "`final_answer`"),
        ({"question": "q", "final_answer": ["1"], "error": "small"}, "`error`"),
        ({key: value for key, value in GPQA.items() if key != "Incorrect Answer 2"}, "`Incorrect Answer 2`"),
        ('{"question": "q", "answer": 1', "malformed JSON"),
    ],
)
def test_bad_records_name_file_line_and_field(tmp_path: Path, record: Any, named: str) -> None:
    file = write(tmp_path, "bad.jsonl", {"question": "q", "answer": 1}, "", record)
    with pytest.raises(ConfigError, match=rf"^--benchmarks: .*bad\.jsonl, line 3: .*{named}") as error:
        load_benchmark(str(file))
    assert "\n" not in str(error.value)


def test_files_are_found_by_name_in_a_folder(tmp_path: Path) -> None:
    write(tmp_path, "amc23.jsonl", {"question": "a", "answer": 27.0})
    write(tmp_path, "gsm8k_test.jsonl", {"question": "g", "answer": "#### 5"})
    assert (
        load_benchmark("amc23", tmp_path)[0].answer == "27"
        and load_benchmark("gsm8k", tmp_path)[0].answer == "5"
    )
    assert len(load_benchmark("embedded:validation")) == 240


@pytest.mark.parametrize("name", BENCHMARKS)
def test_an_absent_benchmark_says_which_file_to_bring(tmp_path: Path, name: str) -> None:
    (message,) = missing_benchmarks([name], tmp_path)
    assert message.startswith(f"--benchmarks: {name}: bring {name}.jsonl (one JSON object per line with `")
    assert ("hf auth login" in message) == BENCHMARKS[name].is_gated
    assert str(tmp_path) in message and BENCHMARKS[name].hub in message and "\n" not in message


def cache_snapshot(home: Path, name: str, readme: str, **files: str) -> None:
    """Lay a data set out as `hf download --repo-type dataset NAME` leaves it."""
    repository, commit = home / "hub" / f"datasets--{name.replace('/', '--')}", "a" * 40
    snapshot = repository / "snapshots" / commit
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text(f"---\n{readme}\n---\n", encoding="utf-8")
    for stem, text in files.items():
        (snapshot / f"{stem}.jsonl").write_text(text, encoding="utf-8")


def test_a_downloaded_hub_set_is_read_without_network(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    rows = [json.dumps({"question": f"q{i}?", "answer": f"so\n#### {i},000"}) + "\n" for i in range(3)]
    configs = [
        f"- config_name: {name}\n  data_files:\n  - split: test\n    path: {name}.jsonl"
        for name in ("main", "socratic")
    ]
    cache_snapshot(
        tmp_path,
        BENCHMARKS["gsm8k"].hub,
        "configs:\n" + "\n".join(configs),
        main="".join(rows),
        socratic=rows[0],
    )
    program = "from rlsc_mcore.evaluation import benchmarks as b; print([(q.text, q.answer) for q in b.load_benchmark('gsm8k')])"
    environment = os.environ | {
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": "",
        "HF_DATASETS_CACHE": "",
    }
    environment = {name: value for name, value in environment.items() if value}
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert ast.literal_eval(ended.stdout.splitlines()[-1]) == [
        ("q0?", "0000"),
        ("q1?", "1000"),
        ("q2?", "2000"),
    ]
    program = "from rlsc_mcore.evaluation import benchmarks as b; print(b.missing_benchmarks(['amc23'])[0])"
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert (
        ended.stdout.splitlines()[-1].startswith("--benchmarks: amc23: bring amc23.jsonl")
        and "did not load" in ended.stdout
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--benchmarks", "aime26"], "expected aime24, aime25, math500"),
        (["--benchmarks", "absent.jsonl"], "no such file"),
        (["--benchmarks", "a.jsonl", "--data", "b.jsonl"], "--data"),
        (["--benchmarks", "a.jsonl,"], "separated by commas"),
        (["--data", "embedded:test", "--templates", "plain"], "--templates: expected chat"),
        (["--data", "embedded:test", "--templates", "chat,chat"], "asked for twice"),
        (["--data", "embedded:test", "--templates", "all", "--output", "x.json"], "need a folder"),
        (["--data", "embedded:test", "--output", "x.csv"], "ends in .json"),
        (["--data", "embedded:test", "--templates", "absent.jinja"], "cannot read absent.jinja"),
        (["--data", "embedded:test", "--optimzer.lr", "1"], "--optimzer.lr"),
        (["--data", "embedded:test", "--num-samples", "0"], "evaluation.num_samples"),
    ],
)
def test_bad_evaluations_are_refused_before_an_engine_is_built(arguments: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as error:
        run_eval(["--model", "embedded:tiny_qwen2", *arguments])
    assert "\n" not in str(error.value)


def test_a_users_template_sees_the_question_alone(tmp_path: Path) -> None:
    class Tokenizer:
        chat_template = unk_token_id = None
        bos_token = "<s>"

    def text(source: str) -> str:
        file = tmp_path / "mine.jinja"
        file.write_text(source, encoding="utf-8")
        return render_text(str(file), "1+1 {{ x }}?", Tokenizer())  # type: ignore[arg-type]

    assert text("{{ bos_token }}Q: {{ question }}\nA:") == "<s>Q: 1+1 {{ x }}?\nA:"
    for source in (
        "{{ question.__class__.__mro__ }}",
        "{{ missing }}",
        "{% if %}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
    ):
        with pytest.raises(ConfigError, match=r"data\.template: .*mine\.jinja"):
            text(source)


def test_templates_are_checked_by_name() -> None:
    flags = ["--run-dir", "r", "--model.path", "m", "--data.path", "d"]
    assert parse_config([*flags, "--data.template", "a.jinja"]).data.template == "a.jinja"
    with pytest.raises(
        ConfigError,
        match=r"^data\.template: expected chat, .*, none or a file ending in \.jinja, got 'x'",
    ):
        parse_config([*flags, "--data.template", "x"])


@pytest.mark.skipif(
    not PUBLIC_SETS.is_dir(), reason="the public question sets are not on this machine (RLSC_DATA_DIR)"
)
@pytest.mark.parametrize(("name", "count"), [("aime24", 30), ("amc23", 40), ("gsm8k", 1319)])
def test_public_sets(name: str, count: int) -> None:
    questions = load_benchmark(name, PUBLIC_SETS)
    assert len(questions) == count
    assert all(grade_answer(f"\\boxed{{{question.answer}}}", question).strict for question in questions)
    assert sampling_scores([], 1.0) == {}
