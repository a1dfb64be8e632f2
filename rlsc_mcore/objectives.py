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
    min_samples: int = 1  # trained samples per question without which nothing is learnt
    needs_labels: bool = False  # every question needs an `answer`
    needs_pairs: bool = False  # reads `prompt, chosen, rejected` from data.path and samples nothing
    needs_rewards: bool = False  # reads `prompt, response, reward` from data.path and samples nothing
    trains_pairs: bool = False  # a question is a pair of answers: losses are averaged over questions
    rewards_from_pass: bool = False  # the reward is read off the scoring pass
    rewards_are_advantages: bool = False  # the reward's mean is not subtracted
    masks_box: bool = False  # tokens inside the last box are not trained
    needs_ratio: bool = (
        False  # a later update on the same rollouts is biased without an importance ratio, and has none
    )
    needs_start: bool = False  # compares tokens with the weights that training started with
    needs_careless: bool = False  # scores the answers behind a careless prompt too
    distills: bool = False  # trains the divergence from a teacher that sees another sample of the question
    defaults: tuple[
        str, ...
    ] = ()  # flags that this objective sets where neither file nor command line gives them
    is_control: bool = False  # answers what a gain is due to; not among the default ones of `rlsc compare`
    variants: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # settings that `rlsc compare` offers -> their flags

    @property
    def flags(self) -> tuple[str, ...]:
        """Flags of `rlsc train` that choose this objective with its own defaults, whatever a configuration
        file says."""
        return (f"--algorithm.objective={self.name}", *self.defaults)

    @property
    def has_advantages(self) -> bool:
        """Return whether the loss is the clipped one on advantages that a reward gives to sampled answers."""
        return self.rewards_from_pass or (self.reward is not None and not self.trains_pairs)

    @property
    def is_offline(self) -> bool:
        """Return whether the trained answers come from `data.path`, not from the engine."""
        return self.needs_pairs or self.needs_rewards

    @property
    def answers_per_record(self) -> int:
        """Return the number of answers in a record of an offline objective's file."""
        return 2 if self.needs_pairs else 1

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
        min_samples=2,
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
        min_samples=2,
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
        min_samples=2,
        reward="rlsc_mcore.grading.rewards:frequency_rewards",
    ),
    Objective(
        "soft_frequency",
        "soft frequency, box not trained (OM-GRPO)",
        "reward = share of the question's samples with the same answer; the tokens inside the last box are not "
        "trained, so that the answer itself is not copied",
        rule="rlsc_mcore.algorithm.soft_frequency:SoftFrequency",
        reward="rlsc_mcore.grading.rewards:frequency_rewards",
        min_samples=2,
        masks_box=True,
        defaults=("--algorithm.advantage=standardized",),
    ),
    Objective(
        "restrain",
        "RESTRAIN",
        "every answer of the question is a pseudo-label, weighted by its share; a question without a clear "
        "majority is penalised",
        rule="rlsc_mcore.algorithm.restrain:Restrain",
        reward="rlsc_mcore.algorithm.restrain:restrained_advantages",
        min_samples=2,
        rewards_are_advantages=True,
    ),
    Objective(
        "scrl",
        "SCRL",
        "reward a clear majority answer by its share, penalise rare answers of high entropy",
        rule="rlsc_mcore.algorithm.scrl:Scrl",
        reward="rlsc_mcore.algorithm.scrl:votes",
        min_samples=2,
        rewards_are_advantages=True,
        defaults=("--algorithm.advantage=standardized",),
    ),
    Objective(
        "self_certainty",
        "self-certainty (Intuitor)",
        "reward = mean over the tokens of KL(uniform || p), standardized over the question's samples",
        rule="rlsc_mcore.algorithm.self_certainty:SelfCertainty",
        rewards_from_pass=True,
        min_samples=2,
        defaults=("--algorithm.advantage=standardized",),
    ),
    Objective(
        "rent",
        "RENT",
        "reward = negative mean entropy of the tokens, standardized over the question's samples",
        rule="rlsc_mcore.algorithm.rent:Rent",
        rewards_from_pass=True,
        min_samples=2,
        defaults=("--algorithm.advantage=standardized",),
    ),
    Objective(
        "entropy",
        "entropy",
        "minimise the token entropy along the samples",
        rule="rlsc_mcore.algorithm.entropy:Entropy",
        needs_ratio=True,
    ),
    Objective(
        "self_distill",
        "self-distillation (U-OPSD)",
        "move every token of a disagreeing sample to the distribution of the same model that sees a sample of "
        "the question's most frequent answer (U-OPSD; CANON and TTPO by the options of `distill`)",
        rule="rlsc_mcore.algorithm.self_distill:SelfDistill",
        min_samples=2,
        distills=True,
        defaults=("--rollout.num-samples=8", "--algorithm.log-prob-temperature=1.0"),
        variants={
            "self_distill_canon": (
                "--distill.teacher=start",
                "--distill.context=most_likely",
                "--distill.tokens=all",
                "--distill.divergence=jsd",
            ),
            "self_distill_ttpo": ("--distill.tokens=agreeing", "--distill.penalty=1.0"),
        },
    ),
    Objective(
        "nsd",
        "negative self-distillation (NSD)",
        "lower the probability of tokens that the starting weights find likelier behind a prompt for a careless "
        "answer, held at the starting weights by a KL term",
        rule="rlsc_mcore.algorithm.nsd:Nsd",
        needs_start=True,
        needs_careless=True,
        needs_ratio=True,
        defaults=("--rollout.num-samples=1", "--algorithm.log-prob-temperature=1.0"),
    ),
    Objective(
        "rlvr",
        "RLVR (labels)",
        "reward 1 for the right boxed answer, minus the question's mean reward",
        rule="rlsc_mcore.algorithm.group_reward:GroupReward",
        min_samples=2,
        reward="rlsc_mcore.grading.rewards:label_rewards",
        needs_labels=True,
    ),
    Objective(
        "grpo",
        "GRPO (labels)",
        "the reward of rlvr with advantages divided by their standard deviation",
        rule="rlsc_mcore.algorithm.group_reward:GroupReward",
        min_samples=2,
        reward="rlsc_mcore.grading.rewards:label_rewards",
        needs_labels=True,
        defaults=("--algorithm.advantage=standardized",),
    ),
    Objective(
        "scpo",
        "ScPO (majority over minority)",
        "DPO on a sample with the most frequent answer against one with the least frequent answer, weighted "
        "by the difference of their shares of the votes",
        rule="rlsc_mcore.algorithm.preference:Preference",
        reward="rlsc_mcore.grading.rewards:consistency_pair",
        min_samples=2,
        trains_pairs=True,
        rewards_are_advantages=True,
        defaults=("--algorithm.dpo-beta=0.5", "--algorithm.dpo-nll=1.0"),
    ),
    Objective(
        "dpo",
        "DPO (pairs from a file)",
        "direct preference optimization of `chosen` over `rejected`; the reference is the starting weights",
        rule="rlsc_mcore.algorithm.preference:Preference",
        needs_pairs=True,
        trains_pairs=True,
        defaults=("--rollout.num-samples=2", "--algorithm.log-prob-temperature=1.0"),
    ),
    Objective(
        "offline_rewards",
        "rewarded answers from a file",
        "the clipped loss of grpo on answers from a file, with their `reward` as advantage and the ratio to "
        "the starting weights",
        rule="rlsc_mcore.algorithm.group_reward:GroupReward",
        needs_rewards=True,
        defaults=("--rollout.num-samples=1", "--algorithm.log-prob-temperature=1.0"),
    ),
    Objective(
        "rlsc_shuffled",
        "RLSC, weights shuffled (control)",
        "RLSC's weights, dealt to the samples of a question at random: what is left of a gain is not due to "
        "confidence",
        rule="rlsc_mcore.algorithm.shuffled:ShuffledConfidence",
        min_samples=2,
        is_control=True,
    ),
    Objective(
        "format",
        "box reward (control)",
        "reward 1 for any closed box, whatever it holds, minus the question's mean reward",
        rule="rlsc_mcore.algorithm.group_reward:GroupReward",
        min_samples=2,
        reward="rlsc_mcore.grading.control_rewards:format_rewards",
        is_control=True,
    ),
    Objective(
        "random",
        "random reward (control)",
        "a coin's reward for each distinct answer, minus the question's mean reward",
        rule="rlsc_mcore.algorithm.group_reward:GroupReward",
        min_samples=2,
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
        notes += ["reads `prompt`, `chosen` and `rejected`"] if row.needs_pairs else []
        notes += ["reads `prompt`, `response` and `reward`"] if row.needs_rewards else []
        if row.defaults:
            notes.append(f"defaults: {' '.join(row.defaults)}")
        sentences.append(f"`{row.name}`: {row.summary}" + (f" ({'; '.join(notes)})" if notes else ""))
    return "; ".join(sentences) + "."


def _load(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
