"""Values passed between stages: small frozen dataclasses with tensor shapes in the field comments.

Shape suffixes: T packed tokens of one micro-batch, S its sequences, G samples of one question.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class Question:
    """One line of a question file."""

    index: int  # position in its file, from 0; identifies the question in rollouts and metrics
    text: str
    answer: str | None  # gold answer, reduced to its final value ("#### 18" -> "18"); None if absent
    answer_format: Literal["math", "choice"] = "math"  # choice: the answer is a letter
    tolerance: float | None = None  # numbers that differ by at most this count as equal


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
