"""Weights & Biases: refused with a reason where it is absent; where it is installed, a real offline run holds
the numbers."""

import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlsc_mcore.config import ConfigError
from rlsc_mcore.observability.wandb_log import ID_FILE, check_wandb, open_wandb

ROWS: list[dict[str, Any]] = [
    {"step": step, "loss": 0.5 - step, "seconds": {"train": 1.5}, "warnings": ["x"], "skipped": False}
    for step in range(3)
]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_absence_is_named_only_where_it_is_asked_for() -> None:
    check_wandb(None)
    with pytest.raises(ConfigError, match=r"^observability\.wandb_project: .*pip install wandb") as error:
        check_wandb("mine")
    assert "\n" not in str(error.value)


def test_no_project_is_no_run(tmp_path: Path) -> None:
    assert open_wandb(None, tmp_path, {}) is None and not list(tmp_path.iterdir())


WRITE = """
import json, pathlib, sys
from rlsc_mcore.observability.metrics import MetricsWriter
from rlsc_mcore.observability.wandb_log import open_wandb
folder, rows = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
run = open_wandb("rlsc-test", folder, {"optimizer": {"lr": 0.25}})
writer = MetricsWriter(folder, first_step=rows[0]["step"], enabled=True, tensorboard=False, trackers=[run])
for row in rows:
    writer.write(row)
writer.close()
"""


def test_an_offline_run_holds_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    for rows in (ROWS[:2], ROWS[2:]):  # begun, and resumed by another process
        command = [sys.executable, "-c", WRITE, str(tmp_path), json.dumps(rows)]
        subprocess.run(
            command, check=True, env=os.environ | {"WANDB_MODE": "offline"}, capture_output=True, timeout=120
        )
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(
        folder.name.endswith((tmp_path / ID_FILE).read_text(encoding="utf-8")) for folder in folders
    )
    logged = [values for folder in folders for values in history(next(folder.glob("*.wandb")))]
    assert [(values["_step"], values["loss"], values["seconds/train"]) for values in logged] == [
        (0, 0.5, 1.5),
        (1, -0.5, 1.5),
        (2, -1.5, 1.5),
    ]
    assert all("skipped" not in values and "warnings" not in values for values in logged)


def test_a_start_that_fails_says_what_to_do(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    program = "import pathlib, sys; from rlsc_mcore.observability import wandb_log; wandb_log.open_wandb('p', pathlib.Path(sys.argv[1]), {})"
    environment = os.environ | {
        "WANDB_MODE": "online",
        "WANDB_API_KEY": "short",
        "WANDB_BASE_URL": "http://127.0.0.1:9",
    }
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert re.search(
        r"ConfigError: observability\.wandb_project: cannot start: \S.*WANDB_MODE=offline", ended.stderr
    ), ended.stderr


def history(file: Path) -> list[dict[str, Any]]:
    """Read the logged values of a run's own file."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for data in log_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            found.append(
                {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                    for item in record.history.item
                }
            )
    return found


def log_records(data: bytes) -> Iterator[bytes]:
    """Split a file of LevelDB's log format (7 bytes of the file's own first): blocks of 32 KiB, pieces with
    checksum, size and type."""
    place, parts = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # too little is left of a block for another piece
            place += 32768 - place % 32768
            continue
        size, kind = struct.unpack_from("<HB", data, place + 4)
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield parts
            parts = b""
