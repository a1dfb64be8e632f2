"""Sample rollouts: G seeded answers per question from the engine."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from rlsc_mcore.config import RolloutConfig
from rlsc_mcore.observability.console import NO_BAR, ProgressBar
from rlsc_mcore.rollout.engine import RolloutEngine, SamplingRequest
from rlsc_mcore.types import Question, Rollout

_SEED_SPACE = 2**62  # `seed + sample index` in the engine must fit a signed 64-bit integer


def sample_seed(run_seed: int, purpose: str, step: int, question_index: int) -> int:
    """Return the seed of a question's first answer; answer i uses this + i.

    The result depends only on the arguments.
    """
    text = f"{run_seed}/{purpose}/{step}/{question_index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % _SEED_SPACE


def spread_samples(
    num_questions: int, num_samples: int, num_engines: int, engine: int
) -> list[tuple[int, range]]:
    """Return the (question position, samples) pairs of `engine`.

    Every engine samples an equal part of the samples of every question. The engines' loads then differ only
    by chance, because no engine samples all answers of a question with long answers. With more engines than
    samples, an engine takes single samples of some questions. The samples of a pair are consecutive and form
    one request.
    """
    blocks = min(num_samples, num_engines)
    # Shift the blocks by one engine per question, so that the larger of unequal blocks alternate.
    turn = 1 if blocks == num_engines else 0
    return [
        (position, range(block * num_samples // blocks, (block + 1) * num_samples // blocks))
        for position in range(num_questions)
        for block in range(blocks)
        if (position * (blocks + turn) + block) % num_engines == engine
    ]


def sample_rollouts(
    engine: RolloutEngine,
    tokenizer: Any,
    questions: Sequence[Question],
    prompts: Sequence[Sequence[int]],
    config: RolloutConfig,
    *,
    run_seed: int,
    step: int,
    policy_version: int,
    repeats: Sequence[int] | None = None,
    samples: Sequence[range] | None = None,
    progress: ProgressBar = NO_BAR,
    should_stop: Callable[[], bool] | None = None,
) -> list[Rollout]:
    """Sample G answers per question, or those in `samples`, in question order and then sample order.

    `repeats` counts the earlier occurrences of each question in the step; its answers use the seeds that
    follow theirs. Collective over the engine's ranks, which must pass the same questions. The answers to a
    question do not depend on the other questions of the call, except through the engine's numerics. Raises
    `GenerationInterrupted` (see the engine).
    """
    repeats = [0] * len(questions) if repeats is None else repeats
    samples = [range(config.num_samples)] * len(questions) if samples is None else samples
    requests = [
        SamplingRequest(
            prompt_ids=prompt,
            num_samples=len(share),
            temperature=config.temperature,
            top_p=config.top_p,
            max_new_tokens=min(config.max_new_tokens, engine.max_model_len - len(prompt)),
            seed=sample_seed(run_seed, "rollout", step, question.index)
            + repeat * config.num_samples
            + share.start,
        )
        for question, prompt, repeat, share in zip(questions, prompts, repeats, samples, strict=True)
    ]
    answers = engine.generate(requests, progress=progress, should_stop=should_stop)
    texts = iter(
        tokenizer.batch_decode(
            [list(c.token_ids) for group in answers for c in group], skip_special_tokens=True
        )
    )
    return [
        Rollout(
            question_index=question.index,
            sample_index=repeat * config.num_samples + share.start + index,
            prompt_ids=tuple(prompt),
            response_ids=completion.token_ids,
            engine_log_probs=completion.log_probs,
            finish_reason=completion.finish_reason,
            policy_version=policy_version,
            text=next(texts),
        )
        for question, prompt, group, repeat, share in zip(
            questions, prompts, answers, repeats, samples, strict=True
        )
        for index, completion in enumerate(group)
    ]
