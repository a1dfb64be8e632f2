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
LOWEST_TEMPERATURE = 0.01  # vLLM raises a temperature between 0 and this to it
TEMPLATES = ("chat", "qwen25-math", "evalchemy", "evalchemy-chat", "none")


class ConfigError(Exception):
    """Bad user input: one line that names the field, file or line. The command line prints it and exits with
    code 2."""


class RunError(RuntimeError):
    """A run that cannot go on: one line that says what happened and what is safe. The command line exits with
    code 1."""


class CollectiveRunError(RunError):
    """A `RunError` that every rank raises, with the same line: rank 0 prints it."""


def check_answers_per_step(config: "Config", dp_size: int) -> None:
    """Raise `ConfigError` where a step samples fewer answers than there are data-parallel ranks to train
    them."""
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
    """Whether a required text is there; `null` of a YAML file arrives as None's name."""
    return bool(text.strip()) and text != "None"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy."""

    path: str
    """Hugging Face folder (config.json, *.safetensors, tokenizer), a hub name, or `embedded:tiny_qwen2`."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the parameters in the forward pass, of trainer and engine alike. bfloat16 keeps fp32 master
    weights."""
    layers: Literal["auto", "transformer_engine", "torch"] = "auto"
    """Layer implementation: TransformerEngine on a GPU in bfloat16 where it imports, else torch SDPA; naming
    TransformerEngine makes its absence an error."""
    fp8: Literal["none", "hybrid", "e4m3"] = "none"
    """Format of the layers' matrix products in training: `hybrid` is e4m3 forward and e5m2 backward.
    TransformerEngine layers on a GPU of compute capability 8.9 or more; weights and the engine stay in
    bfloat16."""
    trust_remote_code: bool = False
    """Let the tokenizer's folder run its own Python code. Off: nothing supplied with a model is executed or
    unpickled."""

    def __post_init__(self) -> None:
        _check(_is_given(self.path), "model.path", "a model folder or hub name", self.path)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Questions and how they become prompts."""

    path: str
    """JSONL file, a hub data set name, or `embedded:train|validation|test`. One object per line, with
    `problem` or `question` and, where evaluated, `answer`."""
    template: str = "chat"
    """Prompt template: `chat` is the model's own chat template; `qwen25-math` adds the system line that asks
    for step-by-step reasoning and \\boxed{}; `evalchemy` is the paper's case-study prompt as plain text,
    `evalchemy-chat` the same as a user's turn of the model's own chat template, which is how Evalchemy asks;
    `none` passes the question as it is; a file ending in .jinja is rendered with `question` and `bos_token`
    and spells out every special token."""
    questions_per_step: int = 8
    """Questions sampled from per step, over all data-parallel ranks (the paper does not state it)."""
    shuffle: bool = True
    """Visit the questions in a new random order each epoch (seeded); off keeps the file's order."""
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
    """Samples per question that are trained, the first of `num_samples`; all of them count for rewards that
    compare the samples of a question. By default all are trained."""
    temperature: float = 0.5
    """Sampling temperature (paper: 0.5), at least 0.01: the engine samples nothing colder."""
    top_p: float = 1.0
    """Nucleus threshold (not stated in the paper; 1.0 = off). Below 1 the samples no longer come from the
    softmax whose log-probabilities are trained, and the trainer-engine comparison is reported as null."""
    max_new_tokens: int = 3072
    """Longest answer in tokens; longer ones are cut and count as truncated (paper: 3072)."""
    max_model_len: int | None = None
    """Longest prompt + answer in tokens; by default the model's context, at most what the data and
    `max_new_tokens` need."""
    max_num_seqs: int = 256
    """Sequences that the engine decodes at once."""
    max_num_batched_tokens: int = 8192
    """Tokens per engine step; raised to `max_model_len` where that is longer."""
    tp: int | None = None
    """Tensor-parallel size of the engines; by default `parallel.tp`. Engines of fewer ranks than the
    trainer's groups sample faster for small models, and hold a copy of their weights that every hot swap
    gathers."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Numbers the engine computes with; by default `model.dtype`. Another type keeps a converted copy of all
    weights."""
    verify_swap: Literal["off", "checksum", "full"] = "checksum"
    """What each hot swap compares between engine and trainer: nothing, that the shared storage is shared and
    checksums of sampled rows, or every element of every parameter against what an export would write (slow;
    for debugging)."""
    kv_cache_gib: float | None = None
    """KV cache in GiB. By default what `max_num_seqs` longest sequences need, on a GPU at most 40 % of what
    is free beside the trainer when the engine is built, on a CPU at most 4 GiB."""
    enforce_eager: bool = False
    """Run the engine without CUDA graphs (slower; for debugging). A CPU always runs eagerly."""
    sleep_level: Literal[0, 1, 2] = 2
    """What the engine frees while training (GPU): 0 nothing, 1 KV cache (weights move to the host), 2 KV
    cache and its own weights. The default is 2: parameters alias the trainer's and the few others are
    rewritten at each swap (docs/hot_swap.md)."""

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
    """RLSC itself (arXiv 2506.06395): weights of the sampled answers and the loss."""

    objective: Annotated[ObjectiveName, tyro.conf.arg(help=describe_objectives())] = "rlsc"
    """What the sampled answers are trained for; the help text is made from the table in objectives.py."""
    alpha: float = 0.1
    """Smoothing added to every weight (paper: 0.1). On answers of hundreds of tokens the confidence
    underflows against it and alpha is the whole weight: watch `alpha_share` in metrics.jsonl."""
    confidence: Confidence = "sequence"
    """`sequence`: p(y|x), the paper's; `length_normalized`: exp(mean log p), no pull to short answers;
    `token`: every token by its own probability; `group_softmax`: softmax of log p over the G answers of a
    question."""
    log_prob_temperature: LogProbTemperature = "sampling"
    """Temperature of the softmax whose log p is trained. `sampling` (Algorithm 1 of the paper) divides the
    logits by `rollout.temperature`: the loss is then the gradient of F for the policy that was sampled, and
    the alpha term has zero expectation (noise). `1.0` trains the untempered policy towards its own
    low-temperature samples: the alpha term sharpens too. `sampling` is the default because it is what the
    paper states and what F is defined on."""
    reduction: Literal["mean", "sum"] = "mean"
    """Mean or sum over the samples of a step (not stated in the paper). AdamW is nearly invariant to it,
    clipping is not."""
    train_end_token: bool = True
    """Count the end-of-text token as part of the answer: the policy is trained to stop where its samples
    stopped."""
    rewards: Literal["boxed", "any"] = "boxed"
    """Which answer objectives with a reward compare: `boxed` the last box, so that they teach the box too;
    `any` the box, else what "the answer is" states, else the last number (as TTRL's own code does)."""
    advantage: Literal["centered", "standardized"] = "centered"
    """Advantage of objectives with a reward: the reward minus the question's mean, or that divided by the
    standard deviation of the question's rewards (as GRPO does). A question whose rewards are all equal trains
    nothing."""
    clip_low: float = 0.2
    """Objectives with a reward, from the second update on: tokens of a negative advantage whose probability
    ratio to the policy that sampled is below 1 - clip_low are not trained (PPO's clipping)."""
    clip_high: float = 0.2
    """The same for tokens of a positive advantage whose ratio is above 1 + clip_high (DAPO uses 0.28)."""
    kl: float = 0.0
    """Objectives with a reward, from the second update on: coefficient of the k3 estimate of the KL
    divergence from the policy that sampled, added to each token's loss."""
    train_truncated: bool = True
    """Train on answers cut at `max_new_tokens` too. They are counted as truncated either way."""

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
    """AdamW on Megatron-Core's optimizer."""

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
    """Largest global gradient norm; 0 turns clipping off (not stated in the paper)."""
    warmup_steps: int = 0
    """Steps of linear warm-up (not stated in the paper)."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up: constant, or decayed to `min_lr` at `training.num_steps`."""
    min_lr: float = 0.0
    """Where the decay ends."""
    distributed: bool = True
    """Shard optimizer states and fp32 master weights over the data-parallel ranks (Megatron's distributed
    optimizer)."""
    precision_aware: bool = False
    """Keep Adam's moments in bfloat16 beside fp32 master weights (TransformerEngine's FusedAdam: a GPU,
    `distributed`)."""
    grad_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type in which gradients are accumulated over micro-batches and summed over the data-parallel
    ranks. bfloat16 halves the memory and the traffic of gradients and rounds every sum (needs `model.dtype`
    bfloat16)."""
    cpu_offload: float = 0.0
    """Share of the parameters whose optimizer state lives in host memory and is updated there (a GPU,
    `distributed`); 0 is none, 1 all."""
    offload_during_rollout: bool = False
    """Move the optimizer's state (moments, fp32 master weights) to page-locked host memory while the engine
    samples, which leaves its place to the KV cache (a GPU). Costs two copies per step; the update stays on
    the GPU."""

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
    """How the model is spread over ranks; data parallel size = world size / (tp x pp)."""

    tp: int = 1
    """Tensor-parallel size of the trainer and, unless `rollout.tp` says otherwise, of the engines; sequence
    parallelism is on for tp > 1."""
    pp: int = 1
    """Pipeline-parallel size of the trainer: stages of consecutive layers, run in Megatron's 1F1B
    schedule. Engines stay tensor-parallel: each holds all layers, and receives those of other stages at
    every hot swap."""
    stage_layers: tuple[int, ...] | None = None
    """Layers of each pipeline stage, first stage first; by default stages of equal work, where the output
    head counts as the layers that cost as much."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over the data-parallel ranks bucket by bucket, while the last micro-batch's backward
    pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters bucket by bucket in the next forward pass (with `overlap_grad_reduce` and
    `optimizer.distributed`). Of use for `training.updates_per_rollout` > 1: before a hot swap all are
    gathered."""
    hang_timeout_s: float = 1200.0
    """Seconds without progress in a phase after which the run is ended by the rank that notices, naming who
    hangs (start-up: four times that). A rank that is gone ends the run after RLSC_DEAD_AFTER_S (60)."""
    bucket_size: int | None = None
    """Parameters per bucket of `overlap_grad_reduce`; by default the larger of 40 million and 1 million per
    rank."""

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
    """Steps, one batch of rollouts each (paper: 10 or 20)."""
    updates_per_rollout: int = 1
    """Optimizer updates on each batch of rollouts (paper: 1), at the step's learning rate. Each sees the
    whole batch with the weights of the policy that sampled it (p_old, from the first pass)."""
    seed: int = 0
    """Seed of everything random: question order and every sampled answer."""
    tokens_per_micro_batch: int = 16384
    """Packed tokens per forward/backward pass. Gradients do not depend on it; a longer sequence gets a pass
    of its own."""
    max_skipped_steps: int = 3
    """Steps in a row whose loss or gradient norm is not finite, and that are skipped, before the run saves
    and stops."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping it: nothing, the MLP of each layer
    (`selective`), or each whole layer (`full`). `rlsc plan` counts what each saves and costs."""
    save_every: int = 5
    """Steps between checkpoints; 0 saves only at the end and when stopped."""
    keep_last: int = 2
    """Checkpoints kept; older ones are deleted after the next is complete."""
    keep_best: Literal["none", "f_estimate", "boxed_share", "effective_samples"] = "none"
    """Keep also the checkpoint whose weights sampled best by this number of metrics.jsonl (none of them is
    accuracy). A checkpoint is judged by the step after it; `checkpoints/best` names it, and `rlsc export` and
    `rlsc eval` take it by `--checkpoint best`."""
    async_save: bool = False
    """Write checkpoints beside the training, from a copy in host memory; `latest` moves when every rank has
    written."""

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
    """Before/after evaluation on held-out questions, with the same engine."""

    path: str | None = None
    """JSONL file (or `embedded:test`) with `answer`; None evaluates nothing."""
    num_samples: int = 4
    """Answers per question at each temperature."""
    temperatures: tuple[float, ...] = (0.5, 1.0)
    """Temperatures sampled at (each at least 0.01), beside one greedy answer."""
    max_questions: int | None = None
    """Use only the first so many questions."""
    grader: Literal["boxed", "lenient", "qwen"] = "boxed"
    """What counts as right: `boxed` the last box; `lenient` also a stated answer or the last number where
    nothing is boxed; `qwen` what the evaluation script of Qwen2.5-Math accepts (relative 1e-4, percentages,
    last number)."""
    top_p: float = 1.0
    """Sample from the most probable tokens whose probabilities sum to this; 1 samples from all."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer, beside the end tokens; the answer is graded without them."""

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
    """Implementation; `auto` takes the fastest that runs on this device, `reference` plain PyTorch. Results
    agree."""

    logits_dtype: Literal["float32", "model"] = "float32"
    """Data type of the logits, in scoring, in the loss and in the engine. `float32`: the head multiplies
    operands of `model.dtype` and does not round the logits. `model`: logits of `model.dtype`; with bfloat16
    the log-probability of a long answer is wrong in its first digits. The engine follows where its vLLM has
    `head_dtype` for generation, otherwise it samples from `model.dtype`."""


@dataclass(frozen=True, kw_only=True)
class ObservabilityConfig:
    """What a run writes beside its checkpoints."""

    tensorboard: bool = True
    """Write the metrics of metrics.jsonl as TensorBoard events too."""
    wandb_project: str | None = None
    """Log the metrics of metrics.jsonl to this Weights & Biases project too (`pip install wandb`;
    WANDB_MODE=offline needs no network). A resumed run goes on in the same one."""
    save_rollouts: bool = True
    """Write every sampled answer to rollouts/step_*.jsonl."""
    max_log_prob_gap: float | None = None
    """Mean |trainer - engine| log-prob per token above which a step counts as mismatched; by default 0.001 in
    float32, 0.4 in bfloat16. Warnings come earlier."""
    max_mismatched_steps: int = 3
    """Mismatched steps in a row after which the run stops, leaving the last checkpoint as it is; 0 only
    warns."""

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
    """Folder of the run: resolved config, metrics.jsonl, checkpoints, rollouts, summary.json."""
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
