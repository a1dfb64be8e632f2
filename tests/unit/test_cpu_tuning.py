"""Threads, cores and measured products of a run on a CPU."""

from pathlib import Path

import pytest
import torch

from rlsc_mcore.run import cores
from rlsc_mcore.training import cpu_tuning
from rlsc_mcore.training.cpu_tuning import CpuChoice, CpuProducts, fastest, read_choice, threads_for


@pytest.mark.parametrize(
    ("largest", "available", "expected"),
    [(512 * 128, 64, 1), (3072 * 576, 1, 1), (3072 * 576, 2, 2), (3072 * 576, 64, 8), (9728 * 896, 16, 16)],
)
def test_threads_follow_from_the_model_and_the_cores(largest: int, available: int, expected: int) -> None:
    assert threads_for(largest, available) == expected


def test_only_a_clear_difference_replaces_the_default() -> None:
    assert fastest({"blas": 1.0, "onednn": 0.9}, "blas", 1.2) == "blas"
    assert fastest({"blas": 1.0, "onednn": 0.9}, "onednn", 1.2) == "onednn"
    assert fastest({"blas": 0.9, "onednn": 1.0}, "onednn", 1.2) == "onednn"
    assert fastest({"blas": 1.0, "onednn": 0.8}, "blas", 1.2) == "onednn"
    assert fastest({"blas": 1.0, "onednn": 0.8}, "blas", 1.5) == "blas"
    assert fastest({"blas": 1.0, "onednn": 0.5, "packed": 0.4}, "blas", 1.5) == "packed"
    assert fastest({"blas": 1.0, "onednn": 2.0}, "onednn", 1.2) == "blas"


def test_measured_products_are_positive_and_all_there() -> None:
    shapes = [(24, 16), (16, 8)]
    assert set(cpu_tuning.measure_training(shapes)) == {"blas", "onednn"}
    times = cpu_tuning.measure_decoding(shapes, 3, packed=True)
    assert set(times) == {"blas", "onednn", "packed"} and min(times.values()) > 0


def test_the_measurement_finds_the_faster_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement must time what it names."""
    real = cpu_tuning.onednn_linear

    def slow(*args: torch.Tensor) -> torch.Tensor:
        for _ in range(50):
            real(*args)
        return real(*args)

    monkeypatch.setattr(cpu_tuning, "onednn_linear", slow)
    for times in (
        cpu_tuning.measure_training([(64, 64)]),
        cpu_tuning.measure_decoding([(64, 64)], 16, packed=False),
    ):
        assert times["onednn"] > 5 * times["blas"]


def test_the_kept_choice_is_read_back(tmp_path: Path) -> None:
    from dataclasses import asdict

    from rlsc_mcore.run.files import to_json

    choice = CpuChoice(3, CpuProducts("onednn", "packed"), "some processor", {"blas": 1.5}, {"blas": 2.5})
    file = tmp_path / "cpu.json"
    assert read_choice(file) is None
    file.write_text(to_json(asdict(choice)))
    assert read_choice(file) == choice
    for broken in ("{", "[]", '{"threads": 1}'):
        file.write_text(broken)
        assert read_choice(file) is None


def group(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("outer", "inner", "expected"),
    [
        ("max 100000", "max 100000", 6),
        ("max 100000", "250000 100000", 2),
        ("150000 100000", "max 100000", 1),
        ("400000 100000", "300000 100000", 3),
        ("50000 100000", "max 100000", 1),  # half a core: still one thread
        ("1600000 100000", "max 100000", 6),
    ],
)
def test_quotas_of_control_groups_count(
    tmp_path: Path, outer: str, inner: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(range(6)))
    top = tmp_path / "cgroup"
    group(top)
    group(top / "slurm", cpu_max=outer)
    group(top / "slurm" / "job", cpu_max=inner)
    membership = tmp_path / "membership"
    membership.write_text("0::/slurm/job\n")
    assert cores.available_cores(membership=membership, groups=top) == expected


def test_a_quota_of_version_1_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(range(6)))
    folder = tmp_path / "cgroup" / "cpu,cpuacct" / "job"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text("200000\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    membership = tmp_path / "membership"
    membership.write_text("4:memory:/job\n3:cpu,cpuacct:/job\n0::/\n")
    assert cores.available_cores(membership=membership, groups=tmp_path / "cgroup") == 2


def test_without_control_groups_the_affinity_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: {1, 5})
    assert cores.available_cores(membership=tmp_path / "none", groups=tmp_path / "none") == 2


def test_ranks_share_only_cores_of_the_same_host() -> None:
    ranks = [("a", [0, 1]), ("a", [0, 1]), ("a", [2, 3]), ("b", [0, 1])]
    assert [cores.count_sharing(rank, ranks) for rank in ranks] == [2, 2, 1, 1]
