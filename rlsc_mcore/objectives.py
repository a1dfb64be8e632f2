"""List the training objectives: one row each. Configuration, grading, comparison, reports and docs read this
table.

To add an objective, write its rule in a new file of `algorithm/` and add a row here. Imports no torch: the
rows name their code as `module:attribute`, which is imported at its first use.
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
    reward: str | None = (
        None  # function of type `grading.rewards.Reward`; minus the question's mean it is the advantage
    )
    needs_labels: bool = False  # every question needs an `answer`
    needs_ratio: bool = (
        False  # a later update on the same rollouts is biased without an importance ratio, and has none
    )
    defaults: tuple[
        str, ...
    ] = ()  # flags that this objective sets where neither file nor command line gives them
    is_control: bool = False  # answers what a gain is due to; `rlsc compare` trains it only where it is named
    variants: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # settings that `rlsc compare` offers -> their flags

    @property
    def flags(self) -> tuple[str, ...]:
        """Flags of `rlsc train` that choose this objective with its own defaults, whatever a configuration
        file says."""
        return (f"--algorithm.objective={self.name}", *self.defaults)

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
        "majority_vote",
        "majority vote",
        "reward 1 for the answer of the question's majority, minus the question's mean reward",
        rule="rlsc_mcore.algorithm.group_reward:GroupReward",
        reward="rlsc_mcore.grading.rewards:majority_rewards",
        defaults=("--rollout.num-samples=64",),
    ),
    Objective(
        "ttrl",
        "TTRL",
        "the reward of majority_vote as in TTRL's own recipe: 64 votes at T = 1, of which 32 are trained, "
        "advantages divided by "
        "their standard deviation, answers that need no box",
        rule="rlsc_mcore.algorithm.group_reward:GroupReward",
        reward="rlsc_mcore.grading.rewards:majority_rewards",
        defaults=(
            "--rollout.num-samples=64",
            "--rollout.num-trained=32",
            "--rollout.temperature=1.0",
            "--algorithm.advantage=standardized",
            "--algorithm.rewards=any",
        ),
    ),
    Objective(
        "empo",
        "EMPO (answer frequency)",
        "reward = share of the question's samples with the same answer (its semantic cluster), minus the "
        "question's mean reward",
        rule="rlsc_mcore.algorithm.group_reward:GroupReward",
        reward="rlsc_mcore.grading.rewards:frequency_rewards",
    ),
    Objective(
        "entropy",
        "entropy",
        "minimise the token entropy along the samples",
        rule="rlsc_mcore.algorithm.entropy:Entropy",
        needs_ratio=True,
    ),
    Objective(
        "rlvr",
        "RLVR (labels)",
        "reward 1 for the right boxed answer, minus the question's mean reward",
        rule="rlsc_mcore.algorithm.group_reward:GroupReward",
        reward="rlsc_mcore.grading.rewards:label_rewards",
        needs_labels=True,
    ),
    Objective(
        "grpo",
        "GRPO (labels)",
        "the reward of rlvr with advantages divided by their standard deviation",
        rule="rlsc_mcore.algorithm.group_reward:GroupReward",
        reward="rlsc_mcore.grading.rewards:label_rewards",
        needs_labels=True,
        defaults=("--algorithm.advantage=standardized",),
    ),
    Objective(
        "rlsc_shuffled",
        "RLSC, weights shuffled (control)",
        "RLSC's weights, dealt to the samples of a question at random: what is left of a gain is not due to "
        "confidence",
        rule="rlsc_mcore.algorithm.shuffled:ShuffledConfidence",
        is_control=True,
    ),
    Objective(
        "format",
        "box reward (control)",
        "reward 1 for any closed box, whatever it holds, minus the question's mean reward",
        rule="rlsc_mcore.algorithm.group_reward:GroupReward",
        reward="rlsc_mcore.grading.control_rewards:format_rewards",
        is_control=True,
    ),
    Objective(
        "random",
        "random reward (control)",
        "a coin's reward for each distinct answer, minus the question's mean reward",
        rule="rlsc_mcore.algorithm.group_reward:GroupReward",
        reward="rlsc_mcore.grading.control_rewards:random_rewards",
        is_control=True,
    ),
)
OBJECTIVES = {row.name: row for row in _ROWS}


def describe_objectives() -> str:
    """Return one sentence per objective, for the help text of `algorithm.objective`."""
    sentences = []
    for row in _ROWS:
        notes = ["reads `answer`"] if row.needs_labels else []
        if row.defaults:
            notes.append(f"defaults: {' '.join(row.defaults)}")
        sentences.append(f"`{row.name}`: {row.summary}" + (f" ({'; '.join(notes)})" if notes else ""))
    return "; ".join(sentences) + "."


def _load(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
