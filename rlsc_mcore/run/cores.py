"""Count the cores that a process may use: its affinity, the quota of its control group and its neighbours."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

DEFAULT_THREADS = "RLSC_DEFAULT_THREADS"
"""In the environment if OMP_NUM_THREADS there is this program's default, not the user's choice."""

_GROUPS = Path("/sys/fs/cgroup")


def threads_are_set() -> bool:
    """Return whether the user set OMP_NUM_THREADS."""
    return "OMP_NUM_THREADS" in os.environ and DEFAULT_THREADS not in os.environ


def available_cores(*, membership: Path = Path("/proc/self/cgroup"), groups: Path = _GROUPS) -> int:
    """Return the cores that this process may use at the same time, at least 1.

    That is the number of cores of its affinity, or the CPU quota of its control group or of one above it if
    that is smaller (`cpu.max` of version 2, `cpu.cfs_quota_us` of version 1), rounded down.
    """
    quotas = [quota for folder in _folders(membership, groups) if (quota := _quota(folder)) is not None]
    return max(1, min([len(os.sched_getaffinity(0)), *(int(quota) for quota in quotas)]))


def count_sharing(mine: tuple[str, Sequence[int]], all_ranks: Iterable[tuple[str, Sequence[int]]]) -> int:
    """Return how many ranks use a core of `mine`; each entry is a host and the cores of a rank's affinity."""
    host, cores = mine
    return sum(other == host and not set(cores).isdisjoint(theirs) for other, theirs in all_ranks)


def _folders(membership: Path, groups: Path) -> list[Path]:
    """Return the control groups of the process and those above them, of either version."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = groups / controllers if controllers else groups
        here = top / path.lstrip("/")
        folders += [folder for folder in (here, *here.parents) if folder == top or folder.is_relative_to(top)]
    return folders


def _quota(folder: Path) -> float | None:
    """Return the cores that the quota of a control group allows; None without a quota."""
    try:
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        try:
            quota = (folder / "cpu.cfs_quota_us").read_text(encoding="utf-8").strip()
            period = (folder / "cpu.cfs_period_us").read_text(encoding="utf-8").strip()
        except OSError:
            return None
    try:
        cores = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):
        return None  # "max"
    return cores if cores > 0 else None
