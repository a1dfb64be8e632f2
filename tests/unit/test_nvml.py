"""GPU sampling: sums by phase against hand-made readings; the real library, with and without a driver, stays
quiet."""

import threading
import time

import pytest

from rlsc_mcore.observability.nvml import GpuSampler, Reading, _NvmlDevice, open_device, visible_device


class Meter:
    """A device whose numbers are known: energy grows by 10 J at each question, power is 100 W, then 300 W."""

    def __init__(self) -> None:
        self.joule, self.reads = 0.0, 0
        self.read_often = threading.Event()

    def read(self) -> Reading:
        self.reads += 1
        if self.reads > 4:  # the four before it are counted
            self.read_often.set()
        return Reading(
            power_w=100.0 if self.reads % 2 else 300.0,
            utilization_share=0.5,
            memory_bytes=1e9 * self.reads,
            event_reasons=0x4,
        )

    def energy_j(self) -> float:
        self.joule += 10.0
        return self.joule


def test_readings_are_summed_by_phase() -> None:
    meter = Meter()
    sampler = GpuSampler(meter, interval_s=0.001)
    try:
        sampler.enter("rollout")
        assert meter.read_often.wait(10)
        sampler.enter("train")
        sampler.enter(None)
        found = sampler.take(sampled_tokens=40)
        assert found is not None
        rollout = found["phases"]["rollout"]
        assert (
            rollout["readings"] >= 4
            and 100 < rollout["power_w"] < 300
            and rollout["utilization_share"] == 0.5
        )
        assert (
            rollout["memory_bytes"] >= 4e9
            and rollout["held_back"] == {"sw_power_cap": 1.0}
            and "sm_clock_mhz" not in rollout
        )
        assert rollout["energy_j"] == found["phases"]["train"]["energy_j"] == 10.0  # from entering to leaving
        assert (found["energy_j"], found["energy_j_per_token"]) == (20.0, 0.5)
        assert sampler.take(40) is None  # outside of phases nothing is counted
    finally:
        sampler.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "nvml"]


def test_no_device_is_silence() -> None:
    sampler = GpuSampler(None)
    sampler.enter("rollout")
    assert sampler.take(5) is None and not [
        thread for thread in threading.enumerate() if thread.name == "nvml"
    ]
    sampler.close()


def test_the_real_library(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pynvml")
    device = open_device()
    if device is not None:
        assert (device.read().power_w or 1.0) > 0
    assert capfd.readouterr() == ("", "")
    absent = open_device(local_rank=4096, environment={})
    assert absent is None


@pytest.mark.parametrize(
    ("visible", "local_rank", "expected"),
    [(None, 2, 2), ("", 1, 1), ("4,5", 1, 5), ("GPU-ab, GPU-cd", 1, "GPU-cd"), ("3", 1, 1)],
)
def test_visible_devices_are_renumbered(visible: str | None, local_rank: int, expected: int | str) -> None:
    assert (
        visible_device(local_rank, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == expected
    )


def test_sampling_costs_little() -> None:
    """The real library: without a driver its calls fail inside, which is what this machine can measure; with
    one they succeed."""
    pynvml = pytest.importorskip("pynvml")

    class Timed(GpuSampler):
        def _run(self) -> None:
            super()._run()
            self.cpu_s = time.thread_time()

    sampler = Timed(open_device() or _NvmlDevice(pynvml, None))
    sampler.enter("rollout")
    start = time.monotonic()
    time.sleep(3)
    sampler.close()
    assert sampler.cpu_s / (time.monotonic() - start) < 0.005


def test_a_slow_driver_is_asked_less_often() -> None:
    class Slow(Meter):
        def read(self) -> Reading:
            until = time.thread_time() + 0.02
            while time.thread_time() < until:
                pass
            return super().read()

    slow, fast = Slow(), Meter()
    samplers = [GpuSampler(device, interval_s=0.05) for device in (slow, fast)]
    time.sleep(2)  # 20 ms may come back after 5 s
    for sampler in samplers:
        sampler.close()
    assert slow.reads == 1 and fast.reads > 5
