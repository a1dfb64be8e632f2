"""Entropy of answer tokens and of reasoning tokens, estimated from the log-probs of sampled tokens."""

import numpy as np
import pytest

from rlsc_mcore.config_file import parse_config
from rlsc_mcore.observability.answer_tokens import surprise_sums
from rlsc_mcore.types import Rollout

REQUIRED = ["--run-dir", "run", "--model.path", "model", "--data.path", "data"]


def rollout(text: str, log_probs: np.ndarray) -> Rollout:
    """Return a rollout with one token per character; its ids are code points."""
    ids = tuple(map(ord, text))
    return Rollout(0, 0, (1,), ids, tuple(log_probs.tolist()), "stop", 0, text)


def decode(ids) -> str:
    return "".join(map(chr, ids))


def test_only_the_content_of_the_last_box_counts_as_answer() -> None:
    texts = ["\\boxed{1} or \\boxed{234}.", "no box", "\\boxed{5}", "\\boxed{", ""]
    is_answer = [[20, 21, 22], [], [7], [], []]
    log_probs = [-np.random.default_rng(0).exponential(size=len(text)) for text in texts]
    sums = surprise_sums(list(map(rollout, texts, log_probs)), decode)
    inside = [value for row, chosen in zip(log_probs, is_answer, strict=True) for value in -row[chosen]]
    outside = [v for row, chosen in zip(log_probs, is_answer, strict=True) for v in -np.delete(row, chosen)]
    assert [decode(map(ord, texts[0][i])) for i in is_answer[0]] == ["2", "3", "4"]
    assert (
        (sums.num_answer, sums.num_reasoning) == (len(inside), len(outside)) == (4, sum(map(len, texts)) - 4)
    )
    assert sums.answer == pytest.approx(sum(inside)) and sums.reasoning == pytest.approx(sum(outside))


def test_the_mean_estimates_the_entropy_of_the_answer() -> None:
    draw = np.random.default_rng(1)
    probabilities = np.array([0.97, 0.02, 0.01])
    entropy = -(probabilities * np.log(probabilities)).sum()
    rollouts = []
    for digit in draw.choice(3, p=probabilities, size=4000):
        text = f"\\boxed{{{digit}}}"
        log_probs = np.zeros(len(text))  # the box itself is certain
        log_probs[-2] = np.log(probabilities[digit])
        rollouts.append(rollout(text, log_probs))
    sums = surprise_sums(rollouts, decode)
    variance = (probabilities * (-np.log(probabilities) - entropy) ** 2).sum()
    five_errors = 5 * np.sqrt(variance / 4000)
    assert five_errors < entropy / 2
    assert sums.answer / sums.num_answer == pytest.approx(entropy, abs=five_errors)
    assert sums.reasoning == 0 and sums.num_reasoning == 8 * 4000


def test_no_rollouts() -> None:
    assert surprise_sums([], decode) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], True),
        (["--rollout.top-p", "0.9"], False),
        (["--algorithm.log-prob-temperature", "1.0", "--rollout.temperature", "0.5"], False),
        (["--algorithm.log-prob-temperature", "1.0", "--rollout.temperature", "1.0"], True),
        (["--algorithm.objective", "soft_frequency"], True),  # its mask leaves the samples as they are
        (["--algorithm.objective", "dpo"], False),
    ],
)
def test_only_samples_of_the_trained_softmax_estimate_its_entropy(flags: list[str], expected: bool) -> None:
    assert parse_config([*REQUIRED, *flags]).samples_trained_policy is expected
