"""Options of the questions, of the engine that samples answers, and of the evaluation."""

import math
from dataclasses import dataclass
from typing import Literal

from rlsc_mcore.config.errors import check, is_given

LOWEST_TEMPERATURE = 0.01  # vLLM raises any lower temperature above 0 to this value
TEMPLATES = ("chat", "qwen25-math", "evalchemy", "evalchemy-chat", "none")


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
        check(is_given(self.path), "data.path", "a JSONL file or data set name", self.path)
        check(is_given(self.split), "data.split", "the name of a split", self.split)
        known = self.template in TEMPLATES or self.template.endswith(".jinja")
        check(known, "data.template", f"{', '.join(TEMPLATES)} or a file ending in .jinja", self.template)
        check(self.questions_per_step >= 1, "data.questions_per_step", "at least 1", self.questions_per_step)


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
    cpu_products: Literal["auto", "blas", "onednn", "packed"] = "auto"
    """Library of the engine's float32 matrix products on a CPU. `blas`: torch's. `onednn`: oneDNN with the
    shared weights. `packed`: oneDNN with a second copy of the weights in its own layout, made again after
    each update. `auto`: the fastest, measured with the shapes of the model when the run starts."""
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
        check(self.num_samples >= 1, "rollout.num_samples", "at least 1", self.num_samples)
        in_range = self.num_trained is None or 1 <= self.num_trained <= self.num_samples
        check(
            in_range,
            "rollout.num_trained",
            f"between 1 and rollout.num_samples = {self.num_samples}",
            self.num_trained,
        )
        coldest = f"at least {LOWEST_TEMPERATURE:g} (the engine samples nothing colder)"
        check(self.temperature >= LOWEST_TEMPERATURE, "rollout.temperature", coldest, self.temperature)
        check(0 < self.top_p <= 1, "rollout.top_p", "in (0, 1]", self.top_p)
        check(self.max_new_tokens >= 1, "rollout.max_new_tokens", "at least 1", self.max_new_tokens)
        check(
            self.max_model_len is None or self.max_model_len >= 2,
            "rollout.max_model_len",
            "at least 2",
            self.max_model_len,
        )
        check(self.max_num_seqs >= 1, "rollout.max_num_seqs", "at least 1", self.max_num_seqs)
        check(
            self.max_num_batched_tokens >= 1,
            "rollout.max_num_batched_tokens",
            "at least 1",
            self.max_num_batched_tokens,
        )
        check(self.tp is None or self.tp >= 1, "rollout.tp", "at least 1", self.tp)
        check(
            self.kv_cache_gib is None or self.kv_cache_gib > 0,
            "rollout.kv_cache_gib",
            "more than 0",
            self.kv_cache_gib,
        )


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
        check(0 < self.top_p <= 1, "evaluation.top_p", "more than 0 and at most 1", self.top_p)
        check(all(self.stop), "evaluation.stop", "strings that are not empty", self.stop)
        check(self.num_samples >= 1, "evaluation.num_samples", "at least 1", self.num_samples)
        warm = all(LOWEST_TEMPERATURE <= t < math.inf for t in self.temperatures)
        coldest = f"each at least {LOWEST_TEMPERATURE:g} (a greedy answer is given beside them)"
        check(warm, "evaluation.temperatures", coldest, self.temperatures)
        differ = len(set(self.temperatures)) == len(self.temperatures)
        check(differ, "evaluation.temperatures", "different ones", self.temperatures)
        check(
            self.max_questions is None or self.max_questions >= 1,
            "evaluation.max_questions",
            "at least 1",
            self.max_questions,
        )
