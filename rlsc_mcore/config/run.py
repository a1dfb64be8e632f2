"""The configuration of a run: all its sections, and the checks that concern more than one of them."""

from dataclasses import dataclass, field, replace

from rlsc_mcore.config.errors import ConfigError, check, is_given
from rlsc_mcore.config.machine import ObservabilityConfig, OpsConfig
from rlsc_mcore.config.model import LoraConfig, ModelConfig
from rlsc_mcore.config.objective import AlgorithmConfig, DistillConfig
from rlsc_mcore.config.sampling import DataConfig, EvaluationConfig, RolloutConfig
from rlsc_mcore.config.training import OptimizerConfig, ParallelConfig, TrainingConfig
from rlsc_mcore.objectives import OBJECTIVES


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run of `rlsc train`."""

    run_dir: str
    """Directory of the run: resolved config, metrics.jsonl, checkpoints, rollouts, summary.json."""
    model: ModelConfig
    data: DataConfig
    lora: LoraConfig = field(default_factory=LoraConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    ops: OpsConfig = field(default_factory=OpsConfig)
    observability: ObservabilityConfig = field(default_factory=ObservabilityConfig)

    @property
    def keeps_start(self) -> bool:
        """Return whether training needs the weights that it started with."""
        return self.lora.is_on or self.teaches_with_start or self.compares_with_start

    @property
    def teaches_with_start(self) -> bool:
        """Return whether the starting weights are the teacher of a distillation."""
        return OBJECTIVES[self.algorithm.objective].distills and self.distill.teacher == "start"

    @property
    def compares_with_start(self) -> bool:
        """Return whether the loss compares tokens with their log-probs by the starting weights."""
        return OBJECTIVES[self.algorithm.objective].needs_start or self.algorithm.kl_start > 0

    @property
    def needs_engine(self) -> bool:
        """Return whether a run samples answers: to train on them or to evaluate."""
        return not OBJECTIVES[self.algorithm.objective].is_offline or self.evaluation.path is not None

    def _check_distillation(self) -> None:
        name, samples, trained = self.algorithm.objective, self.rollout.num_samples, self.rollout.num_trained
        compared = f"at least 2 with algorithm.objective {name}, which compares the samples of a question"
        check(samples >= 2, "rollout.num_samples", compared, samples)
        check(
            trained in (None, samples),
            "rollout.num_trained",
            f"rollout.num_samples = {samples} with algorithm.objective {name}",
            trained,
        )
        one_stage = f"1 with algorithm.objective {name}, whose teacher needs all layers; use parallel.tp"
        check(self.parallel.pp == 1, "parallel.pp", one_stage, self.parallel.pp)
        updates = self.training.updates_per_rollout
        unbiased = updates == 1 or not self.distill.penalty
        reason = "1 with distill.penalty, whose term has no importance ratio"
        check(unbiased, "training.updates_per_rollout", reason, updates)

    @property
    def policy_model(self) -> ModelConfig:
        """Return `model` with the layers of the policy: adapters need torch layers."""
        return replace(self.model, layers="torch") if self.lora.is_on else self.model

    @property
    def samples_trained_policy(self) -> bool:
        """Return whether the rollouts are sampled from the softmax whose log p is trained."""
        is_trained_temperature = (
            self.algorithm.log_prob_temperature == "sampling" or self.rollout.temperature == 1.0
        )
        is_offline = OBJECTIVES[self.algorithm.objective].is_offline
        return is_trained_temperature and self.rollout.top_p == 1.0 and not is_offline

    @property
    def estimates_f(self) -> bool:
        """Return whether the mean of p(y|x) over the rollouts estimates F: they are whole answers, sampled
        from the softmax whose log p is trained."""
        return self.samples_trained_policy and not OBJECTIVES[self.algorithm.objective].masks_box

    def __post_init__(self) -> None:
        check(is_given(self.run_dir), "run_dir", "a folder for the run (--run-dir DIR)", self.run_dir)
        gathers = self.parallel.overlap_param_gather
        check(
            self.optimizer.distributed or not gathers,
            "parallel.overlap_param_gather",
            "optimizer.distributed with it",
            True,
        )
        check(
            not (self.lora.is_on and gathers),
            "parallel.overlap_param_gather",
            "false with lora.rank, whose parameters are small",
            True,
        )
        check(
            not (self.lora.is_on and self.model.layers == "transformer_engine"),
            "model.layers",
            "torch or auto with lora.rank",
            self.model.layers,
        )
        if OBJECTIVES[self.algorithm.objective].distills:
            self._check_distillation()
        longest, margin = self.rollout.max_new_tokens, self.algorithm.overlong_tokens
        check(
            margin <= longest,
            "algorithm.overlong_tokens",
            f"at most rollout.max_new_tokens = {longest}",
            margin,
        )
        self._check_objective()
        biased = self.training.updates_per_rollout > 1 and OBJECTIVES[self.algorithm.objective].needs_ratio
        reason = f"1 with algorithm.objective {self.algorithm.objective}, which has no importance ratio"
        check(not biased, "training.updates_per_rollout", reason, self.training.updates_per_rollout)
        check(
            self.estimates_f or self.training.keep_best != "f_estimate",
            "training.keep_best",
            "another metric: f_estimate is null unless whole answers are sampled at the trained temperature with "
            "rollout.top_p 1",
            self.training.keep_best,
        )
        bf16 = self.model.dtype == "bfloat16"
        check(
            bf16 or not self.optimizer.precision_aware,
            "optimizer.precision_aware",
            "model.dtype bfloat16 with it",
            True,
        )
        grad_dtype = self.optimizer.grad_dtype
        check(
            bf16 or grad_dtype == "float32",
            "optimizer.grad_dtype",
            "float32 with model.dtype float32",
            grad_dtype,
        )
        tp, engine_tp = self.parallel.tp, self.rollout.tp or self.parallel.tp
        if max(tp, engine_tp) % min(tp, engine_tp):
            legal = ", ".join(
                str(size) for size in range(1, min(2 * tp, 64) + 1) if max(tp, size) % min(tp, size) == 0
            )
            check(
                False,
                "rollout.tp",
                f"a divisor or a multiple of parallel.tp = {tp} ({legal}, ...)",
                engine_tp,
            )

    def _check_objective(self) -> None:
        """Raise `ConfigError` for a number of samples that the objective cannot train."""
        row, rollout = OBJECTIVES[self.algorithm.objective], self.rollout
        chosen = f"with algorithm.objective {row.name}"
        replaceable = row.reward is not None and not row.rewards_are_advantages
        expected = f"nothing {chosen}, which has no reward that a function could replace"
        function = self.algorithm.reward_function
        check(function is None or replaceable, "algorithm.reward_function", expected, function)
        if row.is_offline:
            answers = row.answers_per_record
            expected = f"{answers} {chosen}, the answers of a record in data.path"
            check(rollout.num_samples == answers, "rollout.num_samples", expected, rollout.num_samples)
        name, trained = "rollout.num_samples", rollout.num_samples
        if rollout.num_trained is not None:
            name, trained = "rollout.num_trained", rollout.num_trained
        expected = f"at least {row.min_samples} {chosen}, which compares the samples of a question"
        check(trained >= row.min_samples, name, expected, trained)
        pairs_all = not row.trains_pairs or rollout.num_trained in (None, rollout.num_samples)
        expected = f"nothing {chosen}, which trains one pair of all samples"
        check(pairs_all, "rollout.num_trained", expected, rollout.num_trained)


def check_answers_per_step(config: Config, dp_size: int) -> None:
    """Raise `ConfigError` if a step samples fewer answers than there are data-parallel ranks."""
    questions, samples = config.data.questions_per_step, config.rollout.num_samples
    if questions * samples < dp_size:
        raise ConfigError(
            f"data.questions_per_step: {questions} x rollout.num_samples {samples} = {questions * samples} "
            "answers per step leave "
            f"data-parallel ranks without one; expected at least {dp_size}"
        )
