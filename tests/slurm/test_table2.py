"""The paper's experiment on a real SLURM: one command submits the chain, and dependencies alone bring it to
its table."""

import sys
import time
from pathlib import Path

import pytest

from tests.slurm.jobs import ROOT, Cluster

SMALL = [
    *(
        "--arms",
        "rlsc",
        "--seeds",
        "0",
        "--steps",
        "1",
        "--evaluation.max-questions",
        "8",
        "--data.questions-per-step",
        "4",
    ),
]
PATIENCE_S = 2400.0


@pytest.mark.slow
@pytest.mark.timeout(2700)
def test_dependencies_bring_the_chain_to_its_table(cluster: Cluster, tmp_path: Path) -> None:
    script, output = ROOT / "launch" / "reproduce_table2.sh", tmp_path / "out"
    settings = {
        "PYTHON": sys.executable,
        "NPROC_PER_NODE": "1",
        "OMP_NUM_THREADS": "1",
        "RLSC_CHECK_IMPORTS": "0",
    }
    done = cluster.call(
        "bash", str(script), "--sizes", "tiny", "--output", str(output), *SMALL, cwd=tmp_path, **settings
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": job ") == 4 + 1 + 3 + 1 and "table: job" in done.stdout.splitlines()[-1]
    table = output / "table2.md"

    def is_over() -> bool:
        return table.is_file() or not cluster.call("squeue", "--noheader", "--format=%i %T %r").stdout.strip()

    cluster_job_names = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert cluster_job_names[0] == "tiny.base.one_answer"
    deadline = time.monotonic() + PATIENCE_S
    while not is_over() and time.monotonic() < deadline:
        time.sleep(2)
    logs = "\n".join(
        file.read_text(encoding="utf-8", errors="replace")[-800:] for file in sorted(tmp_path.glob("*.out"))
    )
    assert table.is_file(), cluster.call("squeue").stdout + logs
    assert "rlsc, 1 steps" in table.read_text(encoding="utf-8")
