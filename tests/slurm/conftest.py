"""One cluster for all tests; after each, its nodes must be as they were."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.jobs import EVALUATED, PATIENCE_S, Cluster, Job, NoClusterHere


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes with 8 GPUs each; preemption requeues, after a grace that is long in partition main and short
    in hasty."""
    yield from _started(nodes=2)


@pytest.fixture(scope="session")
def other_cluster() -> Iterator[Cluster]:
    """Two nodes without GRES, where preemption sends the job's own signal."""
    yield from _started(nodes=2, gpus=0, usersig=1)


@pytest.fixture(scope="session")
def uneven_cluster() -> Iterator[Cluster]:
    """Two nodes that differ: 16 and 8 CPUs, 8 and 4 GPUs, which are slices (MIG) by their type."""
    yield from _started(nodes=2, cpus="16,8", gpus="8,4", gpu_type="a100_1g.5gb")


def _started(**settings: int | str) -> Iterator[Cluster]:
    folder = Path(
        tempfile.mkdtemp(prefix="rlsc_cluster_")
    )  # munge wants every parent open to all, pytest's folders are not
    cluster = Cluster(folder, **settings)
    try:
        cluster.start()
        yield cluster
    except NoClusterHere as reason:
        pytest.skip(str(reason))
    finally:
        cluster.script("stop")
        shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    for name in {"cluster", "other_cluster", "uneven_cluster"} & set(request.fixturenames):
        cluster = request.getfixturevalue(name)
        cluster.call("bash", "-c", "scancel $(squeue -h -o %A) 2>/dev/null")
        end = time.monotonic() + PATIENCE_S
        while (left := cluster.left_behind()) and time.monotonic() < end:
            time.sleep(0.5)
        assert not left, f"left on the nodes: {left}"


@pytest.fixture(scope="session")
def uninterrupted(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run of four steps on two nodes, a rank each (tp 2), evaluated before and after, that nothing
    disturbed.

    pytest's workers share it: the first that wants it runs it on its own cluster. Only its files may be
    looked at.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    job = Job(cluster, "1", base / "plain")
    with (base / "plain.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = base / "plain.done"
        if not done.exists():
            shutil.rmtree(job.folder, ignore_errors=True)  # another worker's that failed
            cluster.submit(job.folder, arguments=EVALUATED).ends("COMPLETED", "0:0")
            done.touch()
    return job
