"""`rlsc eval` hears a stop signal, keeps the evaluations that are finished and leaves nothing else."""

import json
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

from tests.e2e.runs import EMBEDDED
from tests.helpers.ranks import run_ranks

FLAGS = [
    "--model.dtype",
    "float32",
    "--rollout.max-new-tokens",
    "24",
    "--rollout.max-num-seqs",
    "32",
    "--evaluation.max-questions",
    "4",
]


def evaluate_and_stop_in_the_second(output: str, scratch: str) -> tuple[int, str]:
    """Evaluate under two templates; SIGTERM arrives when the second evaluation begins: the exit code, and the
    message."""
    os.environ.pop("RANK", None)
    tempfile.tempdir = scratch
    from rlsc_mcore.commands import eval as command
    from rlsc_mcore.training.signals import Interrupted

    evaluate, calls = command.evaluate, []

    def signalled(*arguments: Any, **options: Any) -> Any:
        calls.append(options["label"])
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments, **options)

    command.evaluate = signalled
    templates = ["--benchmarks", "embedded:test", "--templates", "chat,none", "--k", "2"]
    try:
        command.run_eval(["--model", EMBEDDED, *templates, "--output", output, *FLAGS])
    except Interrupted as ending:
        return ending.code, str(ending)
    return 0, ""


def test_what_is_finished_is_kept(tmp_path: Path) -> None:
    output, scratch = tmp_path / "output", tmp_path / "scratch"
    scratch.mkdir()
    ((code, text),) = run_ranks(1, evaluate_and_stop_in_the_second, str(output), str(scratch))
    assert (code, text) == (
        128 + signal.SIGTERM,
        f"stopped by SIGTERM after 1 of 2 evaluations; the finished ones are in {output}",
    )
    assert sorted(path.name for path in output.iterdir()) == [
        f"embedded_test.chat.{kind}" for kind in ("answers.jsonl", "json", "questions.jsonl")
    ]
    assert "greedy" in json.loads((output / "embedded_test.chat.json").read_text(encoding="utf-8"))
    assert not list(scratch.iterdir())
