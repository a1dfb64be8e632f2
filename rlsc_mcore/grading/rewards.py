"""Compute rewards of sampled answers: agreement with the majority (TTRL) or with the label (RLVR).

With `boxed` only the last box counts: a sample without a box has no vote and gets reward 0, so training also
teaches to use a box. With `any`, as in TTRL's own code, the answer is the box, else the stated answer, else
the last number.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from rlsc_mcore.config import AlgorithmConfig, ConfigError, RolloutConfig
from rlsc_mcore.grading.answers import answer_key, is_correct
from rlsc_mcore.grading.choices import extract_choice, find_choice
from rlsc_mcore.grading.extraction import extract_boxed, extract_last_number, extract_stated
from rlsc_mcore.grading.formats import grade_answer
from rlsc_mcore.grading.reward_hook import function_rewards
from rlsc_mcore.grading.symbolic import NUM_WORKERS
from rlsc_mcore.objectives import OBJECTIVES
from rlsc_mcore.types import Question, Rollout

Reward = Callable[
    [Sequence[str], Question, str], list[float]
]  # (responses to one question, the question, `algorithm.rewards`) -> one reward per response


def majority_rewards(
    responses: Sequence[str], question: Question | None = None, answers: str = "boxed"
) -> list[float]:
    """Return 1 for each response to one question whose answer is the most frequent one, else 0.

    Answers are compared by `is_correct`; for multiple choice questions their letters (`extract_choice`) are
    compared. If several answers are equally frequent, the first sampled one is used. `answers` is `boxed` or
    `any`.
    """
    classes = classes_of_answers(responses, question, answers)
    counts = [classes.count(label) if label >= 0 else 0 for label in range(len(responses))]
    if not any(counts):
        return [0.0] * len(responses)
    majority = counts.index(max(counts))
    return [float(label == majority) for label in classes]


def frequency_rewards(
    responses: Sequence[str], question: Question | None = None, answers: str = "boxed"
) -> list[float]:
    """Return for each response the fraction of responses with the same answer; 0 for a response without an
    answer.

    The semantic clusters of EMPO (arXiv 2504.05812) are classes of equal answers here, as in its experiments
    on math.
    """
    return answer_shares(responses, question, answers)[1]


def answer_shares(
    responses: Sequence[str], question: Question | None, answers: str
) -> tuple[list[int], list[float]]:
    """Return the number of each response's answer among those of the question, in order of first appearance,
    and the share of the responses with this answer; (-1, 0) for a response without an answer."""
    labels = classes_of_answers(responses, question, answers)
    return labels, [labels.count(label) / len(labels) if label >= 0 else 0.0 for label in labels]


def consistency_pair(
    responses: Sequence[str], question: Question | None = None, answers: str = "boxed"
) -> list[float]:
    """Return w for a response with the most frequent answer, -w for one with the least frequent, else 0.

    w is the difference of the two answers' shares of the responses (ScPO, arXiv 2411.04109, equation 2); all
    are 0 if there is only one answer, or if w is 0. The first response of either answer is taken. Responses
    without an answer are in no pair. Identical responses share the value of their text.
    """
    classes = answer_classes([_final_answer(response, question, answers) for response in responses])
    counts = {label: classes.count(label) for label in dict.fromkeys(classes) if label >= 0}
    if len(set(counts.values())) < 2:
        return [0.0] * len(responses)
    most, least = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
    weight = (counts[most] - counts[least]) / len(responses)
    values = [0.0] * len(responses)
    for label, sign in ((most, 1.0), (least, -1.0)):
        text = responses[classes.index(label)]
        same = [position for position, response in enumerate(responses) if response == text]
        for position in same:
            values[position] = sign * weight / len(same)
    return values


def label_rewards(responses: Sequence[str], question: Question, answers: str = "boxed") -> list[float]:
    """Return 1 for each response that `grade_answer` grades as right, as in an evaluation, else 0."""
    grader = "boxed" if answers == "boxed" else "lenient"
    return [float(grade_answer(response, question, grader).strict) for response in responses]


def classes_of_answers(responses: Sequence[str], question: Question | None, answers: str) -> list[int]:
    """Return the class of each response's answer (see `answer_classes`); -1 for a response without one."""
    return answer_classes([_final_answer(response, question, answers) for response in responses])


def _final_answer(response: str, question: Question | None, answers: str) -> str | None:
    boxed = extract_boxed(response)
    is_choice = question is not None and question.answer_format == "choice"
    if boxed is not None:
        return extract_choice(boxed) if is_choice else boxed
    if answers == "boxed":
        return None
    return find_choice(response) if is_choice else extract_stated(response) or extract_last_number(response)


def answer_classes(
    answers: Sequence[str | None], agree: Callable[[str, str], bool] = is_correct
) -> list[int]:
    """Return the class of each answer, numbered in order of first appearance; -1 for None (no answer).

    Answers with the same `answer_key` are in the same class. Other answers are compared with the first answer
    of each class.
    """
    labels: dict[str, int] = {}
    firsts: list[str] = []
    found = []
    for answer in answers:
        if answer is None:
            found.append(-1)
            continue
        key = answer_key(answer)
        if key not in labels:
            label = next((i for i, first in enumerate(firsts) if agree(answer, first)), len(firsts))
            if label == len(firsts):
                firsts.append(answer)
            labels[key] = label
        found.append(labels[key])
    return found


