"""Declare the configuration: one frozen dataclass per stage, validated field by field. Imports no torch."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from rlsc_mcore.objectives import OBJECTIVES, describe_objectives

LogProbTemperature = Literal["sampling", "1.0"]
Confidence = Literal["sequence", "length_normalized", "token", "group_softmax"]
if TYPE_CHECKING:
    ObjectiveName = str
else:
    ObjectiveName = Literal[tuple(OBJECTIVES)]
LOWEST_TEMPERATURE = 0.01  # vLLM raises any lower temperature above 0 to this value
TEMPLATES = ("chat", "qwen25-math", "evalchemy", "evalchemy-chat", "none")


class ConfigError(Exception):
    """Bad user input: one line that names the field, file or line. The command line prints it and exits with
    code 2."""


class RunError(RuntimeError):
    """A failure during a run: one line that says what happened and which results are safe. The command line
    exits with code 1."""


class CollectiveRunError(RunError):
    """A `RunError` that every rank raises with the same text. Only rank 0 prints it."""


def check_answers_per_step(config: "Config", dp_size: int) -> None:
    """Raise `ConfigError` if a step samples fewer answers than there are data-parallel ranks."""
    questions, samples = config.data.questions_per_step, config.rollout.num_samples
    if questions * samples < dp_size:
        raise ConfigError(
            f"data.questions_per_step: {questions} x rollout.num_samples {samples} = {questions * samples} "
            "answers per step leave "
            f"data-parallel ranks without one; expected at least {dp_size}"
        )


def _check(condition: bool, name: str, expected: str, value: object) -> None:
    if not condition or value == math.inf:
        raise ConfigError(f"{name}: expected {expected}, got {value!r}")


def _is_given(text: str) -> bool:
    """Return whether a required text is set. `null` in a YAML file arrives as the text `None`."""
    return bool(text.strip()) and text != "None"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The trained model."""

    path: str
    """Hugging Face folder (config.json, *.safetensors, tokenizer), a hub name, or `embedded:tiny_qwen2`."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Data type of the parameters in trainer and engine. bfloat16 keeps float32 master weights."""
    layers: Literal["auto", "transformer_engine", "torch"] = "auto"
    """Layer implementation. `auto`: TransformerEngine on a GPU with bfloat16 if it imports, else torch SDPA.
    `transformer_engine`: an error if it is not available."""
    fp8: Literal["none", "hybrid", "e4m3"] = "none"
    """Format of the layers' matrix products in training. `hybrid`: e4m3 forward and e5m2 backward. Needs
    TransformerEngine layers and a GPU of compute capability 8.9 or more. Weights and the engine stay in
    bfloat16."""
    trust_remote_code: bool = False
    """Let the tokenizer's folder run its own Python code. If off, no code of the model folder is executed and
    nothing is unpickled."""

    def __post_init__(self) -> None:
        _check(_is_given(self.path), "model.path", "a model folder or hub name", self.path)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Questions and how they become prompts."""

    path: str
    """JSONL file, a hub data set name, or `embedded:train|validation|test`. One JSON object per line with
    `problem` or `question`, and `answer` if it is evaluated."""
    template: str = "chat"
    """Prompt template. `chat`: the model's own chat template. `qwen25-math`: a system line that requests
    step-by-step reasoning and \\boxed{}. `evalchemy`: the paper's case-study prompt as plain text.
    `evalchemy-chat`: the same text as a user turn of the model's chat template, as in Evalchemy. `none`: the
    question alone. A file ending in .jinja: rendered with `question` and `bos_token`; it must contain every
    special token itself."""
    questions_per_step: int = 8
    """Questions per step, over all data-parallel ranks (the paper does not state it)."""
    shuffle: bool = True
    """Visit the questions in a new seeded random order each epoch. If off, use the order of the file."""
    split: str = "train"
    """Split to read when `path` is a hub data set."""

    def __post_init__(self) -> None:
        _check(_is_given(self.path), "data.path", "a JSONL file or data set name", self.path)
        _check(_is_given(self.split), "data.split", "the name of a split", self.split)
        known = self.template in TEMPLATES or self.template.endswith(".jinja")
        _check(known, "data.template", f"{', '.join(TEMPLATES)} or a file ending in .jinja", self.template)
        _check(self.questions_per_step >= 1, "data.questions_per_step", "at least 1", self.questions_per_step)


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Sampling from the policy with the colocated vLLM engine."""

    num_samples: int = 16
    """G, answers sampled per question (paper: 16)."""
    num_trained: int | None = None
    """Samples per question that are trained: the first of `num_samples`. Rewards that compare the samples of
    a question use all of them. Default: all are trained."""
    temperature: float = 0.5
    """Sampling temperature (paper: 0.5). At least 0.01, the lowest temperature of the engine."""
    top_p: float = 1.0
    """Nucleus sampling threshold (not stated in the paper; 1.0 = off). Below 1, samples do not come from the
    softmax whose log-probabilities are trained, and the trainer-engine comparison is null."""
    max_new_tokens: int = 3072
    """Maximum length of an answer in tokens (paper: 3072). Longer answers are cut and count as truncated."""
    max_model_len: int | None = None
    """Maximum length of prompt + answer in tokens. Default: the model's context, at most what the data and
    `max_new_tokens` need."""
    max_num_seqs: int = 256
    """Maximum number of sequences that the engine decodes at once."""
    max_num_batched_tokens: int = 8192
    """Maximum number of tokens per engine step. Raised to `max_model_len` if that is larger."""
    tp: int | None = None
    """Tensor-parallel size of the engines; default: `parallel.tp`. Engines with fewer ranks than the trainer
    sample faster for small models. They hold their own copy of the weights, which every hot swap gathers."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Data type of the engine; default: `model.dtype`. A different type needs a converted copy of all
    weights."""
    verify_swap: Literal["off", "checksum", "full"] = "checksum"
    """Verification of each hot swap. `off`: none. `checksum`: check that shared storage is shared, and
    compare checksums of sampled rows. `full`: compare every element of every parameter with its exported
    value (slow; for debugging)."""
    kv_cache_gib: float | None = None
    """Size of the KV cache in GiB. Default: room for `max_num_seqs` sequences of the maximum length; at most
    40 % of the GPU memory that is free beside the trainer when the engine is built, or 4 GiB on a CPU."""
    enforce_eager: bool = False
    """Run the engine without CUDA graphs (slower; for debugging). A CPU always runs eagerly."""
    sleep_level: Literal[0, 1, 2] = 2
    """Memory that the engine frees while training (GPU). 0: nothing. 1: the KV cache; weights move to the
    host. 2: the KV cache and the engine's own weights. At level 2, parameters that alias the trainer's stay,
    and each swap rewrites the others (docs/hot_swap.md)."""

    def __post_init__(self) -> None:
        _check(self.num_samples >= 1, "rollout.num_samples", "at least 1", self.num_samples)
        in_range = self.num_trained is None or 1 <= self.num_trained <= self.num_samples
        _check(
            in_range,
            "rollout.num_trained",
            f"between 1 and rollout.num_samples = {self.num_samples}",
            self.num_trained,
        )
        coldest = f"at least {LOWEST_TEMPERATURE:g} (the engine samples nothing colder)"
        _check(self.temperature >= LOWEST_TEMPERATURE, "rollout.temperature", coldest, self.temperature)
        _check(0 < self.top_p <= 1, "rollout.top_p", "in (0, 1]", self.top_p)
        _check(self.max_new_tokens >= 1, "rollout.max_new_tokens", "at least 1", self.max_new_tokens)
        _check(
            self.max_model_len is None or self.max_model_len >= 2,
            "rollout.max_model_len",
            "at least 2",
            self.max_model_len,
        )
        _check(self.max_num_seqs >= 1, "rollout.max_num_seqs", "at least 1", self.max_num_seqs)
        _check(
            self.max_num_batched_tokens >= 1,
            "rollout.max_num_batched_tokens",
            "at least 1",
            self.max_num_batched_tokens,
        )
        _check(self.tp is None or self.tp >= 1, "rollout.tp", "at least 1", self.tp)
        _check(
            self.kv_cache_gib is None or self.kv_cache_gib > 0,
            "rollout.kv_cache_gib",
            "more than 0",
            self.kv_cache_gib,
        )


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """RLSC (arXiv 2506.06395): weights of the sampled answers, and the loss."""

    objective: Annotated[ObjectiveName, tyro.conf.arg(help=describe_objectives())] = "rlsc"
    """Training objective. The help text comes from the table in objectives.py."""
    alpha: float = 0.1
    """Constant added to every weight (paper: 0.1). For answers of hundreds of tokens the confidence is tiny
    compared with it, so the weight is alpha alone; see `alpha_share` in metrics.jsonl."""
    confidence: Confidence = "sequence"
    """Confidence of an answer. `sequence`: p(y|x), as in the paper. `length_normalized`: exp(mean log p),
    which does not favor short answers. `token`: each token by its own probability. `group_softmax`: softmax
    of log p over the G answers of a question."""
    log_prob_temperature: LogProbTemperature = "sampling"
    """Temperature of the softmax whose log p is trained. `sampling` (default; Algorithm 1 of the paper):
    divide the logits by `rollout.temperature`. The loss is then the gradient of F of the sampled policy, and
    the alpha term has zero expectation. `1.0`: train the untempered policy toward its own low-temperature
    samples; the alpha term then sharpens too."""
    reduction: Literal["mean", "sum"] = "mean"
    """Mean or sum over the samples of a step (not stated in the paper). AdamW is nearly invariant to this
    choice; gradient clipping is not."""
    train_end_token: bool = True
    """Train the end-of-text token as part of the answer."""
    rewards: Literal["boxed", "any"] = "boxed"
    """Answer that objectives with a reward compare. `boxed`: the last box, so the box is trained too. `any`:
    the box, else the answer after "the answer is", else the last number (as in TTRL's code)."""
    advantage: Literal["centered", "standardized"] = "centered"
    """Advantage of objectives with a reward. `centered`: the reward minus the question's mean reward.
    `standardized`: that difference divided by the standard deviation of the question's rewards (as in GRPO).
    A question whose rewards are all equal has advantage 0."""
    clip_low: float = 0.2
    """Lower clipping range (PPO), for objectives with a reward from the second update on. Tokens with a
    negative advantage are not trained if their probability ratio to the policy that sampled is below 1 -
    clip_low."""
    clip_high: float = 0.2
    """Upper clipping range. Tokens with a positive advantage are not trained if their probability ratio is
    above 1 + clip_high (DAPO uses 0.28)."""
    kl: float = 0.0
    """Coefficient of the KL divergence from the policy that sampled (k3 estimate), added to each token's
    loss. For objectives with a reward, from the second update on."""
    train_truncated: bool = True
    """Train on answers that were cut at `max_new_tokens`. They count as truncated in either case."""

    def __post_init__(self) -> None:
        _check(self.alpha >= 0, "algorithm.alpha", "at least 0", self.alpha)
        _check(0 < self.clip_low <= 1, "algorithm.clip_low", "in (0, 1]", self.clip_low)
        _check(self.clip_high > 0, "algorithm.clip_high", "more than 0", self.clip_high)
        _check(self.kl >= 0, "algorithm.kl", "at least 0", self.kl)
        dealt = self.objective != "rlsc_shuffled" or self.confidence == "sequence"
        _check(
            dealt, "algorithm.confidence", "sequence with algorithm.objective rlsc_shuffled", self.confidence
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, run by Megatron-Core's optimizer."""

    lr: float = 1e-5
    """Peak learning rate (paper: 1e-5)."""
    beta1: float = 0.9
    """AdamW beta 1 (not stated in the paper; torch's default)."""
    beta2: float = 0.999
    """AdamW beta 2 (not stated in the paper; torch's default)."""
    eps: float = 1e-8
    """AdamW epsilon."""
    weight_decay: float = 0.01
    """Decoupled weight decay ("standard" in the paper; torch's AdamW default). Biases and norms are not
    decayed."""
    clip_grad: float = 1.0
    """Maximum global gradient norm; 0 turns clipping off (not stated in the paper)."""
    warmup_steps: int = 0
    """Steps of linear warm-up (not stated in the paper)."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up: constant, or decayed until `training.num_steps` to `min_lr`."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    distributed: bool = True
    """Shard optimizer states and float32 master weights over the data-parallel ranks (Megatron's distributed
    optimizer)."""
    precision_aware: bool = False
    """Store Adam's moments in bfloat16, with float32 master weights (TransformerEngine's FusedAdam). Needs a
    GPU and `distributed`."""
    grad_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type in which gradients are accumulated over micro-batches and reduced over the data-parallel
    ranks. bfloat16 halves gradient memory and traffic, rounds every sum, and needs `model.dtype` bfloat16."""
    cpu_offload: float = 0.0
    """Fraction of the parameters whose optimizer state is kept and updated in host memory: 0 none, 1 all.
    Needs a GPU and `distributed`."""
    offload_during_rollout: bool = False
    """Offload the optimizer state (moments, float32 master weights) to page-locked host memory while the
    engine samples. The freed GPU memory is available to the KV cache. Needs a GPU and costs two copies per
    step; the update runs on the GPU."""

    def __post_init__(self) -> None:
        _check(self.lr > 0, "optimizer.lr", "more than 0", self.lr)
        _check(0 <= self.beta1 < 1, "optimizer.beta1", "in [0, 1)", self.beta1)
        _check(0 <= self.beta2 < 1, "optimizer.beta2", "in [0, 1)", self.beta2)
        _check(self.eps > 0, "optimizer.eps", "more than 0", self.eps)
        _check(self.weight_decay >= 0, "optimizer.weight_decay", "at least 0", self.weight_decay)
        _check(self.clip_grad >= 0, "optimizer.clip_grad", "at least 0", self.clip_grad)
        _check(self.warmup_steps >= 0, "optimizer.warmup_steps", "at least 0", self.warmup_steps)
        _check(0 <= self.min_lr <= self.lr, "optimizer.min_lr", "between 0 and optimizer.lr", self.min_lr)
        _check(0 <= self.cpu_offload <= 1, "optimizer.cpu_offload", "in [0, 1]", self.cpu_offload)
        _check(
            self.distributed or not self.precision_aware,
            "optimizer.precision_aware",
            "optimizer.distributed with it",
            True,
        )
        _check(
            self.distributed or not self.cpu_offload,
            "optimizer.cpu_offload",
            "0 without optimizer.distributed",
            self.cpu_offload,
        )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Parallel layout; data-parallel size = world size / (tp x pp)."""

    tp: int = 1
    """Tensor-parallel size of the trainer, and of the engines unless `rollout.tp` is set. Sequence
    parallelism is on for tp > 1."""
    pp: int = 1
    """Pipeline-parallel size of the trainer: stages of consecutive layers, run in Megatron's 1F1B schedule.
    Each engine stays tensor-parallel and holds all layers; every hot swap sends it the layers of the other
    stages."""
    stage_layers: tuple[int, ...] | None = None
    """Number of layers of each pipeline stage, first stage first. Default: stages of equal estimated cost,
    including the output head."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over the data-parallel ranks bucket by bucket, during the backward pass of the last
    micro-batch."""
    overlap_param_gather: bool = False
    """All-gather updated parameters bucket by bucket during the next forward pass. Needs
    `overlap_grad_reduce` and `optimizer.distributed`. Helps only if `training.updates_per_rollout` > 1,
    because all parameters are gathered before a hot swap."""
    hang_timeout_s: float = 1200.0
    """Seconds without progress in a phase after which a rank counts as hung (start-up: four times as long).
    The rank that detects it reports which rank hangs and stops the run. A dead rank stops the run after
    RLSC_DEAD_AFTER_S seconds (default 60)."""
    bucket_size: int | None = None
    """Parameters per bucket of `overlap_grad_reduce`. Default: 40 million, or 1 million per rank if that is
    more."""

    def __post_init__(self) -> None:
        _check(self.tp >= 1, "parallel.tp", "at least 1", self.tp)
        _check(self.pp >= 1, "parallel.pp", "at least 1", self.pp)
        layers = self.stage_layers
        fits = layers is None or (len(layers) == self.pp and min(layers) >= 1)
        _check(fits, "parallel.stage_layers", f"parallel.pp = {self.pp} numbers, each at least 1", layers)
        _check(self.hang_timeout_s > 0, "parallel.hang_timeout_s", "more than 0", self.hang_timeout_s)
        _check(
            self.bucket_size is None or self.bucket_size >= 1,
            "parallel.bucket_size",
            "at least 1",
            self.bucket_size,
        )
        needed = self.overlap_grad_reduce or not self.overlap_param_gather
        _check(needed, "parallel.overlap_param_gather", "parallel.overlap_grad_reduce with it", True)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The training loop."""

    num_steps: int = 10
    """Number of steps, one batch of rollouts each (paper: 10 or 20)."""
    updates_per_rollout: int = 1
    """Optimizer updates on each batch of rollouts (paper: 1), at the step's learning rate. Each update uses
    the whole batch, with the weights from the policy that sampled it (p_old, from the first pass)."""
    seed: int = 0
    """Random seed of the question order and of every sampled answer."""
    tokens_per_micro_batch: int = 16384
    """Maximum number of packed tokens per forward/backward pass. A longer sequence gets its own pass.
    Gradients do not depend on it."""
    max_skipped_steps: int = 3
    """Save and stop the run after this many skipped steps in a row. A step is skipped if its loss or gradient
    norm is not finite."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass recomputes: none, the MLP of each layer (`selective`), or every
    whole layer (`full`). `rlsc plan` shows the memory and time of each."""
    save_every: int = 5
    """Steps between checkpoints. 0: save only at the end and when the run is stopped."""
    keep_last: int = 2
    """Number of checkpoints to keep. Older ones are deleted when the next one is complete."""
    keep_best: Literal["none", "f_estimate", "boxed_share", "effective_samples"] = "none"
    """Also keep the checkpoint with the highest value of this metric of metrics.jsonl; none of the metrics is
    accuracy. The step after a checkpoint measures it. `checkpoints/best` names it; select it in `rlsc export`
    and `rlsc eval` with `--checkpoint best`."""
    async_save: bool = False
    """Write checkpoints asynchronously, from a copy in host memory. `latest` changes when every rank has
    written its part."""

    def __post_init__(self) -> None:
        _check(self.num_steps >= 1, "training.num_steps", "at least 1", self.num_steps)
        _check(
            self.updates_per_rollout >= 1,
            "training.updates_per_rollout",
            "at least 1",
            self.updates_per_rollout,
        )
        _check(self.seed >= 0, "training.seed", "at least 0", self.seed)
        _check(
            self.tokens_per_micro_batch >= 1,
            "training.tokens_per_micro_batch",
            "at least 1",
            self.tokens_per_micro_batch,
        )
        _check(
            self.max_skipped_steps >= 1, "training.max_skipped_steps", "at least 1", self.max_skipped_steps
        )
        _check(self.save_every >= 0, "training.save_every", "at least 0", self.save_every)
        _check(self.keep_last >= 1, "training.keep_last", "at least 1", self.keep_last)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation on held-out questions before and after training, with the same engine."""

    path: str | None = None
    """JSONL file with `answer`, or `embedded:test`. None: no evaluation."""
    num_samples: int = 4
    """Answers per question at each temperature."""
    temperatures: tuple[float, ...] = (0.5, 1.0)
    """Sampling temperatures, each at least 0.01. One greedy answer is added."""
    max_questions: int | None = None
    """Evaluate only this many questions, from the start of the file."""
    grader: Literal["boxed", "lenient", "qwen"] = "boxed"
    """Grading rule. `boxed`: the last box. `lenient`: if nothing is boxed, a stated answer or the last
    number. `qwen`: the rules of Qwen2.5-Math's evaluation script (relative tolerance 1e-4, percentages, last
    number)."""
    top_p: float = 1.0
    """Nucleus sampling threshold; 1 samples from all tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer, in addition to the end tokens. They are removed before grading."""

    def __post_init__(self) -> None:
        _check(0 < self.top_p <= 1, "evaluation.top_p", "more than 0 and at most 1", self.top_p)
        _check(all(self.stop), "evaluation.stop", "strings that are not empty", self.stop)
        _check(self.num_samples >= 1, "evaluation.num_samples", "at least 1", self.num_samples)
        warm = all(LOWEST_TEMPERATURE <= t < math.inf for t in self.temperatures)
        coldest = f"each at least {LOWEST_TEMPERATURE:g} (a greedy answer is given beside them)"
        _check(warm, "evaluation.temperatures", coldest, self.temperatures)
        differ = len(set(self.temperatures)) == len(self.temperatures)
        _check(differ, "evaluation.temperatures", "different ones", self.temperatures)
        _check(
            self.max_questions is None or self.max_questions >= 1,
            "evaluation.max_questions",
            "at least 1",
            self.max_questions,
        )


@dataclass(frozen=True, kw_only=True)
class OpsConfig:
    """Kernels of the log-prob reduction and the weighted cross-entropy."""

    backend: Literal["auto", "reference", "cpp", "triton", "cuda"] = "auto"
    """Kernel implementation. `auto`: the fastest available on this device. `reference`: plain PyTorch. The
    results agree."""

    logits_dtype: Literal["float32", "model"] = "float32"
    """Data type of the logits in scoring, in the loss and in the engine. `float32`: the head multiplies
    operands of `model.dtype` and does not round the logits. `model`: logits of `model.dtype`; in bfloat16 the
    log-probability of a long answer is wrong in its first digits. The engine uses the same type if its vLLM
    supports `head_dtype` for generation, else `model.dtype`."""


@dataclass(frozen=True, kw_only=True)
class ObservabilityConfig:
    """Files and reports of a run, except checkpoints."""

    tensorboard: bool = True
    """Also write the metrics of metrics.jsonl as TensorBoard events."""
    wandb_project: str | None = None
    """Also log the metrics of metrics.jsonl to this Weights & Biases project (`pip install wandb`;
    WANDB_MODE=offline needs no network). A resumed run continues the same W&B run."""
    save_rollouts: bool = True
    """Write every sampled answer to rollouts/step_*.jsonl."""
    max_log_prob_gap: float | None = None
    """Threshold of the mean |trainer - engine| log-prob per token. A step above it counts as mismatched.
    Default: 0.001 in float32, 0.4 in bfloat16. Warnings start below it."""
    max_mismatched_steps: int = 3
    """Stop the run after this many mismatched steps in a row; the last checkpoint is not changed. 0: only
    warn."""

    def __post_init__(self) -> None:
        gap = self.max_log_prob_gap
        _check(gap is None or gap > 0, "observability.max_log_prob_gap", "more than 0", gap)
        _check(
            self.max_mismatched_steps >= 0,
            "observability.max_mismatched_steps",
            "at least 0",
            self.max_mismatched_steps,
        )


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run of `rlsc train`."""

    run_dir: str
    """Directory of the run: resolved config, metrics.jsonl, checkpoints, rollouts, summary.json."""
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    ops: OpsConfig = field(default_factory=OpsConfig)
    observability: ObservabilityConfig = field(default_factory=ObservabilityConfig)

    def __post_init__(self) -> None:
        _check(_is_given(self.run_dir), "run_dir", "a folder for the run (--run-dir DIR)", self.run_dir)
        gathers = self.parallel.overlap_param_gather
        _check(
            self.optimizer.distributed or not gathers,
            "parallel.overlap_param_gather",
            "optimizer.distributed with it",
            True,
        )
        biased = self.training.updates_per_rollout > 1 and OBJECTIVES[self.algorithm.objective].needs_ratio
        reason = f"1 with algorithm.objective {self.algorithm.objective}, which has no importance ratio"
        _check(not biased, "training.updates_per_rollout", reason, self.training.updates_per_rollout)
        bf16 = self.model.dtype == "bfloat16"
        _check(
            bf16 or not self.optimizer.precision_aware,
            "optimizer.precision_aware",
            "model.dtype bfloat16 with it",
            True,
        )
        grad_dtype = self.optimizer.grad_dtype
        _check(
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
            _check(
                False,
                "rollout.tp",
                f"a divisor or a multiple of parallel.tp = {tp} ({legal}, ...)",
                engine_tp,
            )
