"""Define the plain values that a report shows; `read.py` collects them and `page.py` renders them."""

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
        """Return whether the p-value is below 0.05."""
        return self.p_value is not None and self.p_value < 0.05


@dataclass(frozen=True)
class AnswerGroup:
    """All samples of one question with the same text."""

    text: str
    count: int
    is_right: bool
    is_boxed: bool
    is_truncated: bool
    extracted: str | None
    tokens: int
    log_prob: float | None
    is_only_here: bool  # not among the samples of the other side (before or after training)


@dataclass(frozen=True)
class Sampling:
    """The answers to a question at one temperature, before and after training."""

    temperature: float  # 0 is greedy
    before: Sequence[AnswerGroup]
    after: Sequence[AnswerGroup]


@dataclass(frozen=True)
class QuestionView:
    """A question with its answers before and after training."""

    index: int
    text: str
    gold: str
    right_before: float  # fraction of sampled answers
    right_after: float
    moved: float  # total variation distance between the answers before and after, 0 to 1
    samplings: Sequence[Sampling]


@dataclass(frozen=True)
class Step:
    """Values of one training step that are computed from its answers and are not in metrics.jsonl."""

    step: int
    accuracy: float | None  # fraction of right answers; None without labels
    entropy: float | None  # mean -log p per sampled token, nats


@dataclass(frozen=True)
class Calibration:
    """Calibration of the answers' probabilities on one side (before or after training)."""

    side: str  # before, after
    temperature: float
    curve: Sequence[
        tuple[float, float, float]
    ]  # per bin of answers: % of all answers with a lower p(y|x), mean p(y|x), fraction of right answers
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
    dtype: str = "bfloat16"  # the less precise of the trainer's and the engine's; selects the mismatch limits

    @property
    def alarms(self) -> list[tuple[int, str]]:
        """Return every warning with its step, counted from 1."""
        return [(int(row["step"]) + 1, str(text)) for row in self.metrics for text in row.get("warnings", [])]

    @property
    def alarm_spans(self) -> list[tuple[int, int, str]]:
        """Return (first step, last step, last text) of each alarm that consecutive steps raised."""
        spans: list[tuple[int, int, str]] = []
        running: dict[str, int] = {}  # kind of alarm -> index of its last span
        for step, text in self.alarms:
            kind = text.partition(":")[0]
            place = running.get(kind)
            if place is not None and spans[place][1] in (step - 1, step):
                spans[place] = (spans[place][0], step, text)
            else:
                running[kind] = len(spans)
                spans.append((step, step, text))
        return spans