def trained_rollouts(
    algorithm: AlgorithmConfig,
    options: RolloutConfig,
    rollouts: Sequence[Rollout],
    questions: Sequence[Question],
) -> list[tuple[Rollout, float]]:
    """Return the trained rollouts, each with its advantage within its question; 0 if the objective has no
    reward.

    `rollouts` must contain all samples of a question; `questions[i].index` is i. Rewards are computed from
    all `num_samples` of a question. The first `num_trained` are trained, and the mean and standard deviation
    of the advantage are computed over these.
    """
    num_trained = options.num_trained or options.num_samples
    is_trained = [rollout.sample_index % options.num_samples < num_trained for rollout in rollouts]
    rewards = _rewards(algorithm, rollouts, questions)
    if rewards is not None and algorithm.overlong_tokens:
        rewards = [
            reward + overlong_penalty(rollout, options.max_new_tokens, algorithm.overlong_tokens)
            for reward, rollout in zip(rewards, rollouts, strict=True)
        ]
    values = [0.0] * len(rollouts)
    if rewards is not None and OBJECTIVES[algorithm.objective].rewards_are_advantages:
        values = rewards
    elif rewards is not None:
        groups = [rollout.question_index for rollout in rollouts]
        values = group_advantages(
            rewards, groups, standardize=algorithm.advantage == "standardized", counted=is_trained
        )
    return [
        (rollout, value) for rollout, value, kept in zip(rollouts, values, is_trained, strict=True) if kept
    ]


def overlong_penalty(rollout: Rollout, longest: int, margin: int) -> float:
    """Return the soft penalty of a long answer, between -1 and 0 (DAPO, arXiv 2503.14476, eq. 13).

    0 up to `longest` - `margin` tokens, then linear down to -1 at `longest`; -1 for an answer that was cut.
    """
    if rollout.finish_reason == "length":
        return -1.0
    return -max(0, len(rollout.response_ids) - (longest - margin)) / margin


def _rewards(
    algorithm: AlgorithmConfig, rollouts: Sequence[Rollout], questions: Sequence[Question]
) -> list[float] | None:
    reward_of: Reward | None = OBJECTIVES[algorithm.objective].load_reward()
    if reward_of is None:
        return None
    groups: dict[int, list[int]] = {}
    for position, rollout in enumerate(rollouts):
        groups.setdefault(rollout.question_index, []).append(position)

    def graded(index: int) -> list[float]:
        responses = [rollouts[position].text for position in groups[index]]
        if algorithm.reward_function is not None:
            return function_rewards(algorithm.reward_function, responses, questions[index])
        return reward_of(responses, questions[index], algorithm.rewards)

    rewards = [0.0] * len(rollouts)
    with ThreadPoolExecutor(NUM_WORKERS) as threads:
        for positions, row in zip(groups.values(), threads.map(graded, groups), strict=True):
            for position, reward in zip(positions, row, strict=True):
                rewards[position] = reward
    return rewards


def check_labels(objective: str, questions: Sequence[Question], source: str) -> None:
    """Raise ConfigError naming the first question without a label if the objective needs labels."""
    unlabelled = next((question for question in questions if question.answer is None), None)
    if OBJECTIVES[objective].needs_labels and unlabelled is not None:
        raise ConfigError(
            f"algorithm.objective: {objective} needs labels, and question {unlabelled.index} of {source} has "
            "no `answer`"
        )


def group_advantages(
    rewards: Sequence[float],
    groups: Sequence[int],
    *,
    standardize: bool = False,
    counted: Sequence[bool] | None = None,
) -> list[float]:
    """Return each reward minus the mean reward of its group.

    With `standardize`, also divide by the sample standard deviation (n - 1). Mean and deviation are computed
    over the `counted` members (default: all). A group of equal rewards has advantages of 0.
    """
    members: dict[int, list[float]] = {}
    for reward, group, counts in zip(rewards, groups, counted or [True] * len(rewards), strict=True):
        if counts:
            members.setdefault(group, []).append(reward)
    # The mean of equal rewards can differ from them in its last bit, which a standardized advantage would enlarge.
    means = {
        group: values[0] if min(values) == max(values) else sum(values) / len(values)
        for group, values in members.items()
    }
    scales = dict.fromkeys(members, 1.0)
    if standardize:
        scales = {group: _deviation(values, means[group]) for group, values in members.items()}
    return [(reward - means[group]) / scales[group] for reward, group in zip(rewards, groups, strict=True)]


def _deviation(values: Sequence[float], mean: float) -> float:
    """Return the sample standard deviation; 1 if all values are equal, so that their advantages are 0."""
    squares = sum((value - mean) ** 2 for value in values)
    return math.sqrt(squares / (len(values) - 1)) if squares > 0 else 1.0
