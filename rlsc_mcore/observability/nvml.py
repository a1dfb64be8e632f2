"""Measure GPU power, energy, utilisation, memory, clocks and throttling per phase by NVML. Imports no torch.

A thread reads the device twice a second, or less often if the driver calls would use more than 0.4 % of a
core. Without the library, the driver or the permission, nothing is measured and no error is raised.
"""

import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

SECONDS_BETWEEN_READS = 0.5
MOST_OF_A_CORE = 0.004  # largest fraction of a core that the thread may use
# Bits of NVML's clock event reasons that mean throttling, with their NVML names.
_HELD_BACK = {
    "sw_power_cap": 0x4,
    "hw_slowdown": 0x8,
    "sw_thermal_slowdown": 0x20,
    "hw_thermal_slowdown": 0x40,
    "hw_power_brake_slowdown": 0x80,
}


@dataclass(frozen=True)
class Reading:
    """One reading of the device; a value is None if the device does not report it."""

    power_w: float | None = None
    utilization_share: float | None = None
    memory_bytes: float | None = None
    sm_clock_mhz: float | None = None
    event_reasons: int = 0


class Device(Protocol):
    """A device that `GpuSampler` reads."""

    def read(self) -> Reading: ...

    def energy_j(self) -> float | None:
        """Return the energy since the driver was loaded, in joules; None if the device does not count it."""


@dataclass
class _Phase:
    readings: list[Reading] = field(default_factory=list)
    energy_j: float = 0.0


class GpuSampler:
    """Collect readings by phase in a background thread; without a device every method does nothing."""

    def __init__(self, device: Device | None, interval_s: float = SECONDS_BETWEEN_READS) -> None:
        self._device, self._interval_s = device, interval_s
        self._lock = threading.Lock()
        self._phases: dict[str, _Phase] = {}
        self._current: str | None = None
        self._energy_at_entry: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nvml", daemon=True)
        if device is not None:
            self._thread.start()

    def enter(self, phase: str | None) -> None:
        """Assign the following readings and energy to `phase`; None: to no phase."""
        if self._device is None:
            return
        energy = self._device.energy_j()
        with self._lock:
            if self._current is not None and energy is not None and self._energy_at_entry is not None:
                self._phases[self._current].energy_j += energy - self._energy_at_entry
            self._current, self._energy_at_entry = phase, energy
            if phase is not None:
                self._phases.setdefault(phase, _Phase())

    def take(self, sampled_tokens: int) -> dict[str, Any] | None:
        """Return the means per phase since the last call and reset them; None if there are no readings.

        `energy_j_per_token` is the energy of all phases divided by `sampled_tokens`.
        """
        with self._lock:
            phases, self._phases = self._phases, {}
            if self._current is not None:
                self._phases[self._current] = _Phase()
        found = {name: _summary(phase) for name, phase in phases.items() if phase.readings or phase.energy_j}
        if not found:
            return None
        energy = sum(phase.energy_j for phase in phases.values())
        return {
            "phases": found,
            "energy_j": energy,
            "energy_j_per_token": energy / sampled_tokens if sampled_tokens else None,
        }

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)

    def _run(self) -> None:
        assert self._device is not None
        pause_s = self._interval_s
        while not self._stop.wait(pause_s):
            begin_s = time.thread_time()
            reading = self._device.read()
            with self._lock:
                if self._current is not None:
                    self._phases[self._current].readings.append(reading)
            pause_s = max(self._interval_s, (time.thread_time() - begin_s) / MOST_OF_A_CORE)


def open_device(local_rank: int = 0, environment: Mapping[str, str] = os.environ) -> Device | None:
    """Open this rank's device by NVML; None if the library, the driver or the device is missing."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return _NvmlDevice(pynvml, _handle(pynvml, visible_device(local_rank, environment)))
    except pynvml.NVMLError:
        return None


def visible_device(local_rank: int, environment: Mapping[str, str]) -> int | str:
    """Return the NVML index or the UUID of CUDA device `local_rank`, which depends on
    CUDA_VISIBLE_DEVICES."""
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in visible.split(",") if name.strip()]
    name = names[local_rank] if local_rank < len(names) else str(local_rank)
    return int(name) if name.isdigit() else name


class _NvmlDevice:
    def __init__(self, library: Any, handle: Any) -> None:
        self._library, self._handle = library, handle

    def read(self) -> Reading:
        nvml = self._library
        power = self._ask("nvmlDeviceGetPowerUsage")
        use = self._ask("nvmlDeviceGetUtilizationRates")
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        clock = self._ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM)
        reasons = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        return Reading(
            power_w=None if power is None else power / 1000,
            utilization_share=None if use is None else use.gpu / 100,
            memory_bytes=None if memory is None else float(memory.used),
            sm_clock_mhz=None if clock is None else float(clock),
            event_reasons=int(reasons or 0),
        )

    def energy_j(self) -> float | None:
        millijoule = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoule is None else millijoule / 1000

    def _ask(self, function: str, *arguments: Any) -> Any:
        try:
            return getattr(self._library, function)(self._handle, *arguments)
        except (self._library.NVMLError, AttributeError):  # not supported by this device or driver
            return None


def _handle(nvml: Any, name: int | str) -> Any:
    return (
        nvml.nvmlDeviceGetHandleByIndex(name)
        if isinstance(name, int)
        else nvml.nvmlDeviceGetHandleByUUID(name)
    )


def _summary(phase: _Phase) -> dict[str, Any]:
    found: dict[str, Any] = {"readings": len(phase.readings), "energy_j": phase.energy_j}
    for name in ("power_w", "utilization_share", "sm_clock_mhz"):
        values = [value for reading in phase.readings if (value := getattr(reading, name)) is not None]
        if values:
            found[name] = sum(values) / len(values)
    memory = [reading.memory_bytes for reading in phase.readings if reading.memory_bytes is not None]
    if memory:
        found["memory_bytes"] = max(memory)
    held = {
        name: sum(bool(r.event_reasons & bit) for r in phase.readings) for name, bit in _HELD_BACK.items()
    }
    found["held_back"] = {name: count / len(phase.readings) for name, count in held.items() if count}
    return found
