"""Questions: every accepted form read to values found by hand, every bad input to its message, sampling by
its laws."""

import bz2
import gzip
import importlib.resources
import json
import lzma
import math
import os
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsc_mcore.config import ConfigError
from rlsc_mcore.data.questions import EMBEDDED_SETS, QuestionSampler, questions_fingerprint, read_questions
from rlsc_mcore.data.records import final_answer
from rlsc_mcore.types import Question

PUBLIC_SETS = Path(os.environ.get("RLSC_DATA_DIR") or Path(__file__).parents[3] / "shared" / "data")


def write(folder: Path, content: bytes | str) -> str:
    path = folder / "questions.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_reads_every_field_name_and_form_of_answer(tmp_path: Path) -> None:
    lines = [
        {"problem": "A?", "answer": "204"},
        {"problem": "B?", "answer": 27.0, "question": "not this one"},
        {"question": "C?", "answer": "4 * 450 = <<4*450=1800>>1800\n#### 1,800"},
        {"question": "D?", "problem": None, "answer": 7},
        {"question": "  E \u2028 two lines?\n", "answer": None},
        {"question": "F?"},
        {"question": "G?", "answer": 2.5},
        {"question": "H?", "answer": "(1,234)"},
    ]
    path = write(tmp_path, "\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    assert read_questions(path) == [
        Question(0, "A?", "204"),
        Question(1, "B?", "27"),
        Question(2, "C?", "1800"),
        Question(3, "D?", "7"),
        Question(4, "E \u2028 two lines?", None),
        Question(5, "F?", None),
        Question(6, "G?", "2.5"),
        Question(7, "H?", "(1,234)"),
    ]


def test_byte_order_mark_crlf_and_blank_lines_change_nothing(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        b'\xef\xbb\xbf{"question": "caf\xc3\xa9?", "answer": "1"}\r\n\r\n   \r\n{"question": "two?"}\r\n',
    )
    assert read_questions(path) == [Question(0, "café?", "1"), Question(1, "two?", None)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("204", "204"),
        ("033", "033"),
        (" 33 \n", "33"),
        (27.0, "27"),
        (-0.5, "-0.5"),
        (1e300, "1e+300"),
        (12, "12"),
        ("a #### b\n#### 70,000", "70000"),
        ("#### -1,234.50", "-1234.50"),
        ("1,2", "1,2"),
        ("12,34", "12,34"),
        ("\\frac{1}{2}", "\\frac{1}{2}"),
    ],
)
def test_final_answer(value: str | float, expected: str) -> None:
    assert final_answer(value) == expected


