"""Rollouts -> advantages, for the objectives that have a reward."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from rlsc_mcore.algorithm.objective import group_advantages
from rlsc_mcore.config import ConfigError, Objective
from rlsc_mcore.evaluation.rewards import label_rewards, majority_rewards
from rlsc_mcore.evaluation.symbolic import NUM_WORKERS
from rlsc_mcore.types import Question, Rollout


def advantages(objective: Objective, rollouts: Sequence[Rollout], questions: Sequence[Question]) -> list[float] | None:
    """Return each rollout's reward minus its question's mean; None where the objective has no reward.

    All samples of a question must be among `rollouts`; `questions[i].index` is i.
    """
    if objective not in ("ttrl", "rlvr"):
        return None
    groups: dict[int, list[int]] = {}
    for position, rollout in enumerate(rollouts):
        groups.setdefault(rollout.question_index, []).append(position)

    def graded(index: int) -> list[float]:
        texts = [rollouts[position].text for position in groups[index]]
        return majority_rewards(texts) if objective == "ttrl" else label_rewards(texts, questions[index].answer or "")

    rewards = [0.0] * len(rollouts)
    with ThreadPoolExecutor(NUM_WORKERS) as threads:
        for positions, row in zip(groups.values(), threads.map(graded, groups), strict=True):
            for position, reward in zip(positions, row, strict=True):
                rewards[position] = reward
    return group_advantages(rewards, [rollout.question_index for rollout in rollouts])


def check_labels(objective: Objective, questions: Sequence[Question], source: str) -> None:
    """Raise ConfigError at the first question without a label where the objective needs labels."""
    unlabelled = next((question for question in questions if question.answer is None), None)
    if objective == "rlvr" and unlabelled is not None:
        raise ConfigError(f"algorithm.objective: rlvr needs labels, and question {unlabelled.index} of {source} has no `answer`")
