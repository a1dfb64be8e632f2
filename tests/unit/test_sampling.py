"""Seeds of the sampled answers: a pure function, the same on every machine, distinct wherever they must
be."""

import hashlib
from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from rlsc_mcore.config import RolloutConfig
from rlsc_mcore.rollout.engine import Completion, SamplingRequest
from rlsc_mcore.rollout.sampling import sample_rollouts, sample_seed, spread_samples
from rlsc_mcore.types import Question


def test_seeds_are_fixed_for_ever() -> None:
    """Resuming with another version of the code must sample the same answers."""
    assert (
        sample_seed(0, "rollout", 0, 0)
        == int.from_bytes(hashlib.sha256(b"0/rollout/0/0").digest()[:8], "big") % 2**62
    )
    assert sample_seed(3, "evaluation/0.5", 0, 17) == sample_seed(3, "evaluation/0.5", 0, 17)


def test_seeds_differ_in_every_argument_and_leave_room_for_the_samples() -> None:
    seeds = {
        sample_seed(run, purpose, step, question)
        for run in range(3)
        for purpose in ("rollout", "evaluation/0.5", "evaluation/1.0")
        for step in range(8)
        for question in range(40)
    }
    assert len(seeds) == 3 * 3 * 8 * 40
    ordered = sorted(seeds)
    assert min(b - a for a, b in pairwise(ordered)) > 10_000  # sample i uses seed + i: ranges stay apart
    assert ordered[0] >= 0 and ordered[-1] + 10_000 < 2**63


class SeedEcho:
    """Answers with the seeds that it was asked to use."""

    max_model_len = 64

    def generate(self, requests: Sequence[SamplingRequest], **unused: object) -> list[list[Completion]]:
        return [[Completion((r.seed + i,), (0.0,), "stop") for i in range(r.num_samples)] for r in requests]

    @staticmethod
    def batch_decode(token_ids: Sequence[Sequence[int]], **unused: object) -> list[str]:
        return [""] * len(token_ids)


def test_a_question_asked_again_in_a_step_goes_on_with_new_seeds() -> None:
    echo, question = SeedEcho(), Question(index=5, text="", answer=None)
    config = RolloutConfig(num_samples=4)
    once = sample_rollouts(echo, echo, [question], [[1]], config, run_seed=0, step=2, policy_version=0)  # type: ignore[arg-type]
    twice = sample_rollouts(
        echo,  # type: ignore[arg-type]
        echo,
        [question, question],
        [[1], [1]],
        config,
        run_seed=0,
        step=2,
        policy_version=0,
        repeats=[0, 1],
    )
    first = sample_seed(0, "rollout", 2, 5)
    assert [rollout.response_ids for rollout in once] == [(first + i,) for i in range(4)]
    assert [rollout.response_ids for rollout in twice] == [(first + i,) for i in range(8)]
    assert [rollout.sample_index for rollout in twice] == list(range(8))


@given(questions=st.integers(1, 20), samples=st.integers(1, 20), engines=st.integers(1, 24))
def test_every_engine_draws_an_equal_part_of_every_question(
    questions: int, samples: int, engines: int
) -> None:
    shares = [spread_samples(questions, samples, engines, engine) for engine in range(engines)]
    drawn = [(position, sample) for share in shares for position, block in share for sample in block]
    assert sorted(drawn) == [(q, s) for q in range(questions) for s in range(samples)]  # each once
    sizes = [sum(len(block) for _, block in share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    if engines <= samples:  # and every engine some of each
        assert all([position for position, _ in share] == list(range(questions)) for share in shares)
        assert {len(block) for share in shares for _, block in share} <= {
            samples // engines,
            -(-samples // engines),
        }


def test_spread_answers_have_the_seeds_of_answers_that_are_not_spread() -> None:
    config = RolloutConfig(num_samples=5, max_new_tokens=8)
    questions = [Question(index=index, text="", answer=None) for index in (3, 7)]
    prompts, repeats = [[1, 2], [3]], [0, 1]

    def ids(positions: list[int], samples: list[range]) -> dict[tuple[int, int], tuple[int, ...]]:
        found = sample_rollouts(
            SeedEcho(), SeedEcho(), [questions[i] for i in positions], [prompts[i] for i in positions], config,  # type: ignore[arg-type]
            run_seed=0, step=4, policy_version=0, repeats=[repeats[i] for i in positions], samples=samples,
        )  # fmt: skip
        return {(rollout.question_index, rollout.sample_index): rollout.response_ids for rollout in found}

    whole = ids([0, 1], [range(5), range(5)])
    assert set(whole) == {(3, sample) for sample in range(5)} | {(7, 5 + sample) for sample in range(5)}
    spread: dict[tuple[int, int], tuple[int, ...]] = {}
    for engine in range(3):
        shares = spread_samples(2, 5, 3, engine)
        spread |= ids([position for position, _ in shares], [share for _, share in shares])
    assert spread == whole
