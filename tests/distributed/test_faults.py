"""A rank that dies, hangs or fails ends the run: within a set time, with one message that names it, exit code
1 everywhere."""

import json
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rlsc_mcore.config import ConfigError, RunError
from tests.helpers.folders import EMBEDDED
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import make_model_folder, make_rollouts, tiny_config

DEAD_AFTER_S, HANG_AFTER_S = 3.0, 4.0
PATIENT_S = 12.0
LONG_S = 60.0  # where silence must be noticed, not the wait of the ranks that it holds up
CULPRIT = 1


def train_until_the_fault(
    rank: int, world: int, port: int, folder: str, scratch: str, fault: str, trained: Any
) -> None:
    """A rank that trains for ever; after two steps the culprit meets its fault. What it prints goes to a
    file."""
    import sys

    environment = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in environment.items()})
    # A busy machine may keep a healthy rank silent for seconds: only where silence is the fault is it judged
    # soon.
    os.environ["RLSC_DEAD_AFTER_S"] = str(PATIENT_S if fault == "sleeps" else DEAD_AFTER_S)
    errors = os.open(f"{scratch}/rank{rank}.err", os.O_WRONLY | os.O_CREAT)
    os.dup2(errors, 2)
    sys.stderr = os.fdopen(errors, "w")

    from rlsc_mcore.data.packing import merge_identical, pack
    from rlsc_mcore.parallel.backend import get_backend
    from rlsc_mcore.parallel.groups import initialize_groups
    from rlsc_mcore.training.faults import reported, start_watchdog
    from rlsc_mcore.training.step import Trainer

    hang_after_s = LONG_S if fault in ("killed", "stopped") else HANG_AFTER_S
    config = tiny_config(folder, ["--parallel.hang-timeout-s", str(hang_after_s)], run_dir=scratch)
    backend = get_backend()
    groups = initialize_groups(backend, 1)
    watchdog = start_watchdog(config, groups)
    try:
        with reported():
            trainer = Trainer(config, Path(folder), backend, groups)
            for step in range(100_000):
                watchdog.enter("train", step)
                if step == 2 and rank == CULPRIT:
                    time.sleep(2 * DEAD_AFTER_S / 6)  # a beat of this step
                    trained.set()
                    meet(fault)
                rollouts = make_rollouts(num_questions=2, num_samples=2, seed=step)
                sequences = merge_identical(
                    rollouts, train_end_token=True, train_truncated=True, stop_token_ids=frozenset({0})
                )
                trainer.step(pack(sequences[rank::world], 64), step, len(rollouts))
    except (RunError, ConfigError) as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)
    except Exception as error:
        print("Traceback:", error, file=sys.stderr, flush=True)
        os._exit(1)


def wait_as_under_nccl(rank: int, world: int, port: int, scratch: str) -> None:
    """Begin collectives that return at once, all ranks but the culprit, and wait outside of
    torch.distributed."""
    import sys

    environment = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ["RLSC_DEAD_AFTER_S"] = str(PATIENT_S)
    errors = os.open(f"{scratch}/rank{rank}.err", os.O_WRONLY | os.O_CREAT)
    os.dup2(errors, 2)
    sys.stderr = os.fdopen(errors, "w")

    import torch.distributed as dist

    from rlsc_mcore.parallel.backend import get_backend
    from rlsc_mcore.parallel.groups import initialize_groups
    from rlsc_mcore.training.faults import start_watchdog

    groups = initialize_groups(get_backend(), 1)
    watchdog = start_watchdog(
        tiny_config("unused", ["--parallel.hang-timeout-s", str(HANG_AFTER_S)], run_dir=scratch), groups
    )
    dist.barrier()
    watchdog.enter("train", 2)
    if rank != CULPRIT:
        dist.all_reduce(torch.ones(4), async_op=True)
    while True:
        time.sleep(0.1)


def test_the_rank_that_is_waited_for_is_named_where_collectives_return_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        context.Process(target=wait_as_under_nccl, args=(rank, 3, port, str(tmp_path)), daemon=True)
        for rank in range(3)
    ]
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(120)
        assert [process.exitcode for process in ranks] == [1, 1, 1]
    finally:
        for process in ranks:
            process.kill()
            process.join()
    (message,) = outcomes([(tmp_path / f"rank{rank}.err").read_text(encoding="utf-8") for rank in range(3)])
    assert message.startswith(f"rlsc: rank {CULPRIT} hangs: no progress for ")
    assert "2 of 3 ranks wait for it in a collective that it has not begun" in message


def meet(fault: str) -> None:
    if fault in ("killed", "stopped"):
        time.sleep(600)  # until the test's signal
    if fault == "sleeps":
        while True:
            time.sleep(0.1)
    if fault == "memory":
        torch.empty(1 << 50)
    raise ValueError("no such thing\nand more lines")


