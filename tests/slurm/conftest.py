"""One cluster for all tests; after each, its nodes must be as they were."""

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.jobs import EVALUATED, PATIENCE_S, Cluster, Job, NoClusterHere


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes with 8 GPUs each; preemption requeues, after a grace that is long in partition main and short in hasty."""
    yield from _started(nodes=2)


@pytest.fixture(scope="session")
def other_cluster() -> Iterator[Cluster]:
    """Two nodes without GRES, where preemption sends the job's own signal."""
    yield from _started(nodes=2, gpus=0, usersig=1)


def _started(**settings: int) -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="rlsc_cluster_"))  # munge wants every parent open to all, pytest's folders are not
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
    for name in {"cluster", "other_cluster"} & set(request.fixturenames):
        cluster = request.getfixturevalue(name)
        cluster.call("bash", "-c", "scancel $(squeue -h -o %A) 2>/dev/null")
        end = time.monotonic() + PATIENCE_S
        while (left := cluster.left_behind()) and time.monotonic() < end:
            time.sleep(0.5)
        assert not left, f"left on the nodes: {left}"


@pytest.fixture(scope="session")
def uninterrupted(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run of four steps on two nodes, a rank each (tp 2), evaluated before and after, that nothing disturbed."""
    job = cluster.submit(tmp_path_factory.mktemp("uninterrupted") / "plain", arguments=EVALUATED)
    job.ends("COMPLETED", "0:0")
    return job
