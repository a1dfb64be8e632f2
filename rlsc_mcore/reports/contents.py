"""What a report shows: plain values, gathered by the command and rendered by the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Change:
    """One score before and after training, paired by question."""

    name: str  # key, such as accuracy_t1
    label: str
    before: float
    after: float | None  # None while the run has not ended
    before_error: float | None = None
    after_error: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    digits: int = 3

    @property
    def is_clear(self) -> bool:
        """Whether the change is more than chance would give one time in twenty."""
        return self.p_value is not None and self.p_value < 0.05


@dataclass(frozen=True)
class AnswerGroup:
    """All samples of one question that gave the same text."""

    text: str
    count: int
    is_right: bool
    is_boxed: bool
    is_truncated: bool
    extracted: str | None
    tokens: int
    log_prob: float | None
    is_only_here: bool  # never sampled on the other side of training


@dataclass(frozen=True)
class Sampling:
    """A question's answers at one temperature."""

    temperature: float  # 0 is greedy
    before: Sequence[AnswerGroup]
    after: Sequence[AnswerGroup]


@dataclass(frozen=True)
class QuestionView:
    """A question with what was answered before and after."""

    index: int
    text: str
    gold: str
    right_before: float  # share of sampled answers
    right_after: float
    moved: float  # share of the answers that changed, 0 to 1
    samplings: Sequence[Sampling]


@dataclass(frozen=True)
class Step:
    """What the answers of one training step say beyond metrics.jsonl."""

    step: int
    accuracy: float | None  # share of right answers; None without labels
    entropy: float | None  # mean -log p per sampled token, nats


@dataclass(frozen=True)
class Calibration:
    """Whether a confident answer is right more often, on one side of training."""

    side: str  # before, after
    temperature: float
    curve: Sequence[
        tuple[float, float, float]
    ]  # of answers of similar p: how many % of all have less, mean p(y|x), share of right ones
    auroc: float | None
    auroc_within: float | None  # over pairs of answers to the same question


@dataclass(frozen=True)
class RunView:
    """One run."""

    name: str
    folder: str
    settings: Sequence[tuple[str, str]]  # fields that differ from the defaults
    metrics: Sequence[Mapping[str, Any]]
    changes: Sequence[Change]
    num_questions: int
    questions: Sequence[QuestionView]
    steps: Sequence[Step]
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    planned_steps: int = 0
    calibrations: Sequence[Calibration] = ()
    dtype: str = "bfloat16"  # the coarser of trainer's and engine's: decides what they may differ by

    @property
    def alarms(self) -> list[tuple[int, str]]:
        """Every warning with its step, counted from 1."""
        return [(int(row["step"]) + 1, str(text)) for row in self.metrics for text in row.get("warnings", [])]

    @property
    def alarm_spans(self) -> list[tuple[int, int, str]]:
        """First and last step of each alarm that steps in a row raised, and what the last of them said."""
        spans: list[tuple[int, int, str]] = []
        running: dict[str, int] = {}  # kind of alarm -> its span
        for step, text in self.alarms:
            kind = text.partition(":")[0]
            place = running.get(kind)
            if place is not None and spans[place][1] in (step - 1, step):
                spans[place] = (spans[place][0], step, text)
            else:
                running[kind] = len(spans)
                spans.append((step, step, text))
        return spans
