"""`rlsc export --push`: refused in one line without a token; what a hub receives is what the folder holds.

huggingface_hub reads its settings when it is imported, so each command is a process of its own.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlsc_mcore.run.made_here import MARKER, replacing
from tests.helpers.folders import copy_embedded
from tests.helpers.hub import TOKEN, Hub, running_hub

NETWORK = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
PUSH = """
import sys
from pathlib import Path
from rlsc_mcore.commands.push import check_push, make_repository, push
check_push(sys.argv[2])
make_repository(sys.argv[2])
print(push(Path(sys.argv[1]), sys.argv[2], "mine, step_000002"))
"""


def _run(
    home: Path, *arguments: object, token: str = TOKEN, **settings: str
) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(NETWORK)}
    environment = inherited | {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token, **settings}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    with replacing(folder, "rlsc export") as partial:
        for path in copy_embedded(tmp_path / "source").iterdir():
            path.rename(partial / path.name)
    (folder / "notes.txt").write_text("of the user", encoding="utf-8")
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """What a run leaves, as far as it is looked at before its weights are read."""
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step_000002").mkdir(parents=True)
    (folder / "checkpoints" / "latest").write_text("step_000002\n", encoding="utf-8")
    (folder / "config.yaml").write_text("model:\n  path: embedded:tiny_qwen2\n", encoding="utf-8")
    return folder


def test_the_hub_receives_what_the_program_wrote(hub: Hub, model: Path, tmp_path: Path) -> None:
    done = _run(tmp_path, "-c", PUSH, model, "acme/model", HF_ENDPOINT=hub.address)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"{hub.address}/acme/model/commit/1\n")
    assert (hub.created[-1]["organization"], hub.created[-1]["name"]) == ("acme", "model")
    assert hub.created[-1].get("private") is True or hub.created[-1].get("visibility") == "private"
    assert hub.messages == ["mine, step_000002"]
    written = {
        path.name: path.read_bytes() for path in model.iterdir() if path.name not in (MARKER, "notes.txt")
    }
    assert "model.safetensors" in written and hub.files == written


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("acme/model", {"token": ""}, "--push acme/model: no token of the Hugging Face hub; set HF_TOKEN"),
        ("acme/model", {"HF_HUB_OFFLINE": "1"}, "--push acme/model: HF_HUB_OFFLINE is set"),
        ("model", {}, "--push: expected OWNER/NAME of a hub repository, got 'model'"),
        ("acme/..", {}, "--push: expected OWNER/NAME of a hub repository, got 'acme/..'"),
        ("a/b/c", {}, "--push: expected OWNER/NAME of a hub repository, got 'a/b/c'"),
        ("acme/model", {"token": "hf_wrong"}, "--push acme/model: "),
        ("acme/model", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "--push acme/model: "),
    ],
    ids=["no token", "offline", "no owner", "dots", "a path", "a wrong token", "no network"],
)
def test_bad_input_is_one_line_and_nothing_is_exported(
    hub: Hub, run_dir: Path, tmp_path: Path, name: str, settings: dict[str, str], said: str
) -> None:
    before = len(hub.created)
    command = ("-m", "rlsc_mcore.cli", "export", run_dir, "--push", name)
    done = _run(tmp_path / "home", *command, **{"HF_ENDPOINT": hub.address, **settings})
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"rlsc export: {said}"), line
    assert not (run_dir / "export").exists() and len(hub.created) == before


def test_a_run_that_is_not_there_makes_no_repository(hub: Hub, tmp_path: Path) -> None:
    before = len(hub.created)
    command = ("-m", "rlsc_mcore.cli", "export", tmp_path / "absent", "--push", "acme/model")
    done = _run(tmp_path, *command, HF_ENDPOINT=hub.address)
    assert done.returncode == 2 and "no run there" in done.stderr
    assert len(hub.created) == before


def test_a_failed_upload_keeps_the_folder_and_says_how_to_go_on(model: Path, tmp_path: Path) -> None:
    with running_hub() as failing:
        failing.fail_commits = True
        done = _run(tmp_path, "-c", PUSH, model, "acme/model", HF_ENDPOINT=failing.address)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "RunError: --push acme/model: " in last and "the disk is full" in last
    assert last.endswith(f"{model} is written, upload it later: hf upload acme/model {model}")
