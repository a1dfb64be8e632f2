"""What is printed from files is harmless, keeps no secret, and never ends a run."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlsc_mcore.run.machine_errors import explain
from rlsc_mcore.run.printable import HIDDEN, printable, without_secrets
from rlsc_mcore.run.terminal import _Surviving


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
        ("\x1b[2J\x9b31m", r"\x1b[2J\x9b31m"),
        ("a\nb\r\nc", "a b c"),
        ("\u202eevil\u2066", r"\u202eevil\u2066"),
        ("\ud800", r"\ud800"),
        ("x\x7f\x00", r"x\x7f\x00"),
        ("größer 中文 ∑ e\u0301 👩\u200d👩", "größer 中文 ∑ e\u0301 👩\u200d👩"),
    ],
)
def test_control_characters_become_escapes(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "SLURM_JWT=secret123", "VLLM_API_KEY: secret123", '"wandb_api_key": "secret123"', "--hub-token=secret123", "password = secret123",
        "https://user:secret123@host/simple", "HF_TOKEN=secret123", "AWS_SECRET_ACCESS_KEY=secret123",
        "fetch hf_secret123secret123secret123",
    ],
)  # fmt: skip
def test_secrets_are_hidden(text: str) -> None:
    assert "secret123" not in without_secrets(text) and HIDDEN in without_secrets(text)


@pytest.mark.parametrize(
    "text",
    [
        "rollout.max_new_tokens=3",
        "lacks the token: <|im_start|>",
        "https://host:8080/a@b",
        "key error: 'x'",
        "token 5 of 7",
    ],
)
def test_other_text_stays(text: str) -> None:
    assert without_secrets(text) == text


@pytest.mark.parametrize("number", [errno.EIO, errno.EPIPE, errno.ENOSPC])
def test_a_lost_terminal_is_survived(number: int) -> None:
    class Lost(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(number, os.strerror(number))

        def flush(self) -> None:
            self.write("")

    descriptor = os.open(os.devnull, os.O_WRONLY)
    stream = _Surviving(Lost(), descriptor)
    print("a line", file=stream, flush=True)  # type: ignore[call-overload]
    os.close(descriptor)


def test_a_reader_that_leaves_is_survived(tmp_path: Path) -> None:
    """`rlsc --help | head -1` with text that does not fit into the pipe."""
    program = "from rlsc_mcore.run.terminal import survive_a_lost_terminal as s; s(); [print('x' * 1000) for _ in range(1000)]"
    done = subprocess.run(
        f"{sys.executable} -c {program!r} | head -c 10; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "x" * 10, "")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/data/run/metrics.jsonl"),
            "/data/run/metrics.jsonl: the disk is full",
        ),
        (
            OSError(errno.EDQUOT, "Disk quota exceeded", "/data/run/x"),
            "/data/run/x: the disk quota is used up",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), "/data/x: permission denied"),
        (
            RuntimeError("[enforce fail at device.cc] epoll_create: Too many open files"),
            "too many open files: this process may have",
        ),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (OSError(errno.EROFS, "Read-only file system", "/data/x"), "/data/x: the file system is read-only"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/data/x"), "/data/x: no such file or folder"),
    ],
)
def test_the_machine_s_refusals_are_told_in_one_line(error: Exception, said: str) -> None:
    outer = ValueError("writing failed")
    outer.__cause__ = error
    for each in (error, outer):
        text = explain(each)
        assert text is not None and text.startswith(said) and "\n" not in text


def test_other_errors_are_not_explained() -> None:
    assert explain(ValueError("no such option")) is None
    assert explain(RuntimeError("unexpected pos 704 vs 598")) is None


def test_a_write_that_torch_cannot_explain(tmp_path: Path) -> None:
    text = explain(
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), tmp_path
    )
    assert text is not None and text.startswith(
        f"{tmp_path}: a write was cut short: a quota, the largest size of a file"
    )
