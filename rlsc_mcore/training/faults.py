"""Report a failure in one line: a phase that ran out of memory, or a lost rank.

For a failed allocation the line names the options to lower.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from rlsc_mcore.config import Config, ConfigError, RunError
from rlsc_mcore.parallel.groups import Groups
from rlsc_mcore.parallel.watchdog import Watchdog
from rlsc_mcore.rollout.engine import GenerationInterrupted
from rlsc_mcore.run.machine_errors import explain
from rlsc_mcore.run.status import Phase, write_end

# The options to lower, by the phase that ran out of memory.
REMEDIES: dict[Phase, str] = {
    "start-up": "lower rollout.kv_cache_gib or rollout.max_num_seqs, or raise parallel.tp",
    "rollout": "lower rollout.max_num_seqs, rollout.max_num_batched_tokens or rollout.kv_cache_gib, or turn on "
    "optimizer.offload_during_rollout",
    "train": "lower training.tokens_per_micro_batch, set training.recompute to full, or raise parallel.tp or "
    "optimizer.cpu_offload",
    "swap": "lower rollout.kv_cache_gib",
    "save": "set training.async_save to False",
}
_OTHERWISE = "lower rollout.kv_cache_gib or raise parallel.tp"
_PEER_IS_GONE = (
    "Connection closed by peer",
    "Connection reset",
    "Broken pipe",
    "NCCL",
    "Socket",
    "Gloo",
    "gloo",
    "recvValue failed",
)
_current: list[Watchdog] = []  # the watchdog of this process, empty before a session starts


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is a failed memory allocation, on a GPU or on the host."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def start_watchdog(config: Config, groups: Groups) -> Watchdog:
    """Start the watchdog of this rank, which also watches the next rank; `reported` uses it from then on."""

    def end(message: str) -> None:
        write_end(Path(config.run_dir), "crash", message=message)

    _current[:] = [
        Watchdog(groups.rank, groups.world_size, hang_after_s=config.parallel.hang_timeout_s, end=end)
    ]
    return _current[0]


@contextmanager
def reported() -> Iterator[None]:
    """Report a failure inside the block to the other ranks, and close the watchdog after the block.

    Turns a failed allocation into a `RunError` that names the phase and the options to lower. If the failure
    comes from a lost rank, this function waits for the watchdog's failure report, which names that rank and
    ends the process.
    """
    try:
        yield
    except GenerationInterrupted:
        raise
    except ConfigError as error:  # may be raised on one rank only: the other ranks would wait for it
        if _current:
            _current[0].fail(_first_line(error))
        raise
    except Exception as error:
        if not _current:
            raise
        watchdog = _current[0]
        phase = watchdog.phase
        if is_out_of_memory(error):
            failure = RunError(
                f"out of memory in phase {phase} ({watchdog.steps_done} steps done, {_first_line(error)}); "
                f"{REMEDIES.get(phase, _OTHERWISE)}"
            )
            watchdog.fail(str(failure))
            raise failure from error
        cause = None if isinstance(error, RunError) else explain(error)
        if cause is not None:
            failure = RunError(f"{cause} (phase {phase}); what was saved before is whole")
            watchdog.fail(str(failure))
            raise failure from error
        if not isinstance(error, RunError) and any(text in str(error) for text in _PEER_IS_GONE):
            watchdog.wait_for_report()
        watchdog.fail(_first_line(error))
        raise
    finally:
        for watchdog in _current:  # a session that was not built whole closes nothing
            watchdog.close()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