def run_with(fault: str, folder: str, scratch: Path, world: int = 3) -> tuple[list[int], list[str], float]:
    """Exit codes, what the ranks printed, and seconds from the fault to the last survivor's end."""
    context = multiprocessing.get_context("forkserver")
    trained = context.Event()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [(rank, world, port, folder, str(scratch), fault, trained) for rank in range(world)]
    ranks = [context.Process(target=train_until_the_fault, args=each, daemon=True) for each in arguments]
    try:
        for process in ranks:
            process.start()
        assert trained.wait(200), "no rank came to the fault"
        begin = time.monotonic()
        if fault == "killed":
            os.kill(ranks[CULPRIT].pid or 0, signal.SIGKILL)
        if fault == "stopped":
            os.kill(ranks[CULPRIT].pid or 0, signal.SIGSTOP)
        for rank, process in enumerate(ranks):
            if not (rank == CULPRIT and fault == "stopped"):
                process.join(90)
        seconds = time.monotonic() - begin
        codes = [process.exitcode for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.join()
    texts = [(scratch / f"rank{rank}.err").read_text(encoding="utf-8") for rank in range(world)]
    return codes, [text for rank, text in enumerate(texts) if rank != CULPRIT or fault != "stopped"], seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model_folder(tmp_path_factory.mktemp("faults") / "model"))


def outcomes(texts: list[str]) -> list[str]:
    return [line for text in texts for line in text.splitlines() if line.startswith("rlsc: ")]


@pytest.mark.parametrize("fault", ["killed", "stopped"])
def test_a_rank_that_is_gone_is_named_by_one_message(folder: str, tmp_path: Path, fault: str) -> None:
    codes, texts, _ = run_with(fault, folder, tmp_path)
    assert [code for rank, code in enumerate(codes) if rank != CULPRIT] == [1, 1]
    (message,) = outcomes(texts)
    assert message.startswith(f"rlsc: rank {CULPRIT} is gone: silent for "), texts
    assert "last in phase train, 2 steps done" in message and message.endswith("rlsc train --resume")
    status = Path(tmp_path / "status.json")
    assert not status.exists()  # no run folder of ours: nothing is written into it


def test_a_rank_that_hangs_is_named_with_who_waits_for_it(folder: str, tmp_path: Path) -> None:
    codes, texts, _ = run_with("sleeps", folder, tmp_path)
    assert codes == [1, 1, 1]
    (message,) = outcomes(texts)
    assert message.startswith(f"rlsc: rank {CULPRIT} hangs: no progress for "), texts
    assert "in phase train, 2 steps done" in message
    assert "2 of 3 ranks wait for it" in message and "collective " in message and "called by " in message


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("error", "Traceback: no such thing"),
        ("memory", "out of memory in phase train (2 steps done, RuntimeError: "),
    ],
)
def test_a_rank_that_fails_says_why_and_the_others_end_silently(
    folder: str, tmp_path: Path, fault: str, said: str
) -> None:
    codes, texts, _ = run_with(fault, folder, tmp_path)
    assert codes == [1, 1, 1]
    assert texts[CULPRIT].startswith(said), texts
    if fault == "memory":
        assert "lower training.tokens_per_micro_batch, set training.recompute to full" in texts[CULPRIT]
    assert outcomes(texts) == []
    assert [text for rank, text in enumerate(texts) if rank != CULPRIT] == ["", ""]


def skip_for_ever(run_dir: str) -> tuple[str, list[dict[str, Any]]]:
    """A whole run whose gradient is never finite; twice, resumed the second time."""
    from rlsc_mcore.observability.metrics import read_metrics
    from rlsc_mcore.training.loop import train
    from rlsc_mcore.training.session import Session
    from rlsc_mcore.training.signals import StopRequest

    flags = ["--data.questions-per-step", "2", "--rollout.num-samples", "3", "--rollout.max-new-tokens", "12"]
    flags += ["--training.num-steps", "6", "--training.save-every", "0", "--training.max-skipped-steps", "2"]
    session = Session(tiny_config(EMBEDDED, flags, run_dir=run_dir), StopRequest())
    session.trainer.policy.weights[0].parameter.register_hook(lambda gradient: gradient * float("inf"))
    try:
        train(session)
    except RunError as error:
        return str(error), read_metrics(Path(run_dir))
    return "", read_metrics(Path(run_dir))


def test_steps_that_are_not_finite_are_counted_dumped_and_end_the_run_saved(tmp_path: Path) -> None:
    from rlsc_mcore.run.folder import find_resumable
    from rlsc_mcore.training.checkpoint_files import read_state, verify_files

    ((message, rows),) = run_ranks(1, skip_for_ever, str(tmp_path / "run"))
    assert (
        message.startswith("2 steps in a row were not finite and were skipped (training.max_skipped_steps)")
        and "\n" not in message
    )
    assert [row["skipped"] for row in rows] == [True, True]
    assert all("is not finite: step skipped, batch in" in row["warnings"][-1] for row in rows)
    checkpoint = find_resumable(tmp_path / "run")
    verify_files(checkpoint)
    assert read_state(checkpoint).steps_done == 2
    for step in (0, 1):
        rollouts = (
            (tmp_path / "run" / "rollouts" / f"step_{step:06d}.jsonl")
            .read_text(encoding="utf-8")
            .splitlines()
        )
        sampled = {tuple(json.loads(line)["response_ids"]) for line in rollouts}
        dump = (
            (tmp_path / "run" / "skipped" / f"step_{step:06d}.rank0.jsonl")
            .read_text(encoding="utf-8")
            .splitlines()
        )
        assert {tuple(json.loads(line)["response_ids"]) for line in dump} == sampled
        assert sum(json.loads(line)["multiplicity"] for line in dump) == len(rollouts) == 6
