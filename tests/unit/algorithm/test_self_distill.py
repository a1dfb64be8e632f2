"""Which samples of a question are distilled or penalised, what the teacher sees, and what is refused."""

from dataclasses import replace

import pytest

from rlsc_mcore.algorithm.self_distill import teach
from rlsc_mcore.config import ConfigError, DistillConfig
from rlsc_mcore.config_file import parse_config
from rlsc_mcore.data.packing import merge_identical, pack
from rlsc_mcore.types import Rollout

REQUIRED = ["--run-dir", "run", "--model.path", "model", "--data.path", "data", "--algorithm.objective", "self_distill"]  # fmt: skip
TEXTS = ["a", "bb", "c", "dd", "e"]
LENGTHS = [3, 9, 5, 9, 20]
MEANS = [-0.9, -0.5, -0.1, -0.5, -0.3]


def taught(classes, **options):
    return teach(classes, TEXTS, LENGTHS, MEANS, DistillConfig(**options))


def test_disagreeing_samples_see_the_longest_agreeing_one():
    teaching = taught([0, 0, 0, 0, 1])
    assert teaching.values == [0.0, 0.0, 0.0, 0.0, 1.0]
    assert teaching.context == 1, "the first of the two longest that agree; the longest of all disagrees"


def test_a_sample_without_an_answer_disagrees():
    assert taught([0, 0, 0, -1, 1]).values == [0.0, 0.0, 0.0, 1.0, 1.0]


def test_the_other_switches():
    assert taught([0, 0, 0, 0, 1], context="most_likely").context == 2
    assert taught([0, 0, 0, 0, 1], tokens="all").values == [1.0] * 5
    assert taught([0, 0, 0, 0, 1], tokens="agreeing").values == [1.0, 1.0, 1.0, 1.0, 0.0]


def test_confident_errors_are_penalised_by_the_share_of_the_plurality():
    """The mean of all mean log-probs is -0.46: the sample at -0.3 is confident, the one at -0.9 is not."""
    teaching = taught([1, 0, 0, 0, 1], tokens="agreeing", penalty=2.0)
    assert teaching.values == pytest.approx([0.0, 1.0, 1.0, 1.0, -2.0 * 3 / 5])


@pytest.mark.parametrize(
    ("classes", "min_share"),
    [([0] * 5, 0.5), ([-1] * 5, 0.0), ([0, 0, 1, 2, 3], 0.5), ([0, 0, 1, 1, -1], 0.41)],
    ids=["all agree", "no answer", "no majority", "below the threshold"],
)
def test_questions_without_a_signal_are_not_trained(classes, min_share):
    teaching = taught(classes, min_share=min_share)
    assert teaching.context is None
    assert not any(teaching.values)


def test_equal_texts_have_equal_values_whatever_the_engine_s_rounding():
    means = [-0.5, -0.3, -0.30001, -0.4, -0.2]
    texts = ["x", "y", "y", "z", "z"]
    options = DistillConfig(tokens="agreeing", penalty=1.0)
    values = teach([0, 1, 1, 0, 0], texts, LENGTHS, means, options).values
    assert values[1] == values[2] < 0


def test_the_teacher_batch_has_the_distilled_sequences_in_the_same_order():
    rollouts = [
        Rollout(0, 0, (1, 2), (3, 4, 0), (-1.0,) * 3, "stop", 0),
        Rollout(0, 1, (1, 2), (5, 0), (-1.0,) * 2, "stop", 0),
        Rollout(1, 0, (6, 10), (7, 8, 9, 0), (-1.0,) * 4, "stop", 0),
    ]
    sequences = merge_identical(
        rollouts,
        train_end_token=False,
        train_truncated=True,
        stop_token_ids=frozenset({0}),
        advantages=[1.0, -0.5, 1.0],
    )
    sequences = [replace(each, teacher_prompt=(20, 21, 22, 23)) for each in sequences]
    (batch,) = pack(sequences, 100, multiple_of=4)
    assert batch.teacher is not None
    live, taught_tokens = batch.distilled_mask, batch.teacher.response_mask
    assert (
        batch.target_ids[live].tolist() == batch.teacher.target_ids[taught_tokens].tolist() == [7, 8, 9, 3, 4]
    )
    assert len(batch.teacher.token_ids) % 4 == 0
    assert batch.num_tokens == len(batch.token_ids) + len(batch.teacher.token_ids)
    without = pack([replace(each, teacher_prompt=()) for each in sequences], 100)[0]
    assert without.teacher is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rollout.num-samples", "1"], "rollout.num_samples: expected at least 2 with algorithm.objective"),
        (["--rollout.num-trained", "4"], "rollout.num_trained: expected rollout.num_samples = 8"),
        (["--parallel.pp", "2"], "parallel.pp: expected 1 with algorithm.objective self_distill"),
        (["--distill.prompt", "{question}"], "distill.prompt: expected a text with"),
        (["--distill.min-share", "2"], "distill.min_share: expected between 0 and 1"),
        (["--distill.clip", "0"], "distill.clip: expected more than 0"),
        (["--distill.penalty", "1"], "distill.penalty: expected 0 unless distill.tokens is agreeing"),
        (
            ["--distill.penalty=1", "--distill.tokens=agreeing", "--training.updates-per-rollout=2"],
            "training.updates_per_rollout: expected 1 with distill.penalty",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(flags, message):
    with pytest.raises(ConfigError) as error:
        parse_config([*REQUIRED, *flags])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
