"""Submit, watch and signal jobs of the local cluster, with SLURM's own commands."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "rlsc_7b.sh"
TINY = Path(__file__).with_name("tiny.yaml")
FAULTS = Path(__file__).with_name("faults")
STUBS = Path(__file__).with_name("stubs")  # see stubs/trainer.py
# A job takes seconds on quiet cores; on busy ones nothing but this limit may depend on the clock.
PATIENCE_S = float(os.environ.get("RLSC_SLURM_PATIENCE_S", "900"))
EVALUATED = (
    "--evaluation.path",
    "embedded:test",
    "--evaluation.num-samples",
    "2",
    "--evaluation.max-questions",
    "8",
)
TIMES = ("seconds", "rollout_tokens_per_s", "train_tokens_per_s", "memory_bytes", "memory")
CANNOT = 3  # cluster.sh: this machine has no SLURM and cannot get it


class NoClusterHere(Exception):
    """This machine cannot have a local cluster; the message says why."""


class Cluster:
    """A running local cluster (see cluster.sh)."""

    def __init__(self, folder: Path, **settings: int | str) -> None:
        self.folder = folder
        self._environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("SLURM_", "SBATCH_"))
            },
            "CLUSTER_DIR": str(folder),
            **{f"CLUSTER_{name.upper()}": str(value) for name, value in settings.items()},
        }

    def start(self) -> None:
        """Bring it up; raises with the reason when it cannot be."""
        self.script("start")
        self._environment["SLURM_CONF"] = str(self.folder / "slurm.conf")

    def script(self, *arguments: str) -> str:
        """Run cluster.sh; returns what it prints."""
        command = ["bash", str(Path(__file__).with_name("cluster.sh")), *arguments]
        done = subprocess.run(
            command, env=self._environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        if done.returncode == CANNOT:
            raise NoClusterHere(done.stderr.strip())
        if done.returncode:
            raise RuntimeError(f"cluster.sh {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def call(
        self, *command: str, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command with the cluster's environment, as on its login node."""
        env = {**self._environment, **environment}
        return subprocess.run(
            command, env=env, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )

    def submit(
        self,
        folder: Path,
        *,
        options: Sequence[str] = ("-N2",),
        arguments: Sequence[str] = (),
        faults: Sequence[Mapping[str, Any]] = (),
        script: Path = SCRIPT,
        trainer: Sequence[str] | None = None,
        **environment: str,
    ) -> "Job":
        """Submit the launch script from `folder` with the tiny model, one rank per node; returns the job.

        With `trainer`, one action per attempt, the ranks run stubs/trainer.py instead of the trainer.
        """
        variables = {
            "PYTHON": sys.executable,
            "RLSC_CONFIG": str(TINY),
            "NPROC_PER_NODE": "1",
            "OMP_NUM_THREADS": "1",
            "RLSC_CHECK_IMPORTS": "0",  # the ranks import the same a moment later
            "RLSC_DEAD_AFTER_S": "600",  # a rank of a busy machine is not dead
            "RLSC_TEST_FAULTS": json.dumps(list(faults)),
            **({"PYTHONPATH": str(FAULTS)} if faults else {}),
            **(
                {
                    "PYTHON": str(STUBS / "python"),
                    "STUB_PYTHON": sys.executable,
                    "STUB_TRAINER": " ".join(trainer),
                }
                if trainer
                else {}
            ),
            **environment,
        }
        folder.mkdir(parents=True, exist_ok=True)
        done = self.call(
            "sbatch",
            "--parsable",
            f"--job-name={folder.name}",
            *options,
            str(script),
            *arguments,
            cwd=folder,
            **variables,
        )
        assert done.returncode == 0, done.stderr
        return Job(self, done.stdout.strip(), folder)

    def left_behind(self) -> dict[str, Any]:
        """List what jobs left on the nodes: processes, shared memory, listening rendezvous ports, allocated
        CPUs and GPUs."""
        segments = [path.name for path in (self.folder / "shm").iterdir() if path.name.startswith("rlsc-")]
        listening = []
        for node in (1, 2):
            table = self.script("in", str(node), "cat", "/proc/net/tcp", "/proc/net/tcp6").splitlines()
            fields = [line.split() for line in table if ":" in line]
            ports = [
                int(entry[1].rsplit(":", 1)[1], 16) for entry in fields if len(entry) > 3 and entry[3] == "0A"
            ]
            listening += [f"n{node}:{port}" for port in ports if 15000 <= port < 30000]
        allocated = re.findall(
            r"NodeName=(\S+).*?AllocTRES=(\S+)", self.call("scontrol", "show", "node", "-o").stdout
        )
        found = {
            "processes": self.script("processes").split(),
            "shared memory": segments,
            "ports": listening,
            "allocated": allocated,
        }
        return {name: values for name, values in found.items() if values}


