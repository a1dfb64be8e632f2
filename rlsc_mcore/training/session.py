"""Build the parts of a run and implement the stages that the loop calls, with all their options."""

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlsc_mcore.config import Config, check_answers_per_step
from rlsc_mcore.data.packing import pack
from rlsc_mcore.evaluation.evaluate import evaluate
from rlsc_mcore.evaluation.records import write_records
from rlsc_mcore.model.architecture import DTYPES
from rlsc_mcore.objectives import OBJECTIVES
from rlsc_mcore.observability.console import Reporter
from rlsc_mcore.observability.metrics import MetricsWriter
from rlsc_mcore.observability.nvml import GpuSampler, open_device
from rlsc_mcore.observability.trackers import open_trackers
from rlsc_mcore.parallel.backend import get_backend
from rlsc_mcore.parallel.groups import initialize_groups
from rlsc_mcore.rollout.engine import GenerationInterrupted, RolloutEngine
from rlsc_mcore.rollout.sampling import sample_rollouts, spread_samples
from rlsc_mcore.run.folder import best_checkpoint_of
from rlsc_mcore.run.status import RunStatus
from rlsc_mcore.training.checkpoint import CheckpointSaver, load_checkpoint
from rlsc_mcore.training.cpu_tuning import CpuChoice, tune_cpu
from rlsc_mcore.training.export import write_policy
from rlsc_mcore.training.faults import start_watchdog
from rlsc_mcore.training.input_record import claim_inputs
from rlsc_mcore.training.inputs import read_inputs
from rlsc_mcore.training.memory_ledger import MemoryLedger
from rlsc_mcore.training.offline import open_offline
from rlsc_mcore.training.outputs import claim_run_folder
from rlsc_mcore.training.progress import StepProgress
from rlsc_mcore.training.recorder import StepRecorder
from rlsc_mcore.training.redistribute import redistribute_step
from rlsc_mcore.training.resume import continue_run
from rlsc_mcore.training.signals import AbortPoll, StopRequest
from rlsc_mcore.training.step import Trainer
from rlsc_mcore.training.stop_rules import (
    count_mismatched_steps,
    met_condition,
    stop_when_mismatched,
    stop_when_skipping,
)
from rlsc_mcore.types import Rollout, StepResult
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
        engine_tp = config.rollout.tp or config.parallel.tp
        self.groups = initialize_groups(self.backend, config.parallel.tp, engine_tp, pp=config.parallel.pp)
        self.watchdog = start_watchdog(config, self.groups)
        self.report = Reporter(self.groups.is_main)
        if asked_prompts is None:
            check_answers_per_step(config, self.groups.dp_size)
        owner = claim_run_folder(
            self.run_dir, config, self.groups, self.report.warn, resuming=resume_from is not None
        )
        self.cpu: CpuChoice | None = None
        if not self.backend.is_cuda:
            self.cpu = tune_cpu(
                config, self.inputs.architecture, self.groups, resuming=resume_from is not None
            )
        if self.inputs.record is not None:
            claim_inputs(self.run_dir, self.inputs.record, self.groups)
        for warning in self.inputs.warnings:
            self.report.warn(warning)
        trackers = []
        if self.groups.is_main:
            settings = dataclasses.asdict(config)
            trackers = open_trackers(config.observability, self.run_dir, settings, self.report.warn)
        status = RunStatus(self.run_dir, config.training.num_steps, enabled=self.groups.is_main, owner=owner)
        gpu = GpuSampler(open_device(self.backend.device.index) if self.backend.is_cuda else None)
        self.progress = StepProgress(status, self.watchdog, self.report, gpu, self.backend.synchronize)
        self.check_stop()
        self.trainer = Trainer(
            config,
            self.inputs.model_folder,
            self.backend,
            self.groups,
            load=resume_from is None or config.keeps_start,
        )
        self.start_step = 0  # index of the first step: as many steps are done
        if resume_from is not None:
            with self.report.bar(f"loading the checkpoint {resume_from.name}"):
                self.start_step = continue_run(
                    resume_from, self.run_dir, self.trainer, self.inputs, self.report.warn
                )
        self.offline = open_offline(self.inputs, self.trainer, self.groups, self.run_dir, resume_from)
        self.swap = HotSwap(self.trainer.policy, self.groups)
        self.swap.policy_version = self.start_step
        self.saver = CheckpointSaver(
            self.run_dir,
            self.trainer,
            self.inputs.fingerprint,
            keep_last=config.training.keep_last,
            asynchronous=config.training.async_save,
            keep_best=config.training.keep_best != "none",
        )
        self.check_stop()
        self.trainer.release_memory()  # the engine sizes its KV cache by the memory that is free now
        self._engine: RolloutEngine | None = None
        if config.needs_engine or asked_prompts is not None:
            self._engine = self._build_engine(engine_tp)
        self.metrics = MetricsWriter(
            self.run_dir,
            first_step=self.start_step,
            enabled=self.groups.is_main,
            tensorboard=config.observability.tensorboard,
            trackers=trackers,
        )
        has_stop_token = bool(self.inputs.stop_token_ids)
        self.recorder = StepRecorder(
            config,
            self.backend,
            self.groups,
            self.report,
            self.metrics,
            has_stop_token=has_stop_token,
            decode=partial(self.inputs.tokenizer.decode, skip_special_tokens=True),
        )
        self.memory = MemoryLedger(self.trainer, self._engine, self.backend)
        self.check_stop()
        self.stop.begin()

    def _build_engine(self, engine_tp: int) -> RolloutEngine:
        """Build the engine on the trainer's weights; collective over the model group."""
        config = self.config
        dtype = DTYPES[config.rollout.dtype or config.model.dtype]
        with self.report.bar("building the engine"):
            engine = RolloutEngine(
                config,
                self.inputs.model_folder,
                self.backend,
                self.groups,
                self.swap.bind,
                max_model_len=self.inputs.max_model_len,
                kv_bytes_per_token=self.inputs.architecture.kv_bytes_per_token(dtype.itemsize, engine_tp),
                stop_token_ids=self.inputs.stop_token_ids,
                tempered=config.algorithm.log_prob_temperature == "sampling",
            )
        self.swap.fill()
        return engine

    @property
    def engine(self) -> RolloutEngine:
        """The engine of a run that samples answers."""
        assert self._engine is not None, "a run that samples no answer has no engine"
        return self._engine

    @property
    def has_engine(self) -> bool:
        """Whether the run samples answers, so that it has an engine (`Config.needs_engine`)."""
        return self._engine is not None

    # ------------------------------------------------------------------ stages of one step

    def sample(self, step: int) -> list[Rollout]:
        """Sample the step's questions over all engines and return the rollouts of this rank's engine.

        Collective over the world. Raises `GenerationInterrupted` on every rank after a stop signal.
        """
        self.progress.begin_step(step)
        asked = self.inputs.sampler.step_questions(step)
        options, groups = self.config.rollout, self.groups
        shares = spread_samples(len(asked), options.num_samples, groups.num_engines, groups.engine_index)
        questions = [asked[position] for position, _ in shares]
        samples = [share for _, share in shares]
        if self.offline is not None:
            with self.progress.phase("rollout"):
                return self.offline.rollouts(questions, samples, self.swap.policy_version)
        most_tokens = sum(map(len, samples)) * options.max_new_tokens
        with (
            self.progress.phase("rollout"),
            self.progress.bar(f"step {step + 1}: sampling, tokens (at most)", most_tokens, tokens_each=1),
        ):
            try:
                rollouts = sample_rollouts(
                    self.engine,
                    self.inputs.tokenizer,
                    [self.inputs.questions[index] for index, _ in questions],
                    [self.inputs.prompts[index] for index, _ in questions],
                    options,
                    run_seed=self.config.training.seed,
                    step=step,
                    policy_version=self.swap.policy_version,
                    repeats=[repeat for _, repeat in questions],
                    samples=samples,
                    progress=self.progress,
                    should_stop=AbortPoll(self.stop, groups),
                )
            except GenerationInterrupted:  # other ranks may still sample: all of them meet in check_stop
                rollouts = []
        self.check_stop()
        self.memory.measure("rollout")
        return rollouts

    def train(self, step: int, rollouts: Sequence[Rollout]) -> StepResult:
        """Spread the rollouts over the ranks, pack them and train; collective over the world.

        Asserts that the current weights sampled the rollouts.
        """
        version = self.swap.policy_version
        stale = {rollout.policy_version for rollout in rollouts} - {version}
        assert not stale, f"rollouts of policy version {sorted(stale)} at version {version}"
        options = self.config.training
        with self.progress.phase("pack"):
            exchange = redistribute_step(self.config, self.inputs, self.groups, step, rollouts)
            batches = pack(
                exchange.sequences,
                options.tokens_per_micro_batch,
                multiple_of=self.trainer.token_multiple,
            )
        if self._engine is not None:
            self._engine.sleep()
        self.memory.measure("sleep")
        per_question = self.config.rollout.num_trained or self.config.rollout.num_samples
        if OBJECTIVES[self.config.algorithm.objective].trains_pairs:
            per_question = 1
        num_samples = max(1, self.config.data.questions_per_step * per_question - exchange.num_dropped)
        passes = len(batches) * options.updates_per_rollout
        mean_tokens = sum(len(batch.token_ids) for batch in batches) / max(1, len(batches))
        with (
            self.progress.phase("train"),
            self.progress.bar(f"step {step + 1}: training, micro-batches", passes, tokens_each=mean_tokens),
        ):
            outcome = self.trainer.step(batches, step, num_samples, self.progress)
        self.memory.measure("train")
        return StepResult(version, exchange, outcome)

    def hot_swap(self) -> None:
        """Update the engine to the trainer's new weights; collective over the model group.

        Without an engine only the policy version changes.
        """
        with self.progress.phase("swap"):
            self.trainer.release_memory()
        self.memory.measure("release")
        with self.progress.phase("swap"):
            if self._engine is None:
                self.swap.policy_version += 1
            else:
                self.swap.swap(self._engine, verify=self.config.rollout.verify_swap)
        self.memory.measure("swap")

    def record(self, step: int, rollouts: Sequence[Rollout], result: StepResult) -> None:
        """Write the step's metrics and answers, print its warnings and apply the stop rules.

        Collective over the world.
        """
        self.recorder.record(step, rollouts, result, self.progress, self.memory)
        self.saver.poll()
        stop_when_skipping(self.metrics.rows, self.config, self.run_dir, lambda: self._save_now(step + 1))
        stop_when_mismatched(self.metrics.rows, self.config, self.saver.finish)

    def _save_now(self, steps_done: int) -> None:
        self.save(steps_done)
        self.saver.finish()

    def save(self, steps_done: int) -> None:
        """Write a checkpoint after `steps_done` steps unless it exists; collective over the world.

        Mismatched steps are not saved: the checkpoint before them stays the last one until trainer and engine
        agree again or the last step of the run is done.
        """
        rows, options = self.metrics.rows, self.config.training
        if count_mismatched_steps(rows, self.config) and steps_done < options.num_steps:
            self.report.warn(
                f"step {steps_done} is not saved: its answers were sampled by other weights than the trainer's"
            )
            return
        self.progress.enter("save", steps_done)
        # The answers of the step with index i were sampled by the weights after i steps.
        best = options.keep_best
        scores = {} if best == "none" else {row["step"]: row[best] for row in rows}
        with self.report.bar(f"saving the checkpoint of step {steps_done}"):
            self.saver.save(steps_done, self.swap.policy_version, scores)

    def met_condition(self) -> str | None:
        """Return the condition of `training.stop_on` that ends the run, or None; collective over the
        world."""
        condition = met_condition(self.metrics.rows, self.config)
        return (condition or "a metric of another rank") if self.groups.any(condition is not None) else None

    def end_early(self, steps_done: int, condition: str) -> None:
        """Save the weights, and give trainer and engine those of the best checkpoint of `training.keep_best`.

        `condition` is that of `training.stop_on`. Without a best checkpoint the last weights stay. Collective
        over the world.
        """
        options = self.config.training
        self._save_now(steps_done)
        kept = "the last weights"
        if options.keep_best != "none":
            best = best_checkpoint_of(self.run_dir)
            if best is not None:
                load_checkpoint(best, self.trainer)
                self.hot_swap()
                kept = f"the weights of {best} (training.keep_best {options.keep_best})"
        self.report.warn(
            f"stopped after step {steps_done} of {options.num_steps}: {condition} held in "
            f"{options.stop_after} steps in a row (training.stop_on); evaluation and export use {kept}"
        )

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
        done = self.start_step if name == "before" else self.config.training.num_steps
        self.progress.enter("evaluate", done)
        result = evaluate(
            self.engine,
            self.inputs.tokenizer,
            self.inputs.evaluation_questions,
            self.inputs.evaluation_prompts,
            self.config,
            self.groups,
            self.progress,
            label=name,
            should_stop=AbortPoll(self.stop, self.groups),
        )
        if self.groups.is_main:
            write_records(file.parent, name, result)
        return result["scores"]

    def export(self, output: Path) -> int:
        """Write the policy as a Hugging Face folder and compare it with every engine parameter.

        Collective over the world. Returns the number of compared engine parameters: 0 without an engine.
        Raises `SwapMismatch` at the first difference.
        """
        self.progress.enter("export")
        write_policy(
            self.trainer.policy, self.inputs.model_folder, output, self.config.model.dtype, self.groups
        )
        self.groups.barrier()
        if self._engine is None:
            return 0
        return compare_with_export(
            self._engine.module, self.trainer.policy.model_weights, output, self.swap.place, self.groups.rank
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
        self.progress.gpu.close()
        if self._engine is not None:
            self._engine.shutdown()
