"""List the training objectives: one row each. Configuration, grading, comparison, reports and docs read this table.

To add an objective, write its rule in a new file of `algorithm/` and add a row here. Imports no torch: the rows name their
code as `module:attribute`, which is imported at its first use.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Objective:
    """One value of `algorithm.objective`."""

    name: str
    label: str  # in tables and figures
    summary: str  # what it does, for `rlsc train --help` and the docs: no capital, no full stop
    rule: str  # subclass of `algorithm.rule.ObjectiveRule`
    reward: str | None = None  # function of type `grading.rewards.Reward`; minus the question's mean it is the advantage
    needs_labels: bool = False  # every question needs an `answer`
    num_samples: int | None = None  # default of `rollout.num_samples` with this objective
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # settings that `rlsc compare` offers -> their flags

    @property
    def flags(self) -> tuple[str, ...]:
        """Flags of `rlsc train` that choose this objective with its own defaults, whatever a configuration file says."""
        samples = () if self.num_samples is None else (f"--rollout.num-samples={self.num_samples}",)
        return (f"--algorithm.objective={self.name}", *samples)

    def load_rule(self) -> Any:
        """Import the rule's class."""
        return _load(self.rule)

    def load_reward(self) -> Any:
        """Import the reward function; None without one."""
        return None if self.reward is None else _load(self.reward)


_ROWS = (
    Objective(
        "rlsc",
        "RLSC",
        "weight = confidence + alpha (alpha = 0 is the paper's L1, alpha > 0 its L2)",
        rule="rlsc_mcore.algorithm.rlsc:Rlsc",
        variants={
            "rlsc_l1": ("--algorithm.alpha=0",),
            "rlsc_length_normalized": ("--algorithm.confidence=length_normalized",),
            "rlsc_token": ("--algorithm.confidence=token",),
            "rlsc_group_softmax": ("--algorithm.confidence=group_softmax",),
        },
    ),
    Objective(
        "self_sft",
        "self-SFT (equal weights)",
        "every sample has weight 1",
        rule="rlsc_mcore.algorithm.self_sft:SelfSft",
    ),
    Objective(
        "ttrl",
        "TTRL (majority vote)",
        "reward 1 for the boxed answer of the question's majority, minus the question's mean reward",
        rule="rlsc_mcore.algorithm.group_reward:GroupReward",
        reward="rlsc_mcore.grading.rewards:majority_rewards",
        num_samples=64,  # votes per question in its authors' setup
    ),
    Objective(
        "entropy",
        "entropy",
        "minimise the token entropy along the samples",
        rule="rlsc_mcore.algorithm.entropy:Entropy",
    ),
    Objective(
        "rlvr",
        "RLVR (labels)",
        "reward 1 for the right boxed answer, minus the question's mean reward",
        rule="rlsc_mcore.algorithm.group_reward:GroupReward",
        reward="rlsc_mcore.grading.rewards:label_rewards",
        needs_labels=True,
    ),
)
OBJECTIVES = {row.name: row for row in _ROWS}


def describe_objectives() -> str:
    """Return one sentence per objective, for the help text of `algorithm.objective`."""
    sentences = []
    for row in _ROWS:
        notes = ["reads `answer`"] if row.needs_labels else []
        if row.num_samples is not None:
            notes.append(f"default of rollout.num_samples: {row.num_samples}")
        sentences.append(f"`{row.name}`: {row.summary}" + (f" ({'; '.join(notes)})" if notes else ""))
    return "; ".join(sentences) + "."


def _load(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
