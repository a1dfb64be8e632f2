"""Build the parts of a run and implement the stages that the loop calls, with all their options."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlsc_mcore.config import Config, ConfigError, check_answers_per_step
from rlsc_mcore.data.packing import pack, trained_tokens
from rlsc_mcore.evaluation.evaluate import evaluate
from rlsc_mcore.evaluation.records import write_records
from rlsc_mcore.model.architecture import DTYPES
from rlsc_mcore.observability.console import ProgressBar, Reporter
from rlsc_mcore.observability.metrics import MetricsWriter, PhaseTimer, alarms
from rlsc_mcore.observability.mismatch import mismatch_warnings
from rlsc_mcore.observability.nvml import GpuSampler, open_device
from rlsc_mcore.observability.step_metrics import StepMetrics, console_line
from rlsc_mcore.observability.wandb_log import open_wandb
from rlsc_mcore.parallel.backend import get_backend
from rlsc_mcore.parallel.groups import initialize_groups
from rlsc_mcore.rollout.engine import GenerationInterrupted, RolloutEngine
from rlsc_mcore.rollout.sampling import sample_rollouts, spread_samples
from rlsc_mcore.run.status import RunStatus
from rlsc_mcore.training import checkpoint
from rlsc_mcore.training.export import write_policy
from rlsc_mcore.training.faults import start_watchdog
from rlsc_mcore.training.input_record import claim_inputs
from rlsc_mcore.training.inputs import read_inputs
from rlsc_mcore.training.memory_ledger import MemoryLedger
from rlsc_mcore.training.metrics_row import step_row
from rlsc_mcore.training.outputs import claim_run_folder, dump_batch, write_rollouts
from rlsc_mcore.training.redistribute import Asked, gather_advantages, redistribute
from rlsc_mcore.training.signals import AbortPoll, StopRequest
from rlsc_mcore.training.step import Trainer
from rlsc_mcore.training.stop_rules import (
    compared_dtype,
    count_mismatched_steps,
    stop_when_mismatched,
    stop_when_skipping,
)
from rlsc_mcore.types import Rollout, StepOutcome
from rlsc_mcore.weight_sync.swap import HotSwap
from rlsc_mcore.weight_sync.verify import compare_with_export


class Session:
    """Hold a run on this rank: data, trainer, engine and the state of its outputs."""

    def __init__(
        self,
        config: Config,
        stop: StopRequest,
        *,
        resume_from: Path | None = None,
        asked_prompts: Sequence[list[int]] | None = None,
    ) -> None:
        """Check all inputs, build trainer and engine, and load `resume_from` if it is given.

        Collective over the world. `asked_prompts` are the prompts of an evaluation without training, which
        reads no questions from the configuration. Raises `ConfigError` for a bad input before anything is
        built or written. Raises `GenerationInterrupted` on a stop signal during the build: nothing is
        trained, and earlier checkpoints are unchanged.
        """
        self.config, self.stop = config, stop
        self.run_dir = Path(config.run_dir)
        self.backend = get_backend()
        self.inputs = read_inputs(config, self.backend, asked_prompts)
        architecture = self.inputs.architecture
        engine_tp = config.rollout.tp or config.parallel.tp
        self.groups = initialize_groups(self.backend, config.parallel.tp, engine_tp, pp=config.parallel.pp)
        self.watchdog = start_watchdog(config, self.groups)
        self.report = Reporter(self.groups.is_main)
        if asked_prompts is None:
            check_answers_per_step(config, self.groups.dp_size)
        owner = claim_run_folder(self.run_dir, config, self.groups, resuming=resume_from is not None)
        if owner is not None and owner.took_over:
            self.report.warn(
                f"took over {self.run_dir} from {owner.took_over}, which has ended without giving it up"
            )
        if self.inputs.record is not None:
            claim_inputs(self.run_dir, self.inputs.record, self.groups)
        for warning in self.inputs.warnings:
            self.report.warn(warning)
        wandb_project = config.observability.wandb_project if self.groups.is_main else None
        wandb_run = open_wandb(wandb_project, self.run_dir, dataclasses.asdict(config))
        self.status = RunStatus(
            self.run_dir,
            config.training.num_steps,
            enabled=self.groups.is_main,
            on_phase=self.watchdog.phase,
            owner=owner,
        )
        self.check_stop()
        self.trainer = Trainer(
            config, self.inputs.model_folder, self.backend, self.groups, load=resume_from is None
        )
        self.start_step = 0
        if resume_from is not None:
            self._load(resume_from)
        self.swap = HotSwap(self.trainer.policy, self.groups)
        self.swap.policy_version = self.start_step
        self.saver = checkpoint.CheckpointSaver(
            self.run_dir,
            self.trainer,
            self.inputs.fingerprint,
            keep_last=config.training.keep_last,
            asynchronous=config.training.async_save,
            keep_best=config.training.keep_best != "none",
        )
        self.check_stop()
        self.trainer.release_memory()  # the engine sizes its KV cache by the memory that is free now
        self.engine = RolloutEngine(
            config,
            self.inputs.model_folder,
            self.backend,
            self.groups,
            self.swap.bind,
            max_model_len=self.inputs.max_model_len,
            kv_bytes_per_token=architecture.kv_bytes_per_token(
                DTYPES[config.rollout.dtype or config.model.dtype].itemsize, engine_tp
            ),
            stop_token_ids=self.inputs.stop_token_ids,
            tempered=config.algorithm.log_prob_temperature == "sampling",
        )
        self.swap.fill()
        self.metrics = MetricsWriter(
            self.run_dir,
            first_step=self.start_step,
            enabled=self.groups.is_main,
            tensorboard=config.observability.tensorboard,
            wandb_run=wandb_run,
        )
        self.gpu = GpuSampler(open_device(self.backend.device.index) if self.backend.is_cuda else None)
        self.timer = PhaseTimer(self.backend.synchronize, self.gpu.enter)
        self.memory = MemoryLedger(self.trainer, self.engine, self.backend)
        self._warned: set[str] = set()
        self._places: dict[Asked, int] = {}  # position of each question in the last sampled step
        self.check_stop()
        self.stop.begin()

    # ------------------------------------------------------------------ stages of one step

    def sample(self, step: int) -> list[Rollout]:
        """Sample the step's questions over all engines and return the rollouts of this rank's engine.

        Collective over the world. Raises `GenerationInterrupted` on every rank after a stop signal.
        """
        self.timer = PhaseTimer(self.backend.synchronize, self.gpu.enter)
        self.status.phase("rollout", step)
        asked = self.inputs.sampler.step_indices(step)
        repeats = [asked[:position].count(index) for position, index in enumerate(asked)]
        num_samples = self.config.rollout.num_samples
        shares = spread_samples(len(asked), num_samples, self.groups.num_engines, self.groups.engine_index)
        positions, samples = [position for position, _ in shares], [share for _, share in shares]
        total = sum(map(len, samples)) * self.config.rollout.max_new_tokens
        with (
            self.timer.phase("rollout"),
            self.report.progress(f"step {step + 1}: sampling, tokens", total) as bar,
        ):
            try:
                rollouts = sample_rollouts(
                    self.engine,
                    self.inputs.tokenizer,
                    [self.inputs.questions[asked[i]] for i in positions],
                    [self.inputs.prompts[asked[i]] for i in positions],
                    self.config.rollout,
                    run_seed=self.config.training.seed,
                    step=step,
                    policy_version=self.swap.policy_version,
                    repeats=[repeats[i] for i in positions],
                    samples=samples,
                    on_tokens=self.status.counting(self._progress(bar)),
                    should_stop=AbortPoll(self.stop, self.groups),
                )
            except GenerationInterrupted:  # other ranks may still sample: all of them meet in check_stop
                rollouts = []
        self.check_stop()
        self.memory.measure("rollout")
        self._places = {question: place for place, question in enumerate(zip(asked, repeats, strict=True))}
        return rollouts

    def train(self, step: int, rollouts: Sequence[Rollout]) -> StepOutcome:
        """Spread the rollouts over the ranks, pack them and train; collective over the world.

        Asserts that the current weights sampled the rollouts.
        """
        stale = {rollout.policy_version for rollout in rollouts} - {self.swap.policy_version}
        assert not stale, f"rollouts of policy version {sorted(stale)} at version {self.swap.policy_version}"
        self.status.phase("training", step)
        with self.timer.phase("pack"):
            algorithm, rollout_options = self.config.algorithm, self.config.rollout
            places = self._places
            rewards = gather_advantages(
                algorithm, rollout_options, rollouts, places, self.inputs.questions, self.groups
            )
            mark_trained = partial(
                trained_tokens,
                train_end_token=algorithm.train_end_token,
                train_truncated=algorithm.train_truncated,
                stop_token_ids=frozenset(self.inputs.stop_token_ids),
            )
            cost = self.inputs.architecture.cost_model()
            self.exchange = redistribute(
                rollouts,
                places,
                rollout_options,
                self.inputs.prompts,
                mark_trained,
                cost,
                self.groups,
                rewards,
            )
            batches = pack(
                self.exchange.sequences,
                self.config.training.tokens_per_micro_batch,
                multiple_of=self.trainer.token_multiple,
            )
        self.engine.sleep()
        self.memory.measure("sleep")
        per_question = self.config.rollout.num_trained or self.config.rollout.num_samples
        num_samples = self.config.data.questions_per_step * per_question
        passes = len(batches) * self.config.training.updates_per_rollout
        with (
            self.timer.phase("train"),
            self.report.progress(f"step {step + 1}: training, micro-batches", passes) as bar,
        ):
            advance = self._progress(bar)
            outcome = self.trainer.step(batches, step, num_samples, on_batch=lambda: advance(1))
        self.memory.measure("train")
        return outcome

    def _progress(self, bar: ProgressBar) -> Callable[[int], None]:
        def advance(amount: int) -> None:
            self.watchdog.progress()
            bar.advance(amount)

        return advance

    def hot_swap(self) -> None:
        """Update the engine to the trainer's new weights; collective over the model group."""
        self.status.phase("swap")
        with self.timer.phase("swap"):
            self.trainer.release_memory()
        self.memory.measure("release")
        with self.timer.phase("swap"):
            self.swap.swap(self.engine, verify=self.config.rollout.verify_swap)
        self.memory.measure("swap")

    def record(self, step: int, rollouts: Sequence[Rollout], outcome: StepOutcome) -> None:
        """Write the step's metrics and answers, print its warnings and apply the stop rules.

        Collective over the world.
        """
        row = step_row(
            self.config,
            self.groups,
            step,
            self.swap.policy_version - 1,  # the weights before the hot swap sampled the rollouts
            rollouts,
            self.exchange,
            outcome,
            self.timer.seconds,
            self.backend.memory_bytes(),
        )
        first = self.metrics.rows[0] if self.metrics.rows else row
        row["engine_imbalance"] = self.exchange.engine_imbalance
        row["memory"], grown = self.memory.close_step(self.groups)
        row["warnings"] = (
            alarms(row, first, ends=bool(self.inputs.stop_token_ids))
            + mismatch_warnings(row, compared_dtype(self.config))
            + grown
        )
        # All ranks of an engine hold the same rollouts, so each counts its share of the tokens.
        row["gpu"] = self.gpu.take(
            sum(len(rollout.response_ids) for rollout in rollouts) // self.groups.engine_tp_size
        )
        if row["skipped"]:
            dumped = dump_batch(self.run_dir, step, self.exchange.sequences, self.groups)
            row["warnings"].append(
                f"loss {row['loss']} or gradient norm {row['grad_norm']} is not finite: step skipped, batch "
                f"in {dumped}"
            )
        self.metrics.write(StepMetrics(**row).row())
        if self.config.observability.save_rollouts:
            write_rollouts(self.run_dir, step, rollouts, self.groups)
        seconds = sum(self.timer.seconds.values())
        self.report.line(
            f"step {step + 1}/{self.config.training.num_steps}  {console_line(row)}  {seconds:.1f} s"
        )
        for warning in row["warnings"]:
            if warning.split(":")[0] not in self._warned:  # print once; metrics.jsonl has every step
                self.report.warn(warning)
                self._warned.add(warning.split(":")[0])
        self.saver.poll()
        stop_when_skipping(self.metrics.rows, self.config, self.run_dir, lambda: self._save_at_once(step + 1))
        stop_when_mismatched(self.metrics.rows, self.config, self.saver.finish)

    def _save_at_once(self, step: int) -> None:
        self.save(step)
        self.saver.finish()

    def save(self, step: int) -> None:
        """Write a checkpoint after `step` optimizer steps unless it exists; collective over the world.

        Mismatched steps are not saved: the checkpoint before them stays the last one until trainer and engine
        agree again or the last step of the run is done.
        """
        if count_mismatched_steps(self.metrics.rows, self.config) and step < self.config.training.num_steps:
            self.report.warn(
                f"step {step} is not saved: its answers were sampled by other weights than the trainer's"
            )
            return
        self.status.phase("saving", step)
        best = self.config.training.keep_best
        scores = {} if best == "none" else {row["step"]: row[best] for row in self.metrics.rows}
        self.saver.save(step, self.swap.policy_version, scores)

    def evaluate(self, name: str) -> dict[str, Any] | None:
        """Evaluate the engine's current weights under `name` ("before" or "after").

        Returns None without evaluation.path. An existing result of "before" is read instead. Raises
        `GenerationInterrupted` on a stop signal.
        """
        if self.config.evaluation.path is None:
            return None
        file = self.run_dir / "evaluation" / f"{name}.json"
        if name == "before" and file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))
        self.status.phase(f"evaluating {name}")
        result = evaluate(
            self.engine,
            self.inputs.tokenizer,
            self.inputs.evaluation_questions,
            self.inputs.evaluation_prompts,
            self.config,
            self.groups,
            self.report,
            label=name,
            should_stop=AbortPoll(self.stop, self.groups),
        )
        if self.groups.is_main:
            write_records(file.parent, name, result)
        return result["scores"]

    def export(self, output: Path) -> int:
        """Write the policy as a Hugging Face folder and compare it with every engine parameter.

        Collective over the world. Returns the number of compared engine parameters. Raises `SwapMismatch` at
        the first difference.
        """
        self.status.phase("export")
        write_policy(
            self.trainer.policy, self.inputs.model_folder, output, self.config.model.dtype, self.groups
        )
        self.groups.barrier()
        return compare_with_export(
            self.engine.module, self.trainer.policy.model_weights, output, self.swap.place, self.groups.rank
        )

    def check_stop(self) -> None:
        """Raise `GenerationInterrupted` on every rank after any rank received a stop signal.

        Collective over the world.
        """
        if self.groups.any(bool(self.stop)):
            raise GenerationInterrupted

    def close(self) -> None:
        """Flush the metrics, then stop watchdog and engine; collective over the world."""
        self.groups.barrier()
        self.watchdog.close()
        self.metrics.close()
        self.gpu.close()
        self.engine.shutdown()

    # ------------------------------------------------------------------ setting up

    def _load(self, resume_from: Path) -> None:
        # Within its own directory a run falls back to an earlier checkpoint if the last is damaged. For a
        # checkpoint from elsewhere that would load other weights than the user chose.
        if resume_from.is_relative_to(self.run_dir):
            state = checkpoint.resume(resume_from, self.trainer, self.report.warn)
        else:
            state = checkpoint.load_checkpoint(resume_from, self.trainer)
        if self.inputs.record is not None and state.questions != self.inputs.fingerprint:
            raise ConfigError(
                f"data.path: {self.config.data.path} has changed since the run was started; resume needs the "
                "same questions"
            )
        self.start_step = state.step
