"""The images: the Dockerfiles pass the linter, and all of them run the same steps on the stacks of the
table."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlsc_mcore.commands.stacks import read_stacks
from tests.install.dockerfile import read_instructions, shell_variables

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "launch" / "images"
DOCKERFILES = sorted(IMAGES.glob("*.Dockerfile"))
INSTALL = re.compile(r"bash (/opt/rlsc/launch/images/install\.sh) (\S+)")


def _sections(text: str) -> dict[str, list[str]]:
    """Split an Apptainer definition into its header ("") and its sections, without comments."""
    sections: dict[str, list[str]] = {"": []}
    name = ""
    for line in text.splitlines():
        if line.startswith("%"):
            name = line[1:].strip()
            assert name not in sections, f"%{name} twice"
            sections[name] = []
        elif line.strip() and not line.lstrip().startswith("#"):
            sections[name].append(line.strip())
    return sections


DEFINITION = _sections((IMAGES / "rlsc.def").read_text(encoding="utf-8"))


def _of(file: Path, instruction: str) -> list[str]:
    return [argument for name, argument in read_instructions(file) if name == instruction]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_a_dockerfile_passes_the_linter(file: Path) -> None:
    beside_python = Path(sys.prefix, "bin", "hadolint")
    hadolint = str(beside_python) if beside_python.exists() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (bash launch/install.sh --with test)")
    command = [hadolint, "--no-color", "--failure-threshold", "style", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_an_image_installs_a_default_stack_and_finds_its_commands(file: Path) -> None:
    instructions = [name for name, _ in read_instructions(file)]
    assert instructions[0] == "FROM" and instructions[-1] == "CMD"
    assert instructions.index("COPY") < instructions.index("RUN")
    (command,) = _of(file, "RUN")
    installed = INSTALL.fullmatch(command)
    assert installed and installed[2] == file.name.removesuffix(".Dockerfile")
    assert installed[2] in {stack.name for stack in read_stacks()}
    assert _of(file, "COPY") == [". /opt/rlsc"]
    assert (ROOT / installed[1].removeprefix("/opt/rlsc/")).is_file()
    assert _of(file, "ENV") == ["PATH=/opt/rlsc/.venv/bin:$PATH"]
    assert not re.search(r":latest$|^[^:]+$", _of(file, "FROM")[0]), "the base has no version"


def test_the_apptainer_image_is_the_gpu_image() -> None:
    gpu = IMAGES / "gpu.Dockerfile"
    assert DEFINITION[""] == ["Bootstrap: docker", "From: {{ base }}"]
    arguments = dict(line.split("=", 1) for line in DEFINITION["arguments"])
    assert [arguments["base"]] == _of(gpu, "FROM")
    (command,) = DEFINITION["post"]
    assert [command.replace("{{ stack }}", arguments["stack"])] == _of(gpu, "RUN")
    assert DEFINITION["environment"] == [f"export {setting}" for setting in _of(gpu, "ENV")]
    used = set(re.findall(r"{{ (\w+) }}", (IMAGES / "rlsc.def").read_text(encoding="utf-8")))
    assert used == set(arguments), "template variables without a value, or values that nothing uses"


def test_the_apptainer_image_has_the_committed_files(tmp_path: Path) -> None:
    """Apptainer runs %setup on the host, with the root of the image in APPTAINER_ROOTFS."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    script = "set -e\n" + "\n".join(DEFINITION["setup"])
    subprocess.run(
        ["sh", "-c", script],
        cwd=ROOT, env={"PATH": "/usr/bin:/bin", "APPTAINER_ROOTFS": str(tmp_path)}, check=True, timeout=60,
    )  # fmt: skip
    copied = tmp_path / "opt" / "rlsc"
    assert (copied / "launch" / "install.sh").is_file() and not (copied / ".git").exists()


def test_the_build_context_leaves_out_what_git_ignores() -> None:
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    left_out = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert set(left_out) >= {f"**/{name.rstrip('/')}" for name in ignored} | {".git"}


def test_the_cpu_image_is_read_as_shell_steps() -> None:
    """tests/install/bare_machine.sh runs these in an empty Debian root."""
    variables = shell_variables(read_instructions(IMAGES / "cpu.Dockerfile"))
    assert variables["distribution"] == "bookworm" and variables["destination"] == "/opt/rlsc"
    assert "bash /opt/rlsc/launch/images/install.sh cpu" in variables["build"].splitlines()
    assert "export PATH=/opt/rlsc/.venv/bin:$PATH" in variables["settings"].splitlines()


def test_instructions_that_the_steps_lack_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "Dockerfile"
    file.write_text("FROM debian:bookworm-slim\nVOLUME /data\n", encoding="utf-8")
    with pytest.raises(ValueError, match="got 'VOLUME /data'"):
        read_instructions(file)
    with pytest.raises(ValueError, match="expected debian:NAME-slim"):
        shell_variables([("FROM", "alpine:3.22")])
