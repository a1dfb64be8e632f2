"""Write what a step measured: its row of metrics.jsonl, its warnings, its answers and a skipped batch."""

from collections.abc import Callable, Sequence
from pathlib import Path

from rlsc_mcore.config import Config
from rlsc_mcore.objectives import OBJECTIVES
from rlsc_mcore.observability.console import Reporter
from rlsc_mcore.observability.metrics import MetricsWriter, alarms, signal_warnings
from rlsc_mcore.observability.mismatch import mismatch_warnings
from rlsc_mcore.observability.step_metrics import StepMetrics, console_line
from rlsc_mcore.parallel.backend import Backend
from rlsc_mcore.parallel.groups import Groups
from rlsc_mcore.training.memory_ledger import MemoryLedger
from rlsc_mcore.training.metrics_row import step_row
from rlsc_mcore.training.outputs import dump_batch, write_rollouts
from rlsc_mcore.training.progress import StepProgress
from rlsc_mcore.training.stop_rules import compared_dtype
from rlsc_mcore.types import Rollout, StepResult


class StepRecorder:
    """Record the steps of a run in its folder and on the console."""

    def __init__(
        self,
        config: Config,
        backend: Backend,
        groups: Groups,
        report: Reporter,
        metrics: MetricsWriter,
        *,
        has_stop_token: bool,
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        """`has_stop_token`: whether a token is known to end an answer. `decode` turns token ids into the text
        that is graded."""
        self._config, self._backend, self._groups = config, backend, groups
        self._report, self._metrics, self._has_stop_token = report, metrics, has_stop_token
        self._decode = decode
        self._run_dir = Path(config.run_dir)
        self._warned: set[str] = set()  # the beginnings of the warnings that were printed

    def record(
        self,
        step: int,
        rollouts: Sequence[Rollout],
        result: StepResult,
        progress: StepProgress,
        memory: MemoryLedger,
    ) -> None:
        """Write metrics and answers of the step with index `step` and print its warnings.

        `rollouts` are those of this rank's engine. Ends the step of `memory`; collective over the world.
        """
        config, groups, outcome = self._config, self._groups, result.outcome
        memory_bytes = self._backend.memory_bytes()
        row = step_row(config, groups, step, rollouts, result, progress.seconds, memory_bytes, self._decode)
        first = self._metrics.rows[0] if self._metrics.rows else row
        row["memory"], memory_warnings = memory.close_step(groups)
        objective = OBJECTIVES[config.algorithm.objective]
        is_offline = objective.is_offline  # the file, not the policy, sets lengths
        row["warnings"] = [
            *signal_warnings(row, reads_boxes=_reads_boxes(config), has_advantages=objective.has_advantages),
            *([] if is_offline else alarms(row, first, ends=self._has_stop_token)),
            *mismatch_warnings(row, compared_dtype(config)),
            *memory_warnings,
        ]
        # All ranks of an engine hold the same rollouts, so each counts its share of the tokens.
        sampled_tokens = sum(len(rollout.response_ids) for rollout in rollouts)
        row["gpu"] = progress.gpu.take(sampled_tokens // groups.engine_tp_size)
        if not outcome.updated:
            folder = dump_batch(self._run_dir, step, result.exchange.sequences, groups)
            row["warnings"].append(
                f"loss {outcome.loss} or gradient norm {outcome.grad_norm} is not finite: step skipped, batch "
                f"in {folder}"
            )
        self._metrics.write(StepMetrics(**row).row())
        if config.observability.save_rollouts:
            write_rollouts(self._run_dir, step, rollouts, groups)
        seconds = sum(progress.seconds.values())
        self._report.line(
            f"step {step + 1}/{config.training.num_steps}  {console_line(row)}  {seconds:.1f} s"
        )
        self._warn_once(row["warnings"])

    def _warn_once(self, warnings: Sequence[str]) -> None:
        """Print the warnings whose beginning was not printed yet; metrics.jsonl has those of every step."""
        for warning in warnings:
            kind = warning.split(":")[0]
            if kind not in self._warned:
                self._report.warn(warning)
                self._warned.add(kind)


def _reads_boxes(config: Config) -> bool:
    """Return whether the objective compares boxed answers only, for a reward, a pair or a teacher."""
    algorithm = config.algorithm
    objective = OBJECTIVES[algorithm.objective]
    compares = (objective.reward is not None and algorithm.reward_function is None) or objective.distills
    return compares and algorithm.rewards == "boxed"
