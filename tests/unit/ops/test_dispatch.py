"""The dispatch rule: what auto takes, what a named backend does where it cannot run, what the description
says."""

import pytest
import torch

from rlsc_mcore.config import OpsConfig
from rlsc_mcore.ops import describe_backends, native, reference, token_log_probs
from rlsc_mcore.ops.dispatch import MODULES, OFFERS, OPS, PREFERENCE, choose, select, why_not


@pytest.fixture(autouse=True)
def forget_choices():
    """A choice is made once per process; these tests change what it depends on."""
    select.cache_clear()
    yield
    select.cache_clear()


def test_auto_takes_the_first_backend_that_runs():
    for op in OPS:
        expected = next(b for b in PREFERENCE["cpu"] if op in OFFERS[b] and why_not(b, op, "cpu") is None)
        assert choose(op, "cpu").backend == expected
        chosen = select(op, torch.device("cpu"), torch.float32)
        assert chosen.__module__ == MODULES[expected]


def test_the_description_names_op_device_backend_and_reason():
    described = describe_backends(["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
    assert {choice.op for choice in described if choice.device == "cpu"} == set(OPS)
    for choice in described:
        assert choice == choose(choice.op, choice.device)
        assert choice.reason


def test_a_backend_that_is_not_built_is_skipped_with_its_reason(monkeypatch):
    monkeypatch.setattr(native, "why_not", lambda op, device_type: "not built here")
    choice = choose("dlogits", "cpu")
    assert (choice.backend, choice.reason) == ("reference", "no cpp: not built here")
    logits = torch.randn(3, 5)
    with pytest.raises(
        RuntimeError, match=r"ops.backend=cpp: scored_stats on cpu is not available: not built here"
    ):
        token_log_probs(logits, torch.zeros(3, dtype=torch.int64), vocab_size=5, backend="cpp")


def test_a_named_backend_runs(monkeypatch):
    """The path that is named is the path that runs."""
    calls = []
    original = reference.log_prob_stats
    monkeypatch.setattr(
        reference, "log_prob_stats", lambda *arguments: calls.append(1) or original(*arguments)
    )
    logits, targets = torch.randn(3, 5), torch.zeros(3, dtype=torch.int64)
    token_log_probs(logits, targets, vocab_size=5, backend="reference")
    assert len(calls) == 1
    if why_not("cpp", "log_prob_stats", "cpu") is None:
        token_log_probs(logits, targets, vocab_size=5, backend="cpp")
        assert len(calls) == 1


def test_float64_always_runs_the_definition():
    for backend in ("auto", "cpp", "triton", "cuda"):
        assert (
            select("log_prob_stats", torch.device("cpu"), torch.float64, backend) is reference.log_prob_stats
        )


def test_the_option_lists_exactly_the_backends():
    options = set(OpsConfig.__annotations__["backend"].__args__)
    assert options == {"auto", *MODULES}