GOOD = b'{"question": "fine?"}\n'


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        (GOOD + b'\n{"question": "cut', 3, "malformed JSON (Unterminated string starting at at column 14)"),
        (GOOD + b"question: yaml?", 2, "malformed JSON"),
        (b"[" * 200_000, 1, "malformed JSON"),
        (b'{"question": "q", "answer": ' + b"9" * 5000 + b"}", 1, "malformed JSON"),
        (GOOD + b'["question"]', 2, "expected a JSON object, got list"),
        (GOOD + b'"question"', 2, "expected a JSON object, got str"),
        (
            b'{"prompt": "q", "answer": 1}',
            1,
            "a question without text: expected `problem` or `question`, got the fields 'prompt', 'answer'",
        ),
        (b"{}", 1, "a question without text: expected `problem` or `question`, got no fields"),
        (b'{"question": null}', 1, "a question without text"),
        (GOOD + b'{"question": " \\n\\t"}', 2, "`question`: expected the question's text, got ' \\n\\t'"),
        (GOOD + b'{"problem": ""}', 2, "`problem`: expected the question's text, got ''"),
        (b'{"question": 5}', 1, "`question`: expected the question's text, got 5"),
        (b'{"question": ["a"]}', 1, "`question`: expected the question's text, got ['a']"),
        (GOOD + b'{"question": "caf\xe9"}', 2, "not UTF-8 (byte 18 of the line)"),
        ('{"question": "a"}\n'.encode("utf-16"), 1, "not UTF-8 (byte 1 of the line)"),
        (b'{"question": "\\ud800 half"}', 1, "`question`: an unpaired surrogate"),
        (b'{"question": "q", "answer": "\\udfff"}', 1, "`answer`: an unpaired surrogate"),
        (b'{"question": "q", "answer": true}', 1, "`answer`: expected a string or a finite number, got True"),
        (b'{"question": "q", "answer": NaN}', 1, "`answer`: expected a string or a finite number, got nan"),
        (b'{"question": "q", "answer": [1]}', 1, "`answer`: expected a string or a finite number, got [1]"),
        (b'{"question": "q", "answer": "work ####  "}', 1, "`answer`: empty"),
    ],
)
def test_bad_line_names_file_line_and_field(tmp_path: Path, content: bytes, line: int, what: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        read_questions(path)
    message = str(caught.value)
    assert message.startswith(f"data.path: {path}, line {line}: {what}")
    assert "\n" not in message and len(message) < 400


@pytest.mark.parametrize(
    "content",
    [
        b'[{"question": "A?", "answer": 1}, {"question": "B?"}]',
        b'\xef\xbb\xbf\n[\n  {"question": "A?", "answer": "1"},\n  {"question": "B?"}\n]\n',
        b'{"question": "A?", "answer": "1"}\n{"problem": "", "question": "B?"}',
    ],
)
def test_a_list_of_objects_reads_like_lines(tmp_path: Path, content: bytes) -> None:
    assert read_questions(write(tmp_path, content)) == [Question(0, "A?", "1"), Question(1, "B?", None)]


def test_one_object_over_several_lines_is_one_question(tmp_path: Path) -> None:
    assert read_questions(write(tmp_path, b'{\n  "question": "A?",\n  "answer": 1\n}\n')) == [
        Question(0, "A?", "1")
    ]


@pytest.mark.parametrize(
    ("content", "place", "what"),
    [
        (
            b'[\n  {"question": "A?"},\n  {"question": }\n]',
            ", line 3",
            "malformed JSON (Expecting value at column 16); expected a list",
        ),
        (b'[{"question": "A?"}, 5]', ", item 2", "expected a JSON object, got int"),
        (b'[{"question": "A?"}, {"answer": "1"}]', ", item 2", "a question without text"),
        (
            b'{\n "data": [{"question": "A?"}]\n}',
            "",
            "a question without text: expected `problem` or `question`, got the fields 'data'",
        ),
        (
            GOOD + b'{"question": "A?", "answer": "1", "answer": "2"}',
            ", line 2",
            "malformed JSON ('answer' stands twice in one object)",
        ),
    ],
)
def test_a_bad_item_is_named(tmp_path: Path, content: bytes, place: str, what: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        read_questions(path)
    assert str(caught.value).startswith(f"data.path: {path}{place}: {what}") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("q.parquet", b"PAR1\x15\x04", "a Parquet file"),
        ("q.jsonl", b"PAR1\x15\x04", "a Parquet file"),
        ("q.jsonl.gz", gzip.compress(GOOD), "gzip-compressed"),
        ("q.jsonl.bz2", bz2.compress(GOOD), "bzip2-compressed"),
        ("q.jsonl.xz", lzma.compress(GOOD), "xz-compressed"),
        ("q.zst", b"\x28\xb5\x2f\xfd\x04", "zstd-compressed"),
        ("q.zip", b"PK\x03\x04\x14", "a zip archive"),
        ("q.arrow", b"ARROW1\x00\x00", "an Arrow file"),
        ("q.csv", b"question,answer\n1+1?,2\n", "a table of separated values"),
        ("q.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        ("q.jsonl", b"<!DOCTYPE html>\n<html>", "a web page"),
    ],
    ids=lambda value: value if isinstance(value, str) else "content",  # compressed bytes hold the time
)
def test_another_format_is_named_with_what_makes_jsonl_of_it(
    tmp_path: Path, name: str, content: bytes, what: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_questions(str(tmp_path / name), field="evaluation.path")
    message = str(caught.value)
    assert (
        message.startswith(f"evaluation.path: {tmp_path / name}: {what}")
        and "expected JSONL" in message
        and "UTF-8" not in message
    )


def test_a_path_may_begin_with_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").write_bytes(GOOD)
    assert read_questions("~/mine") == [Question(0, "fine?", None)]
    with pytest.raises(ConfigError, match=r"^data\.path: no such file: ~/other\.jsonl$"):
        read_questions("~/other.jsonl")


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_empty_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        read_questions(path, field="evaluation.path")
    assert str(caught.value).startswith(f"evaluation.path: {path} holds no questions; ")


@pytest.mark.parametrize("name", ["absent.jsonl", "./absent", "dir/../absent/file", "a b"])
def test_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        read_questions(name)
    assert str(caught.value) == f"data.path: no such file: {name}"


def test_folder_in_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_questions(str(tmp_path))
    assert (
        str(caught.value)
        == f"data.path: cannot read {str(tmp_path)!r}: Is a directory; expected a JSONL file"
    )


@pytest.mark.parametrize("name", EMBEDDED_SETS)
def test_embedded_sets_read_with_answers(name: str) -> None:
    if not importlib.resources.files("rlsc_mcore").joinpath("assets", "questions", f"{name}.jsonl").is_file():
        pytest.skip("the embedded questions are not in this tree")
    questions = read_questions(f"embedded:{name}")
    assert len(questions) >= 50
    assert all(question.answer for question in questions)
    assert len({question.text for question in questions}) == len(questions)


def test_unknown_embedded_set() -> None:
    with pytest.raises(ConfigError) as caught:
        read_questions("embedded:dev")
    assert (
        str(caught.value)
        == "data.path: expected one of embedded:train, embedded:validation, embedded:test, got 'embedded:dev'"
    )


def test_hub_name_without_the_package_says_what_to_install_or_bring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError) as caught:
        read_questions("HuggingFaceH4/aime_2024")
    message = str(caught.value)
    assert message.startswith("data.path: there is no file 'HuggingFaceH4/aime_2024'; ")
    assert 'pip install "rlsc_mcore[hub]"' in message and "JSONL" in message


def test_hub_rows_and_hub_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = ModuleType("datasets")
    asked = []

    def load_dataset(name: str, split: str) -> list[dict[str, object]]:
        asked.append((name, split))
        if split != "test":
            raise ConnectionError("no route to the hub\nsecond line")
        return [{"problem": "A?", "answer": 3.0}, {"prompt": "B?"}][: 1 if name == "good" else 2]

    hub.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert read_questions("good", split="test") == [Question(0, "A?", "3")]
    with pytest.raises(ConfigError, match=r"^data\.path: bad, split test, row 1: a question without text"):
        read_questions("bad", split="test")
    with pytest.raises(ConfigError) as caught:
        read_questions("good")
    assert "split 'train', did not load (no route to the hub); " in str(caught.value) and "\n" not in str(
        caught.value
    )
    assert asked == [("good", "test"), ("bad", "test"), ("good", "train")]


@pytest.mark.skipif(
    not PUBLIC_SETS.is_dir(), reason="the public question sets are not on this machine (RLSC_DATA_DIR)"
)
@pytest.mark.parametrize(
    ("name", "count", "first_answers"),
    [
        ("aime24", 30, ["204", "113", "371"]),
        ("amc23", 40, ["27", "36", "45"]),
        ("gsm8k_test", 1319, ["18", "3", "70000"]),
    ],
)
def test_public_sets(name: str, count: int, first_answers: list[str]) -> None:
    questions = read_questions(str(PUBLIC_SETS / f"{name}.jsonl"))
    assert len(questions) == count
    assert [question.answer for question in questions[:3]] == first_answers
    assert all(math.isfinite(float(question.answer or "nan")) for question in questions)


def test_fingerprint_sees_text_answer_and_order() -> None:
    base = [Question(0, "a", "1"), Question(1, "b", None)]
    others = [
        [Question(0, "a", "2"), Question(1, "b", None)],
        [Question(0, "a", "1"), Question(1, "c", None)],
        [Question(0, "b", None), Question(1, "a", "1")],
        [Question(0, "a", "1"), Question(1, "b", "None")],
        base[:1],
    ]
    fingerprints = [questions_fingerprint(questions) for questions in [base, *others]]
    assert len(set(fingerprints)) == len(fingerprints)
    assert questions_fingerprint(list(base)) == fingerprints[0]
    assert fingerprints[0] == "8d654063117289e9152050f84c7411318a0d1b01de4bea2e9111a45958cb5553"


sizes = st.integers(1, 40)


@given(sizes, sizes, st.booleans(), st.integers(0, 2**40))
def test_epochs_are_permutations_and_steps_hold_distinct_questions(
    num_questions: int, per_step: int, shuffle: bool, seed: int
) -> None:
    sampler = QuestionSampler(num_questions, per_step, shuffle, seed)
    num_steps = -(-4 * num_questions // per_step)
    steps = [sampler.step_indices(step) for step in range(num_steps)]
    stream = [index for step in steps for index in step]
    for epoch in range(len(stream) // num_questions):
        assert sorted(stream[epoch * num_questions : (epoch + 1) * num_questions]) == list(
            range(num_questions)
        )
    for step in steps:
        assert len(step) == per_step
        counts = Counter(step)
        # Distinct where there are enough questions; otherwise whole epochs plus at most one part of one at
        # either end.
        assert max(counts.values()) <= (1 if per_step <= num_questions else per_step // num_questions + 2)


@given(sizes, sizes, st.integers(0, 1000), st.lists(st.integers(0, 300), min_size=1, max_size=6))
def test_a_step_depends_on_seed_and_step_alone(
    num_questions: int, per_step: int, seed: int, steps: list[int]
) -> None:
    sampler = QuestionSampler(num_questions, per_step, True, seed)
    asked_in_this_order = [sampler.step_indices(step) for step in steps]
    assert asked_in_this_order == [
        QuestionSampler(num_questions, per_step, True, seed).step_indices(step) for step in steps
    ]


def test_order_without_shuffle_is_the_files() -> None:
    sampler = QuestionSampler(5, 3, False, seed=9)
    assert [sampler.step_indices(step) for step in range(4)] == [[0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1]]


def test_shuffled_order_differs_by_epoch_and_seed_and_is_frozen() -> None:
    sampler = QuestionSampler(10, 10, True, seed=0)
    orders = [sampler.step_indices(step) for step in range(20)] + [
        QuestionSampler(10, 10, True, seed=1).step_indices(0)
    ]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert orders[0] == [
        1,
        6,
        8,
        0,
        7,
        5,
        9,
        4,
        2,
        3,
    ]  # a change here breaks the resuming of every run begun before it


def test_straddling_steps_still_visit_uniformly() -> None:
    # Keeping a step distinct must not favour a question: first places of the epoch after a straddle, over
    # many seeds.
    counts: Counter[int] = Counter()
    for seed in range(4000):
        counts[QuestionSampler(4, 3, True, seed).step_indices(1)[1]] += 1
    assert (
        all(abs(count - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5 for count in counts.values())
        and len(counts) == 4
    )
