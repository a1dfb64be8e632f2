"""A stop signal on one rank takes its whole tensor-parallel group out of the engine, and all ranks to the
save."""

import time
from pathlib import Path
from typing import Any

import pytest

from rlsc_mcore.parallel.backend import get_backend
from rlsc_mcore.parallel.groups import initialize_groups
from rlsc_mcore.run.folder import latest_checkpoint
from rlsc_mcore.training.signals import ENGINE_STEPS_BETWEEN_AGREEMENTS, AbortPoll, StopRequest
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny_config

FLAGS = [
    "--data.questions-per-step", "2", "--rollout.num-samples", "4", "--rollout.max-new-tokens", "48", "--rollout.max-num-seqs", "8",
    "--evaluation.path", "embedded:test", "--evaluation.max-questions", "4", "--observability.tensorboard", "False",
]  # fmt: skip


def steps_until_abort(signalled_rank: int, at_step: int) -> int:
    groups = initialize_groups(get_backend(), 2)
    stop = StopRequest()
    poll = AbortPoll(stop, groups)
    for step in range(1, 100):
        if step == at_step and groups.rank == signalled_rank:
            stop.signal_name = "SIGUSR1"
        if poll():
            return step
    return 0


@pytest.mark.parametrize("signalled_rank", [0, 1])
@pytest.mark.parametrize("at_step", [1, 9, 16])
def test_both_ranks_leave_at_the_same_step(signalled_rank: int, at_step: int) -> None:
    first, second = run_ranks(2, steps_until_abort, signalled_rank, at_step)
    assert first == second and at_step <= first < at_step + ENGINE_STEPS_BETWEEN_AGREEMENTS


def test_nobody_leaves_without_a_signal() -> None:
    assert run_ranks(2, steps_until_abort, -1, 1) == [0, 0]


def seconds_until_abort(signalled_rank: int) -> tuple[float, int]:
    """Two engines of one rank each, which never meet: one rank's signal after half a second, in the second
    phase of a run."""
    import torch.distributed as dist

    groups = initialize_groups(get_backend(), 1)
    stop = StopRequest()
    earlier, poll = AbortPoll(stop, groups), AbortPoll(stop, groups)
    assert not earlier()
    dist.barrier()
    start, calls = time.monotonic(), 0
    while time.monotonic() - start < 20:
        calls += 1
        if groups.rank == signalled_rank and time.monotonic() - start > 0.5:
            stop.signal_name = "SIGTERM"
        if poll():
            break
        time.sleep(0.01)
    took = time.monotonic() - start
    dist.barrier()
    assert (
        groups.rank == signalled_rank or not earlier()
    )  # what was said in one phase is not heard in another
    dist.barrier()
    return took, calls


@pytest.mark.parametrize("signalled_rank", [0, 1])
def test_engines_of_other_ranks_hear_of_it_too(signalled_rank: int) -> None:
    for took, calls in run_ranks(2, seconds_until_abort, signalled_rank):
        assert 0.5 <= took < 5 and calls > 1


def stop_on_the_second_rank(run_dir: str, tp: int, pp: int) -> dict[str, Any]:
    """Signal the second rank alone in a rollout, then in an evaluation; save; and sample what was left."""
    from rlsc_mcore.rollout.engine import GenerationInterrupted
    from rlsc_mcore.training.session import Session

    stop = StopRequest()
    layout = ["--parallel.tp", str(tp), "--parallel.pp", str(pp)]
    session = Session(tiny_config("embedded:tiny_qwen2", [*FLAGS, *layout], run_dir), stop)
    outcome: dict[str, Any] = {"interrupted": 0}
    for stage in (lambda: session.sample(0), lambda: session.evaluate("before")):
        stop.signal_name = "SIGUSR1" if session.groups.rank == 1 else None
        try:
            stage()
        except GenerationInterrupted:
            outcome["interrupted"] += 1
    stop.signal_name = None
    session.save(0)
    session.saver.finish()
    outcome["answers"] = [rollout.response_ids for rollout in session.sample(0)]
    return outcome


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_all_ranks_stop_together_in_rollout_and_evaluation(tmp_path: Path, tp: int, pp: int) -> None:
    first, second = run_ranks(2, stop_on_the_second_rank, str(tmp_path / "run"), tp, pp)
    assert first["interrupted"] == second["interrupted"] == 2
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoints" / "step_000000"
    assert (first["answers"] == second["answers"]) == (tp == 2) and len(first["answers"]) == 4 * tp


def stop_while_a_pipeline_trains(run_dir: str) -> dict[str, Any]:
    """Signal the last stage alone after its first micro-batch: the step ends whole on both."""
    from rlsc_mcore.rollout.engine import GenerationInterrupted
    from rlsc_mcore.training.session import Session

    stop = StopRequest()
    flags = [*FLAGS, "--parallel.pp", "2", "--training.tokens-per-micro-batch", "128"]
    session = Session(tiny_config("embedded:tiny_qwen2", flags, run_dir), stop)
    rollouts = session.sample(0)
    calls, advance = [], session.progress.advance

    def signalled(*amounts: Any) -> None:
        calls.append(1)
        if len(calls) == 1 and session.groups.rank == 1:
            stop.signal_name = "SIGTERM"
        advance(*amounts)

    session.progress.advance = signalled  # type: ignore[method-assign]
    result = session.train(0, rollouts)
    interrupted = False
    try:
        session.check_stop()
    except GenerationInterrupted:
        interrupted = True
    session.hot_swap()
    session.save(1)
    session.saver.finish()
    return {"calls": len(calls), "interrupted": interrupted, "grad_norm": result.outcome.grad_norm}


def test_a_pipeline_finishes_its_step_before_it_stops(tmp_path: Path) -> None:
    first, second = run_ranks(2, stop_while_a_pipeline_trains, str(tmp_path / "run"))
    assert first["interrupted"] and second["interrupted"]
    assert min(first["calls"], second["calls"]) > 1 and first["grad_norm"] == second["grad_norm"] > 0
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoints" / "step_000001"
