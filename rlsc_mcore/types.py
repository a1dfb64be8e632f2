"""Values passed between stages: small frozen dataclasses with tensor shapes in the field comments.

Shape suffixes: T packed tokens of one micro-batch, S its sequences, G samples of one question.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch


def over_tokens(values_S: torch.Tensor, cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Repeat the value of each sequence for its tokens: [S], int32 [S + 1] -> [num_tokens], without a host
    synchronization."""
    return torch.repeat_interleave(values_S, cu_seqlens.diff().long(), output_size=num_tokens)


@dataclass(frozen=True)
class Question:
    """One line of a question file."""

    index: int  # position in its file, from 0; identifies the question in rollouts and metrics
    text: str
    answer: str | None  # gold answer, reduced to its final value ("#### 18" -> "18"); None if absent
    answer_format: Literal["math", "choice"] = "math"  # choice: the answer is a letter
    tolerance: float | None = None  # numbers that differ by at most this count as equal
    family: str = (
        ""  # kind of question, from the field `family` of its record; scores are also shown by family
    )


@dataclass(frozen=True)
class Rollout:
    """One sampled answer."""

    question_index: int
    sample_index: int  # 0 .. G-1 within its question
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]  # includes the end-of-text token if one was sampled
    engine_log_probs: tuple[float, ...]  # one per response id, at the trained temperature
    finish_reason: Literal["stop", "length"]
    policy_version: int  # number of hot swaps before it was sampled
    text: str = ""  # decoded response without special tokens


@dataclass(frozen=True)
class OfflineAnswer:
    """One answer of an offline file."""

    text: str
    advantage: float  # 1 chosen, -1 rejected, or the reward of the file
    place: str  # field, file and line, for error messages


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: whole sequences concatenated along the token dimension (thd layout).

    Position t of a sequence predicts its token t + 1. `target_ids[t]` is that token, and `response_mask[t]`
    is True if it belongs to the trained answer. The first answer token is therefore at position prompt_length
    - 1.
    """

    token_ids: torch.Tensor  # int64 [T]
    target_ids: torch.Tensor  # int64 [T], 0 at the last position of a sequence and in padding
    response_mask: torch.Tensor  # bool [T]
    engine_log_probs: torch.Tensor  # float32 [T], 0 outside the response mask
    cu_seqlens: torch.Tensor  # int32 [S + 1]; the last segment may be padding (multiplicity 0)
    sequence_lengths: tuple[int, ...]  # [S], lengths of the segments, on the host
    trained_lengths: tuple[int, ...]  # [S], trained tokens per sequence, on the host
    multiplicity: torch.Tensor  # float64 [S], number of identical rollouts; 0 for padding
    advantages: torch.Tensor  # float64 [S], advantage of an objective with a reward, else 0
    group_ids: torch.Tensor  # int64 [S], index of the question in the step; -1 for padding
    sequence_ids: torch.Tensor  # int64 [S], index into the step's unique sequences; -1 for padding
    teacher: "PackedBatch | None" = None  # distilled sequences after their teacher's prompts, same order

    @property
    def num_tokens(self) -> int:
        """Tokens of all forward passes over the batch, those of the teacher included."""
        return len(self.token_ids) + (0 if self.teacher is None else len(self.teacher.token_ids))

    @property
    def distilled_mask(self) -> torch.Tensor:
        """Trained tokens of the sequences with a positive advantage, bool [T]: those of `teacher`."""
        return self.response_mask & over_tokens(self.advantages > 0, self.cu_seqlens, len(self.token_ids))

    @property
    def max_seqlen(self) -> int:
        return max(self.sequence_lengths)

    def to(self, device: torch.device) -> "PackedBatch":
        """Return the batch with its tensors on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        if self.teacher is not None:
            moved["teacher"] = self.teacher.to(device)
        return replace(self, **moved)


@dataclass(frozen=True)
class UniqueSequence:
    """One distinct (question, answer) pair with all its samples. Identical answers share one forward pass;
    their weights are added."""

    rollout: Rollout
    group: int  # index of the question in the step, from 0
    multiplicity: int
    trained: tuple[bool, ...]  # one per response token
    advantage: float = 0.0  # of an objective with a reward, else 0
    teacher_prompt: tuple[int, ...] = ()  # token ids of the teacher's prompt for the question; may be empty


@dataclass(frozen=True)
class SequenceScores:
    """Scores of a step's sequences, on the host, in packing order. Sequences without trained tokens are left
    out."""

    sequence_ids: torch.Tensor  # int64 [S]
    multiplicity: torch.Tensor  # float64 [S]
    log_probs: torch.Tensor  # float64 [S], log p_old at the trained temperature
    weights: torch.Tensor  # float64 [S], weight of one sample (RLSC: confidence + alpha)
    num_tokens: torch.Tensor  # float64 [S], trained tokens
    gap_sums: torch.Tensor  # float64 [S], sum over tokens of trainer - engine log-prob, signed
    token_gaps: torch.Tensor  # float32 [trained tokens], |trainer - engine| log-prob of each
    start_kl_sums: torch.Tensor  # float64 [S], the tokens' k3 estimates of KL(p || start), summed; else 0

    @property
    def gap_max(self) -> float:
        """The largest difference of a token's log-prob; 0 without tokens."""
        return float(self.token_gaps.max()) if len(self.token_gaps) else 0.0


@dataclass(frozen=True)
class Update:
    """One optimizer update; loss and norm are global."""

    loss: float  # computed before the update
    grad_norm: float
    updated: bool  # False if the update was skipped because loss or gradient norm was not finite


@dataclass(frozen=True)
class StepOutcome:
    """Result of one step on this data-parallel rank; losses, norms and lr are global values."""

    updates: tuple[Update, ...]  # `training.updates_per_rollout` entries; fewer if one was skipped
    lr: float
    scores: SequenceScores  # of the first pass, by the policy that sampled
    num_tokens: int  # tokens in all forward passes, including prompts and padding

    @property
    def loss(self) -> float:
        """The loss of the first update, with the policy that sampled."""
        return self.updates[0].loss

    @property
    def grad_norm(self) -> float:
        """The gradient norm of the first update, with the policy that sampled."""
        return self.updates[0].grad_norm

    @property
    def updated(self) -> bool:
        """False if an update was skipped."""
        return all(update.updated for update in self.updates)


@dataclass(frozen=True)
class Exchange:
    """Hold the sequences that this rank trains, and statistics of the exchange."""

    sequences: list[UniqueSequence]
    num_sequences: int  # distinct sequences that are trained, over all ranks
    num_distinct: int  # distinct sequences that were sampled
    num_tokens: int  # tokens of the trained sequences, prompts included
    num_tokens_unmerged: int  # the same without merging identical answers
    num_dropped: int  # answers to questions without signal, left out of training and of the loss's mean
    moved_share: float  # fraction of the sequences that change their data-parallel rank
    imbalance_sampled: float  # max / mean - 1 of the ranks' FLOPs, before sequences move
    imbalance: float  # the same, after sequences moved
    engine_imbalance: float  # max / mean - 1 of the engines' sampled tokens


@dataclass(frozen=True)
class StepResult:
    """What `Session.train` hands to `Session.record`."""

    policy_version: int  # of the weights that sampled the step's rollouts
    exchange: Exchange
    outcome: StepOutcome
