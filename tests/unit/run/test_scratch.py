"""Temporary folders go with their process, or at the next start after a kill."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rlsc_mcore.run.scratch import MARKER, PREFIX, is_private, private_cache, scratch_folder

MAKE = "from rlsc_mcore.run.scratch import make_scratch; import os, signal; print(make_scratch('test'), flush=True); os.kill(os.getpid(), {})"


def test_a_scratch_folder_is_private_and_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scratch_folder("test") as folder:
        assert folder.stat().st_mode & 0o777 == 0o700 and folder.parent == tmp_path
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_goes_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", MAKE.format(9)], capture_output=True, text=True, check=False)
    left = Path(done.stdout.strip())
    assert done.returncode == -9 and left.is_dir()
    foreign = [tmp_path / "tmpabc", tmp_path / f"{PREFIX}foreign"]
    for folder in foreign:
        folder.mkdir()
    with scratch_folder("test") as mine:
        assert sorted(tmp_path.iterdir()) == sorted([*foreign, mine])
        assert (mine / MARKER).is_file()


@pytest.mark.parametrize("how", ["new", "open to others", "a link", "a file", "no home"])
def test_a_cache_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Another user who made the folder first could have his library loaded."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    expected = tmp_path / "cache" / "rlsc" / "inductor"
    expected.parent.mkdir(parents=True)
    if how == "open to others":
        expected.mkdir()
        expected.chmod(0o777)
    if how == "a link":
        (tmp_path / "elsewhere").mkdir()
        expected.symlink_to(tmp_path / "elsewhere")
    if how == "a file":
        expected.touch()
    if how == "no home":
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing")
    folder = private_cache("inductor")
    assert is_private(folder) and (folder == expected) == (how == "new")