@dataclass(frozen=True)
class Job:
    """A submitted job; its run folder is runs/NAME where it was submitted."""

    cluster: Cluster
    id: str
    folder: Path

    @property
    def run_dir(self) -> Path:
        _, _, task = self.id.partition("_")
        return self.folder / "runs" / (f"{self.folder.name}_{task}" if task else self.folder.name)

    def task(self, number: int) -> "Job":
        """Return a task of this array."""
        return Job(self.cluster, f"{self.id}_{number}", self.folder)

    def facts(self) -> dict[str, str]:
        """Return SLURM's record of the job."""
        done = self.cluster.call("scontrol", "show", "job", "-o", self.id)
        return dict(re.findall(r"(\w+)=(\S*)", done.stdout))

    def status(self) -> dict[str, Any]:
        """Return the run's status.json."""
        try:
            return json.loads((self.run_dir / "status.json").read_text())
        except FileNotFoundError:
            return {}

    def output(self) -> str:
        """Return the job's output file."""
        # An array's task has an id of its own, which its output file bears.
        files = [*self.folder.glob(f"*-{self.facts().get('JobId', self.id)}.out")]
        return files[0].read_text() if files else ""

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = PATIENCE_S) -> None:
        """Poll until `condition` holds; fails with the job's record and output."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise AssertionError(
                    f"job {self.id}: not {what} in {seconds:g} s\n{self.facts()}\n{self.status()}\n{self.output()[-3000:]}"
                )
            time.sleep(0.2)

    def reaches(self, phase: str, *, step: int | None = None, attempt: int = 0) -> None:
        """Wait until the run is in a phase."""

        def there() -> bool:
            status = self.status()
            at_step = step is None or status.get("steps_done") == step
            return (
                status.get("state") == "running"
                and status["phase"] == phase
                and status["attempt"] == attempt
                and at_step
            )

        self.wait(there, f"in phase {phase} of attempt {attempt}")

    def attempt(self, number: int) -> None:
        """Wait until attempt `number` runs: the job went back into the queue and came out."""
        self.wait(
            lambda: self.facts().get("Restarts") == str(number) and self.facts()["JobState"] == "RUNNING",
            f"in attempt {number}",
        )

    def signal(self, name: str) -> None:
        """Send a signal to the batch shell, as SLURM does before the time limit."""
        assert self.cluster.call("scancel", f"--signal={name}", "--batch", self.id).returncode == 0

    def ends(self, state: str, code: str | None, *, restarts: int | None = 0) -> str:
        """Wait for the end and compare (None: any code; any number of restarts, but at least one); returns
        the output."""
        final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        self.wait(lambda: self.facts().get("JobState") in final, "at its end")
        facts, output = self.facts(), self.output()
        assert facts["JobState"] == state and code in (None, facts["ExitCode"]), f"{facts}\n{output[-4000:]}"
        assert int(facts["Restarts"]) >= 1 if restarts is None else int(facts["Restarts"]) == restarts, (
            f"{facts}\n{output[-4000:]}"
        )
        return output

    def logs(self, name: str, attempt: str = "latest") -> str:
        """Return a file of an attempt's logs."""
        return (self.run_dir / "logs" / attempt / name).read_text()

    def cancel(self) -> None:
        """scancel."""
        self.cluster.call("scancel", self.id)


def result(run_dir: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """Return what two equal runs have in common: the exported weights, and the metrics but for times."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return (run_dir / "export" / "model.safetensors").read_bytes(), [
        {k: v for k, v in row.items() if k not in TIMES} for row in rows
    ]
