"""Users' files in whole runs: what is read is what they say, and what a run leaves stays readable and
comparable."""

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlsc_mcore.evaluation.records import read_answers
from tests.e2e.runs import _leave_groups, weights
from tests.helpers.folders import copy_embedded
from tests.helpers.ranks import run_ranks

QUESTIONS = [{"question": "What is 1+2?", "answer": "3"}, {"question": "What is 2+2?", "answer": "4"}]
SMALL = [
    "--model.dtype", "float32", "--data.questions-per-step", "2", "--rollout.num-samples", "4", "--rollout.max-num-seqs", "16",
    "--rollout.kv-cache-gib", "0.1", "--rollout.max-new-tokens", "20", "--training.num-steps", "1", "--optimizer.lr", "1e-3",
    "--observability.tensorboard", "False",
]  # fmt: skip


def run_all(steps: list[tuple[str, list[str]]]) -> list[tuple[Any, list[str]]]:
    """Run `rlsc COMMAND ...` one after the other in this warm process: exit code or error, and printed
    lines."""
    import contextlib
    import io

    from rlsc_mcore.commands.table import find_command
    from rlsc_mcore.config import ConfigError

    results: list[tuple[Any, list[str]]] = []
    for name, arguments in steps:
        _leave_groups()
        if name == "move":
            os.replace(*arguments)
            results.append((0, []))
            continue
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                code: Any = find_command(name).load()(arguments)
        except ConfigError as error:
            code = str(error)
        results.append((code, printed.getvalue().splitlines()))
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[Any, list[str]]]]:
    """One process: a plain run, the same of a folder with a redundant head and a stray file, a diverging one,
    evaluations."""
    here = tmp_path_factory.mktemp("inputs")
    plain, other = copy_embedded(here / "plain"), copy_embedded(here / "other")
    tensors = load_file(plain / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        other / "model.safetensors",
        {"format": "pt"},
    )
    save_file(
        {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, other / "model_old.safetensors"
    )
    (here / "own.jinja").write_text("{{ question }}", encoding="utf-8")
    for name in ("a.jsonl", "b.jsonl"):
        (here / name).write_text(
            "".join(json.dumps(question) + "\n" for question in QUESTIONS), encoding="utf-8"
        )

    def train(run: str, model: Path, template: str, *more: str) -> tuple[str, list[str]]:
        data = ["--data.path", str(here / "a.jsonl"), "--data.template", template]
        return "train", ["--run-dir", str(here / run), "--model.path", str(model), *data, *SMALL, *more]

    evaluation = [
        "--data",
        str(here / "b.jsonl"),
        "--templates",
        "none,chat,qwen25-math",
        "--k",
        "2",
        "--temperature",
        "1.0",
    ]
    diverging = (
        "--training.num-steps",
        "3",
        "--optimizer.lr",
        "1e25",
        "--rollout.temperature",
        "1.0",
        "--optimizer.warmup-steps",
        "0",
    )
    steps = [
        train("plain_run", plain, str(here / "own.jinja")),
        train("other_run", other, str(here / "own.jinja")),
        train("diverged", plain, "none", *diverging),
        ("move", [str(here / "a.jsonl"), str(here / "moved.jsonl")]),
        ("eval", ["--model", str(here / "plain_run"), *evaluation, "--output", str(here / "scores")]),
        ("move", [str(here / "moved.jsonl"), str(here / "a.jsonl")]),
        ("move", [str(here / "b.jsonl"), str(here / "own.jinja")]),
        ("train", ["--resume", str(here / "plain_run"), "--training.num-steps", "2"]),
    ]
    return here, run_ranks(1, run_all, steps, timeout=280)[0]


def test_a_redundant_head_and_a_stray_file_train_what_the_plain_folder_trains(runs: tuple[Path, Any]) -> None:
    here, results = runs
    assert [code for code, _ in results[:2]] == [0, 0]
    assert weights(here / "plain_run" / "export") == weights(here / "other_run" / "export")
    assert any("model_old.safetensors not read" in line for line in results[1][1])
    assert not any("not read" in line for line in results[0][1])


def test_a_run_is_evaluated_without_its_training_file_and_under_longer_templates(
    runs: tuple[Path, Any],
) -> None:
    here, results = runs
    assert results[4][0] == 0
    for template in ("none", "chat", "qwen25-math"):
        answers = read_answers(here / "scores", f"b.{template}")
        assert len(answers) == len(QUESTIONS) * (1 + 2)
        assert all(
            answer.tokens == 20 for answer in answers if answer.truncated
        )  # max_new_tokens, not what is left of a context


def test_a_run_does_not_continue_under_an_edited_template(runs: tuple[Path, Any]) -> None:
    message, _ = runs[1][7]
    assert message.startswith(
        "data.template (prompts of the questions) has changed since the run was started"
    )


def test_a_diverged_run_leaves_json_and_says_so(runs: tuple[Path, Any]) -> None:
    here, results = runs
    assert results[2][0] == 0

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    run = here / "diverged"
    files = [*run.glob("*.json*"), *run.glob("*/*.json*")]
    assert len(files) >= 6
    for file in files:
        parts = (
            file.read_text(encoding="utf-8").splitlines()
            if file.suffix == ".jsonl"
            else [file.read_text(encoding="utf-8")]
        )
        for part in parts:
            json.loads(part, parse_constant=refuse)
    skipped = [
        json.loads(line)["skipped"]
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert skipped == [False, True, True]
    assert json.loads((run / "summary.json").read_text(encoding="utf-8"))["skipped_steps"] == 2
    assert any("2 of 3 steps changed nothing" in line for line in results[2][1]) and not any(
        "changed nothing" in line for line in results[0][1]
    )


def test_exported_files_are_readable_by_the_group(runs: tuple[Path, Any]) -> None:
    here, _ = runs
    modes = {
        file.name: stat.S_IMODE(file.stat().st_mode) for file in (here / "plain_run" / "export").iterdir()
    }
    assert len(set(modes.values())) == 1 and modes["model.safetensors"] & stat.S_IRGRP
    shutil.rmtree(here / "plain_run" / "export")
