"""Options of the training objective."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from rlsc_mcore.config.errors import check
from rlsc_mcore.objectives import OBJECTIVES, describe_objectives

LogProbTemperature = Literal["sampling", "1.0"]
Confidence = Literal["sequence", "length_normalized", "token", "group_softmax"]
if TYPE_CHECKING:
    ObjectiveName = str
else:
    ObjectiveName = Literal[tuple(OBJECTIVES)]


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
    reward_function: str | None = None
    """`file.py:function`: a function (response, question, answer) -> number that replaces the reward of an
    objective with one (`grpo`, `rlvr`, `majority_vote`, ...). It runs in worker processes with 5 s of CPU
    time per answer and 2 GiB of memory; an answer beyond a limit gets reward 0."""
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
    kl_start: float = 0.0
    """Coefficient of the KL divergence from the weights that training started with (k3 estimate), added to
    each token's loss, for objectives with a reward. Costs one forward pass per step, and without LoRA a
    second copy of the weights."""
    overlong_tokens: int = 0
    """Soft penalty for long answers (DAPO), for objectives with a reward. Within the last `overlong_tokens`
    tokens before `rollout.max_new_tokens` the reward falls linearly by 1; a cut answer loses 1. 0: off."""
    drop_groups: bool = False
    """Leave out questions whose advantages are all 0 (DAPO's dynamic sampling, without sampling again): they
    cost no training, and the loss is averaged over the other samples. For objectives with a reward."""
    nsd_kl: float = 0.01
    """Coefficient of the KL term that holds `nsd` at the starting weights."""
    careless_prompt: str = "You are a careless student who guesses and makes mistakes. {question}"
    """Question of `nsd` that asks for a careless answer, rendered with `data.template`. It must contain
    `{question}`."""
    dpo_beta: float = 0.1
    """Beta of `dpo` and `scpo`: how strongly the policy is held to its reference."""
    dpo_nll: float = 0.0
    """Coefficient of -log p of the chosen answer, per token, in `dpo` and `scpo` (ScPO: 1)."""
    train_truncated: bool | None = None
    """Train on answers that were cut at `max_new_tokens`. They count as truncated in either case. Default:
    on, but off for `rlsc` with `confidence` `length_normalized` or `token`, where a repetition loop that was
    cut has nearly the largest weight."""

    def __post_init__(self) -> None:
        check(self.alpha >= 0, "algorithm.alpha", "at least 0", self.alpha)
        check(0 < self.clip_low <= 1, "algorithm.clip_low", "in (0, 1]", self.clip_low)
        check(self.clip_high > 0, "algorithm.clip_high", "more than 0", self.clip_high)
        check(self.kl >= 0, "algorithm.kl", "at least 0", self.kl)
        check(self.kl_start >= 0, "algorithm.kl_start", "at least 0", self.kl_start)
        check(self.overlong_tokens >= 0, "algorithm.overlong_tokens", "at least 0", self.overlong_tokens)
        check(self.nsd_kl >= 0, "algorithm.nsd_kl", "at least 0", self.nsd_kl)
        placed = "{question}" in self.careless_prompt
        check(placed, "algorithm.careless_prompt", "a text with {question}", self.careless_prompt)
        row = OBJECTIVES[self.objective]
        rewarded = f"0 with algorithm.objective {self.objective}, which has no reward"
        check(
            not self.overlong_tokens or row.reward is not None,
            "algorithm.overlong_tokens",
            rewarded,
            self.overlong_tokens,
        )
        check(
            not self.drop_groups or row.reward is not None,
            "algorithm.drop_groups",
            f"false with algorithm.objective {self.objective}, which has no reward",
            self.drop_groups,
        )
        check(not self.kl_start or row.has_advantages, "algorithm.kl_start", rewarded, self.kl_start)
        check(self.dpo_beta > 0, "algorithm.dpo_beta", "more than 0", self.dpo_beta)
        check(self.dpo_nll >= 0, "algorithm.dpo_nll", "at least 0", self.dpo_nll)
        dealt = self.objective != "rlsc_shuffled" or self.confidence == "sequence"
        check(
            dealt, "algorithm.confidence", "sequence with algorithm.objective rlsc_shuffled", self.confidence
        )


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Teacher and loss of `algorithm.objective self_distill`; other objectives ignore them."""

    teacher: Literal["current", "start"] = "current"
    """Weights of the teacher. `current`: the policy's (U-OPSD). `start`: those before training (CANON),
    which need one more copy of the weights without LoRA."""
    context: Literal["longest", "most_likely"] = "longest"
    """Sample of the most frequent answer that the teacher sees. `longest` (U-OPSD), or the one with the
    highest mean log p (`most_likely`, CANON)."""
    tokens: Literal["disagreeing", "agreeing", "all"] = "disagreeing"
    """Samples whose tokens are distilled: those with another answer or none (U-OPSD), those with the most
    frequent answer (TTPO), or all (CANON)."""
    divergence: Literal["forward_kl", "jsd"] = "forward_kl"
    """Divergence of the policy from the teacher at each token, over the full vocabulary: KL(teacher ||
    policy), or the Jensen-Shannon divergence with equal parts."""
    min_share: float = 0.5
    """Train a question only if at least this fraction of its samples has the most frequent answer (U-OPSD's
    tau: 0.5). Questions on whose answer all samples agree are not trained."""
    clip: float = 10.0
    """Maximum divergence of a token. Tokens above it have no gradient."""
    penalty: float = 0.0
    """Penalty for confident disagreeing samples (TTPO): their log p is lowered with this factor times the
    fraction of the most frequent answer. Confident means a mean log p of at least the question's mean."""
    prompt: str = "{question}\n\nHere is a solution of this problem:\n{solution}\n\nRead it, then solve the problem again."
    """Question that the teacher is asked, rendered with `data.template`. It must contain `{question}` and
    `{solution}`, which stands for the sample that the teacher sees."""

    def __post_init__(self) -> None:
        check(0 <= self.min_share <= 1, "distill.min_share", "between 0 and 1", self.min_share)
        check(self.clip > 0, "distill.clip", "more than 0", self.clip)
        check(self.penalty >= 0, "distill.penalty", "at least 0", self.penalty)
        placed = "{question}" in self.prompt and "{solution}" in self.prompt
        check(placed, "distill.prompt", "a text with {question} and {solution}", self.prompt)
        twice = self.tokens == "agreeing" or not self.penalty
        check(twice, "distill.penalty", "0 unless distill.tokens is agreeing", self.penalty)
