"""`rlsc eval` with the real engine: several benchmarks and templates in one go, and a run's weights instead
of a folder's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlsc_mcore.evaluation.records import read_answers, read_question_records

CHOICE = {"question": "Which is 2+2?", "choices": ["3", "4"], "answer": "B"}


def rlsc(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "rlsc_mcore.cli", *arguments],
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_benchmarks_under_several_templates(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(json.dumps(CHOICE) + "\n", encoding="utf-8")
    (tmp_path / "mine.jinja").write_text(
        "<|im_start|>user\nPlease: {{ question }}<|im_end|>\n<|im_start|>assistant\n", encoding="utf-8"
    )
    common = [
        "--k",
        "4",
        "--temperature",
        "1.0",
        "--evaluation.max-questions",
        "6",
        "--rollout.max-new-tokens",
        "64",
        "--model.dtype",
        "float32",
    ]
    benchmarks, templates = (
        f"embedded:validation,{tmp_path / 'mine.jsonl'}",
        f"chat,none,{tmp_path / 'mine.jinja'}",
    )
    printed = rlsc(
        *("eval", "--model", "embedded:tiny_qwen2", "--benchmarks", benchmarks, "--templates", templates),
        *("--output", str(tmp_path / "out"), *common),
    )
    assert "pass@4, T = 1" in printed and "maj@4, T = 1" in printed
    names = sorted(file.stem for file in (tmp_path / "out").glob("*.json"))
    assert names == [f"{b}.{t}" for b in ("embedded_validation", "mine") for t in ("chat", "mine", "none")]
    for name in names:
        scores = json.loads((tmp_path / "out" / f"{name}.json").read_text(encoding="utf-8"))
        answers, asked = read_answers(tmp_path / "out", name), read_question_records(tmp_path / "out", name)
        assert len(answers) == len(asked) * (1 + 4)
        # The scores are those of the answers beside them.
        greedy = [answer.strict for answer in answers if answer.temperature == 0]
        assert scores["greedy"]["mean"] == pytest.approx(sum(greedy) / len(greedy))
        assert (
            0
            <= scores["by_temperature"]["1"]["pass@1"]["mean"]
            <= scores["by_temperature"]["1"]["pass@4"]["mean"]
            <= 1
        )
        assert scores["protocol"]["grader"] == "boxed" and scores["protocol"]["max_new_tokens"] == 64
    prompt = read_question_records(tmp_path / "out", "embedded_validation.mine")[0].prompt
    assert prompt.startswith("<|im_start|>user\nPlease: ")
    assert "(B) 4" in read_question_records(tmp_path / "out", "mine.none")[0].prompt


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_runs_last_weights(tmp_path: Path) -> None:
    config = Path(__file__).parents[2] / "configs" / "tiny_cpu.yaml"
    run, few = tmp_path / "run", ["--evaluation.max-questions", "6"]
    rlsc(
        "train",
        "--config",
        str(config),
        "--run-dir",
        str(run),
        "--training.num-steps",
        "1",
        "--data.questions-per-step",
        "4",
        *few,
    )
    rlsc("eval", "--model", str(run), "--output", str(tmp_path / "again.json"), *few)
    assert read_answers(tmp_path, "again") == read_answers(run / "evaluation", "after")
    rlsc("eval", "--model", str(run), "--checkpoint", "1", "--output", str(tmp_path / "named.json"), *few)
    assert read_answers(tmp_path, "named") == read_answers(tmp_path, "again")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_protocol_of_examples_stop_strings_budget_and_grader(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(json.dumps(CHOICE) + "\n", encoding="utf-8")
    (tmp_path / "examples.jsonl").write_text(
        json.dumps({"problem": "1+1?", "solution": "It is \\boxed{2}."}) + "\n", encoding="utf-8"
    )
    rlsc(
        *(
            "eval",
            "--model",
            "embedded:tiny_qwen2",
            "--data",
            str(tmp_path / "mine.jsonl"),
            "--templates",
            "chat",
            "--k",
            "4",
        ),
        *(
            "--few-shot",
            "1",
            "--few-shot-file",
            str(tmp_path / "examples.jsonl"),
            "--token-budget",
            "24",
            "--stop",
            "=",
            "--top-p",
            "0.9",
        ),
        *(
            "--grader",
            "lenient",
            "--temperature",
            "1.0",
            "--model.dtype",
            "float32",
            "--output",
            str(tmp_path / "out.json"),
        ),
    )
    answers = read_answers(tmp_path, "out")
    assert all("=" not in answer.text and answer.tokens <= 24 for answer in answers)
    assert all(answer.strict == answer.lenient and answer.log_prob is None for answer in answers)
    assert (
        "1+1?\nIt is \\boxed{2}.\n\nWhich is 2+2?\nAnswer Choices: (A) 3 (B) 4"
        in read_question_records(tmp_path, "out")[0].prompt
    )
    protocol = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["protocol"]
    assert protocol == {
        "template": "chat",
        "grader": "lenient",
        "few_shot": 1,
        "max_new_tokens": 24,
        "top_p": 0.9,
        "stop": ["="],
    }
