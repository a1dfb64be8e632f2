"""Check the machine code of CUDA kernels: narrow loads in loops and spilled registers.

    python csrc/check_sass.py FILE.cubin ...

Fails if a loop of a kernel loads 2 bytes at a time from shared or device memory, or if registers spill to
local memory. Both are invisible in PTX and slow a kernel down. compile_check.sh and
tests/unit/ops/test_triton_compile.py call it.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

NARROW_LOAD = re.compile(r"^LD[SG]?\b.*\.[US]16\b")
SPILL = re.compile(r"^(LDL|STL)\b")
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)(.*)")
LABEL = re.compile(r"^(\.L_x_\d+):")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")


def find_tool(name: str) -> str | None:
    """Return the path of a CUDA binary tool from PATH, CUDA_HOME, Triton or NVIDIA's wheels; None if it is
    not found."""
    if (on_path := shutil.which(name)) is not None:
        return on_path
    packages = Path(sysconfig.get_paths()["purelib"])
    folders = [
        Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"),
        packages / "triton/backends/nvidia/bin",
    ]
    folders += sorted(packages.glob("nvidia/*/bin"))
    return next((str(folder / name) for folder in folders if os.access(folder / name, os.X_OK)), None)


@dataclass
class Instruction:
    """One machine instruction."""

    predicate: str | None
    opcode: str
    operands: str

    @property
    def target(self) -> str | None:
        """The label that a branch goes to."""
        found = TARGET.search(self.operands)
        return found.group(1) if self.opcode.startswith("BRA") and found else None


@dataclass
class Kernel:
    """A kernel's instructions in address order, and the index of the instruction after each label."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def loops(self) -> list[range]:
        """Return the innermost loops: instructions from a branch's target to a branch back to it."""
        found = [
            range(self.labels[i.target], index + 1)
            for index, i in enumerate(self.instructions)
            if i.target in self.labels and self.labels[i.target] < index
        ]
        return [
            a for a in found if not any(b != a and a.start <= b.start and b.stop <= a.stop for b in found)
        ]

    def narrow_loads(self) -> list[str]:
        """Return the 2-byte loads inside loops."""
        loops = [
            range(self.labels[i.target], index + 1)
            for index, i in enumerate(self.instructions)
            if i.target in self.labels and self.labels[i.target] < index
        ]
        inside = {index for loop in loops for index in loop}
        return [
            self.instructions[index].opcode
            for index in sorted(inside)
            if NARROW_LOAD.match(self.instructions[index].opcode)
        ]

    def spills(self) -> list[str]:
        """Return the instructions that move registers to local memory and back."""
        return [i.opcode for i in self.instructions if SPILL.match(i.opcode)]

    def common_path(self, loop: range) -> int:
        """Count a loop's instructions, without the longest section that a predicated branch in the loop
        skips."""
        skipped = 0
        for index in loop:
            instruction = self.instructions[index]
            end = self.labels.get(instruction.target or "", 0)
            if instruction.predicate is not None and index < end <= loop.stop:
                skipped = max(skipped, end - index - 1)
        return len(loop) - skipped


def read_kernels(cubin: str | os.PathLike[str]) -> list[Kernel]:
    """Disassemble a cubin with nvdisasm; RuntimeError if nvdisasm is missing or fails."""
    tool = find_tool("nvdisasm")
    if tool is None:
        raise RuntimeError(
            "nvdisasm: expected on PATH, in CUDA_HOME/bin or with Triton; install triton or "
            "nvidia-cuda-nvdisasm"
        )
    run = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"nvdisasm: exit status {run.returncode}: {run.stderr.strip()[:300]}")
    kernels: list[Kernel] = []
    for line in run.stdout.splitlines():
        stripped = line.strip()
        if stripped.startswith(".text.") and stripped.endswith(":"):
            kernels.append(Kernel(stripped[len(".text.") : -1]))
        elif kernels and (label := LABEL.match(stripped)):
            kernels[-1].labels[label.group(1)] = len(kernels[-1].instructions)
        elif kernels and (instruction := INSTRUCTION.match(stripped)):
            kernels[-1].instructions.append(Instruction(*instruction.groups()[1:]))
    return [kernel for kernel in kernels if kernel.instructions]


def main(cubins: list[str]) -> int:
    """Check every kernel of the files; print one line per fault and a count. Return the number of faults, or
    1 if there is no kernel."""
    faults = checked = 0
    for cubin in cubins:
        for kernel in read_kernels(cubin):
            checked += 1
            if narrow := kernel.narrow_loads():
                print(
                    f"{cubin}: {kernel.name}: {len(narrow)} loads of 2 bytes in a loop ({narrow[0]}); "
                    "expected 16-byte loads"
                )
            if spills := kernel.spills():
                print(
                    f"{cubin}: {kernel.name}: {len(spills)} instructions move registers to local memory; "
                    "expected none"
                )
            faults += bool(narrow) + bool(spills)
    print(f"machine code of {checked} kernels: {faults} faults")
    return faults if checked else 1


if __name__ == "__main__":
    try:
        sys.exit(min(main(sys.argv[1:]), 1))
    except RuntimeError as error:
        sys.exit(str(error))
