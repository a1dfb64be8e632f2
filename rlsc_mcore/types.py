"""The values that cross a stage: small frozen dataclasses, shapes in the field comments.

T packed tokens of one micro-batch, S sequences in it.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class Question:
    """One line of a question file."""

    index: int  # position in its file, from 0; names the question in rollouts and metrics
    text: str
    answer: (
        str | None
    )  # gold answer as written in the file, reduced to its final value ("#### 18" -> "18"); None if absent
    answer_format: Literal["math", "choice"] = "math"  # choice: the answer is a letter
    tolerance: float | None = None  # numbers this close are the same answer


@dataclass(frozen=True)
class Rollout:
    """One sampled answer."""

    question_index: int
    sample_index: int  # 0 .. G-1 within its question
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]  # includes the end-of-text token where one was sampled
    engine_log_probs: tuple[float, ...]  # one per response id, at the temperature that is trained
    finish_reason: Literal["stop", "length"]
    policy_version: int  # weights that sampled it
    text: str = ""  # decoded response without special tokens


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch of whole sequences laid end to end (thd).

    Position t of a sequence predicts its token t + 1: `target_ids[t]` is that token and `response_mask[t]` is
    True where it belongs to the trained answer (so the first answer token sits at position prompt_length -
    1).
    """

    token_ids: torch.Tensor  # int64 [T]
    target_ids: torch.Tensor  # int64 [T], 0 where there is no next token
    response_mask: torch.Tensor  # bool [T]
    engine_log_probs: torch.Tensor  # float32 [T], 0 outside the response mask
    cu_seqlens: torch.Tensor  # int32 [S + 1]; the last segment may be padding (multiplicity 0)
    sequence_lengths: tuple[int, ...]  # [S], the same on the host
    trained_lengths: tuple[int, ...]  # [S], True entries of the response mask per sequence
    multiplicity: (
        torch.Tensor
    )  # float64 [S], rollouts that this sequence stands for (identical answers share one pass)
    advantages: (
        torch.Tensor
    )  # float64 [S], reward minus the question's mean; 0 where the objective has no reward
    group_ids: torch.Tensor  # int64 [S], which question of the step; -1 for padding
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
    """One distinct (question, answer) with all its samples: identical answers share one forward pass, their
    weights add."""

    rollout: Rollout
    group: int  # question of the step, from 0
    multiplicity: int
    trained: tuple[bool, ...]  # one per response token
    advantage: float = 0.0  # reward minus the question's mean, for objectives with a reward


@dataclass(frozen=True)
class SequenceScores:
    """What a step learnt of its sequences, on the host, in the order they were packed; those with nothing to
    train are left out."""

    sequence_ids: torch.Tensor  # int64 [S]
    multiplicity: torch.Tensor  # float64 [S]
    log_probs: torch.Tensor  # float64 [S], log p_old at the trained temperature
    weights: torch.Tensor  # float64 [S], confidence + alpha of one sample
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

    loss: float  # before the update
    grad_norm: float
    updated: bool  # False when loss or gradient were not finite and the update was skipped


@dataclass(frozen=True)
class StepOutcome:
    """Result of one step on this data-parallel rank; losses, norms and lr are global."""

    updates: tuple[Update, ...]  # `training.updates_per_rollout`, fewer when one was skipped
    lr: float
    scores: SequenceScores  # of the first pass: the policy that sampled
    num_tokens: int  # tokens in all forward passes, prompts and padding included

    @property
    def loss(self) -> float:
        """The loss of the policy that sampled."""
        return self.updates[0].loss

    @property
    def grad_norm(self) -> float:
        """The gradient norm of the policy that sampled."""
        return self.updates[0].grad_norm

    @property
    def updated(self) -> bool:
        """False when an update was skipped."""
        return all(update.updated for update in self.updates)
