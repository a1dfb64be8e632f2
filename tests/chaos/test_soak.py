"""A long run, stopped and resumed every 25 steps under a limit of memory: no attempt needs more than the
first ones."""

import json
import resource
import signal
import statistics
import time
from pathlib import Path

import pytest

from rlsc_mcore.training.announce import versions
from tests.chaos.runs import LAYOUTS, PATIENCE_S, is_done, start, status

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(0)]
STEPS_BETWEEN_STOPS = 25
GROWTH = 1.02  # allowed from the first third of the attempts to the last
LIMIT = 1.25  # of the address space that the first attempt had


def _rows(run_dir: Path) -> list[dict[str, object]]:
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _peak_bytes(pid: int, field: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def test_memory_does_not_grow_over_stops_and_resumes(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Resident memory is read at the same step of each attempt, just before the stop."""
    steps, run_dir, log = request.config.getoption("--soak-steps"), tmp_path / "run", tmp_path / "log"
    arguments = (
        "--training.num-steps",
        str(steps),
        "--training.save-every",
        "5",
        "--observability.save-rollouts",
        "False",
    )
    resident: list[int] = []
    limits = resource.getrlimit(resource.RLIMIT_AS)
    for stop_at in range(STEPS_BETWEEN_STOPS, steps + 1, STEPS_BETWEEN_STOPS):
        attempt = start(LAYOUTS[0], run_dir, log, arguments=arguments)
        end, peak, address_space = time.monotonic() + PATIENCE_S, 0, 0
        while attempt.process.poll() is None and len(_rows(run_dir)) < stop_at:
            assert time.monotonic() < end, f"{status(run_dir)}\n{log.read_text()[-3000:]}"
            peak, address_space = (
                _peak_bytes(attempt.process.pid, "VmRSS"),
                _peak_bytes(attempt.process.pid, "VmPeak"),
            )
            time.sleep(0.05)
        if stop_at < steps:
            attempt.process.send_signal(signal.SIGUSR1)
        assert attempt.wait() == 0, log.read_text()[-3000:]
        resident.append(peak)
        if len(resident) == 1:  # the attempts that follow inherit it
            resource.setrlimit(resource.RLIMIT_AS, (int(LIMIT * address_space), limits[1]))
    resource.setrlimit(resource.RLIMIT_AS, limits)
    assert is_done(run_dir) and [row["step"] for row in _rows(run_dir)] == list(range(steps))
    third = max(1, len(resident) // 3)
    first, last = statistics.median(resident[:third]), statistics.median(resident[-third:])
    print("resident MiB before each stop:", *(f"{size / 2**20:.0f}" for size in resident))
    output = request.config.getoption("--soak-output")
    if output:
        result = {
            "command": f"pytest -m chaos tests/chaos/test_soak.py --soak-steps {steps}",
            "versions": versions(),
            "steps": steps,
            "steps_between_stops": STEPS_BETWEEN_STOPS,
            "resident_mib": [round(size / 2**20, 1) for size in resident],
            "growth": round(last / first, 4),
            "allowed_growth": GROWTH,
        }
        Path(output).write_text(json.dumps(result, indent=1) + "\n")
    assert last <= GROWTH * first, f"{[size // 2**20 for size in resident]} MiB"
