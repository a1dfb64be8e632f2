"""Select the implementation of a row op.

`auto` takes the first backend in PREFERENCE[device] that offers the op and can run there. A named backend is
used for every op that it offers; RuntimeError if it cannot run. Ops that it does not offer are selected as
with `auto`. float64 input always uses the reference.
"""

import functools
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch

Backend = Literal["auto", "reference", "cpp", "triton", "cuda"]
OPS = (
    "log_prob_stats",
    "scored_stats",
    "dlogits",
    "rest_softmax_",
    "rest_softmax_into",
    "log_prob_dlogits_",
    "join_stats",
    "join_backward",
    "sequence_sums",
    "kl_stats",
    "jsd_stats",
    "kl_dlogits_",
)
PREFERENCE = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpp", "reference")}
OFFERS = {
    "reference": OPS,
    "cpp": (
        "log_prob_stats",
        "scored_stats",
        "dlogits",
        "rest_softmax_",
        "rest_softmax_into",
        "log_prob_dlogits_",
        "sequence_sums",
    ),
    "triton": OPS,
    "cuda": ("rest_softmax_", "rest_softmax_into", "log_prob_dlogits_"),
}
MODULES = {
    "reference": "rlsc_mcore.ops.reference",
    "cpp": "rlsc_mcore.ops.native",
    "triton": "rlsc_mcore.ops.triton_rows",
    "cuda": "rlsc_mcore.ops.native",
}


class Choice(NamedTuple):
    """One line of `rlsc doctor`: the backend that `auto` takes for an op on a device, and why the preferred
    ones cannot run."""

    op: str
    device: str
    backend: str
    reason: str


@functools.cache
def select(op: str, device: torch.device, dtype: torch.dtype, backend: str = "auto") -> Callable[..., Any]:
    """Return the function that computes `op` on `device`; RuntimeError with the reason if a named backend
    cannot run.

    Cached for the life of the process, because every call of an op needs it.
    """
    if dtype == torch.float64 or backend == "reference":
        return getattr(import_module(MODULES["reference"]), op)
    if backend == "auto" or op not in OFFERS.get(backend, OPS):
        backend = choose(op, device.type).backend
    elif (reason := why_not(backend, op, device.type)) is not None:
        raise RuntimeError(
            f"ops.backend={backend}: {op} on {device.type} is not available: {reason}; use ops.backend=auto"
        )
    return getattr(import_module(MODULES[backend]), op)


def choose(op: str, device_type: str) -> Choice:
    """Return the backend that `auto` takes for `op` on a device type."""
    reasons: list[str] = []
    for backend in PREFERENCE.get(device_type, ("reference",)):
        if op not in OFFERS[backend]:
            continue
        reason = why_not(backend, op, device_type)
        if reason is None:
            return Choice(op, device_type, backend, "; ".join(reasons) or "fastest implementation")
        reasons.append(f"no {backend}: {reason}")
    raise AssertionError(f"the reference computes every op, {op} on {device_type} found none")


def why_not(backend: str, op: str, device_type: str) -> str | None:
    """Return why `backend` cannot compute `op` on a device type; None if it can."""
    if backend not in MODULES:
        return "not built"
    if backend == "reference":
        return None
    return import_module(MODULES[backend]).why_not(op, device_type)


def describe_backends(device_types: Iterable[str]) -> list[Choice]:
    """List the backend that `auto` takes for every op on each device type."""
    return [choose(op, device_type) for device_type in device_types for op in OPS]
