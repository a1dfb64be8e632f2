"""The engine holds the trainer's weights after a swap, and says so when it does not. One engine, on the
embedded model."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlsc_mcore.types import Rollout
from tests.helpers.ranks import run_ranks

EMBEDDED = "embedded:tiny_qwen2"
FLAGS = [
    "--model.dtype", "float32", "--data.path", "embedded:train", "--data.questions-per-step", "8", "--rollout.num-samples", "4",
    "--rollout.max-new-tokens", "48", "--rollout.max-num-seqs", "64", "--optimizer.lr", "1e-3", "--observability.tensorboard", "False",
]  # fmt: skip


def make_session(run_dir: Path, model: str, *flags: str) -> Any:
    from rlsc_mcore.config_file import parse_config
    from rlsc_mcore.training.session import Session
    from rlsc_mcore.training.signals import StopRequest

    return Session(
        parse_config(["--run-dir", str(run_dir), "--model.path", model, *FLAGS, *flags]), StopRequest()
    )


def answers(
    session: Any,
    positions: Any = range(6),
    *,
    temperature: float = 0.0,
    samples: int = 1,
    prompts: Any = None,
) -> list[Any]:
    from rlsc_mcore.rollout.engine import SamplingRequest

    prompts = session.inputs.prompts if prompts is None else prompts
    requests = [SamplingRequest(prompts[i], samples, temperature, 40, 1000 * i) for i in positions]
    return [[(c.token_ids, c.log_probs) for c in group] for group in session.engine.generate(requests)]


def process_random_state() -> tuple[Any, ...]:
    numpy_state = np.random.get_state()
    return (
        random.getstate(),
        numpy_state[1].tobytes(),
        numpy_state[2],
        torch.random.get_rng_state().numpy().tobytes(),
    )


def message(function: Any, *arguments: Any, **options: Any) -> str:
    """Name and text of what a call raises."""
    try:
        function(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def step(session: Any, number: int) -> Any:
    rollouts = session.sample(number)
    result = session.train(number, rollouts)
    session.hot_swap()
    return result.outcome


def observe_swaps(run: str) -> dict[str, Any]:
    """Everything that one engine can show about sampling and swapping."""
    from rlsc_mcore.rollout.engine import GenerationInterrupted, SamplingRequest
    from rlsc_mcore.weight_sync.plan import CopiedWeight

    run_dir = Path(run)
    session = make_session(run_dir, EMBEDDED)
    seen: dict[str, Any] = {"versions": [session.swap.policy_version]}

    # --- sampling
    state = process_random_state()
    threads = torch.get_num_threads()
    whole = answers(session, temperature=0.5, samples=4)
    seen["random state untouched"] = process_random_state() == state
    torch.set_num_threads(threads)  # vLLM replaces this function by a no-op
    seen["threads can be set"] = (
        torch.get_num_threads() == threads and "noop" not in repr(torch.set_num_threads).lower()
    )
    seen["again"] = (answers(session, temperature=0.5, samples=4), whole)
    # After a reset: a cached prompt is computed in other pieces, which is another rounding of the same
    # numbers.
    session.engine.reset_prefix_cache()
    alone = answers(session, [4], temperature=0.5, samples=4)
    seen["alone"] = (
        [[tokens for tokens, _ in group] for group in alone],
        [[tokens for tokens, _ in whole[4]]],
    )
    seen["distinct"] = len(
        {tokens for group in answers(session, temperature=1.0, samples=4) for tokens, _ in group}
    )
    calls = iter([False] * 5)
    requests = [SamplingRequest(prompt, 4, 0.5, 40, 0) for prompt in session.inputs.prompts[:6]]
    try:
        session.engine.generate(requests, should_stop=lambda: next(calls, True))
        seen["interrupted"] = False
    except GenerationInterrupted:
        seen["interrupted"] = True
    session.engine.reset_prefix_cache()  # refuses while requests are unfinished
    seen["after the interruption"] = (
        [[t for t, _ in g] for g in answers(session, temperature=0.5, samples=4)],
        [[t for t, _ in g] for g in whole],
    )

    # --- training, with answers that are hard to train on
    rollouts = session.sample(0)
    seen["stale"] = message(session.train, 0, [replace(rollouts[0], policy_version=5), *rollouts[1:]])
    strange = [
        replace(rollouts[0], response_ids=(), engine_log_probs=()),  # no token at all
        replace(
            rollouts[1],
            response_ids=rollouts[1].response_ids[:3],
            engine_log_probs=rollouts[1].engine_log_probs[:3],
            finish_reason="length",
        ),
        replace(
            rollouts[2],
            response_ids=rollouts[2].response_ids[-1:],
            engine_log_probs=rollouts[2].engine_log_probs[-1:],
        ),  # the end alone
        *rollouts[3:],
    ]
    result = session.train(0, strange)
    session.hot_swap()
    session.record(0, strange, result)
    outcome = result.outcome
    seen["strange"] = (outcome.loss, outcome.grad_norm, outcome.updated, session.metrics.rows[0])
    for number in (1, 2):
        outcome = step(session, number)
    seen["gap"] = outcome.scores.gap_max
    seen["versions"].append(session.swap.policy_version)

    # --- the engine's own tensors scrambled, then swapped: equal to the export in every element
    permuted = [session.engine.module.get_parameter(item.engine_name) for item in session.swap._plan.copies]
    with torch.no_grad():
        for parameter in permuted:
            parameter.data.normal_()
    seen["scrambled"] = message(session.swap.verify_checksums)
    seen["scrambled export"] = message(session.export, run_dir / "scrambled")
    session.hot_swap()
    seen["counts"] = (
        session.export(run_dir / "export"),
        len(list(session.engine.module.named_parameters())),
        session.swap.num_aliased(),
    )
    seen["greedy"] = answers(session)

    # --- a prefix cache of older weights
    long_prompts = [
        [token for k in range(3) for token in session.inputs.prompts[i + k]][:120] for i in range(4)
    ]
    answers(session, range(4), prompts=long_prompts)
    hidden = session.trainer.policy.weights[0].parameter
    old = hidden.detach().clone()
    with torch.no_grad():
        hidden.mul_(1.5)
    stale = answers(session, range(4), prompts=long_prompts)
    session.hot_swap()
    fresh = answers(session, range(4), prompts=long_prompts)
    session.hot_swap()
    seen["cache"] = (stale, fresh, answers(session, range(4), prompts=long_prompts))
    with torch.no_grad():
        hidden.copy_(old)
    session.hot_swap()
    seen["greedy again"] = answers(session)

    # --- swaps that go wrong
    right = session.swap._plan
    first = right.copies[0]
    query, key, value = first.blocks[:3]
    swapped = replace(key, target_start=value.target_start), replace(value, target_start=key.target_start)
    wrong = CopiedWeight(first.engine_name, first.source, first.axis, (query, *swapped, *first.blocks[3:]))
    session.swap._plan = replace(right, copies=(wrong, *right.copies[1:]))
    session.swap.fill()
    seen["wrong permutation"] = (message(session.hot_swap), message(session.export, run_dir / "wrong"))
    session.swap._plan = right
    session.swap.fill()
    session.hot_swap()
    with torch.no_grad():
        permuted[-1].data[0] += (
            1  # of 128 rows one: found by the comparison of all, and by the checksums in one of many swaps
        )
    seen["one row"] = message(session.swap.verify_full)
    seen["one row, sampled"] = []
    for _ in range(400):
        session.swap._num_swaps += 1
        seen["one row, sampled"].append(message(session.swap.verify_checksums))
    session.hot_swap()
    aliased = session.engine.module.get_parameter(right.aliases[3].engine_name)
    shared = aliased.data
    aliased.data = shared.clone()
    seen["no longer shared"] = (right.aliases[3].engine_name, message(session.swap.swap, session.engine))
    aliased.data = shared
    session.hot_swap()
    seen["mended"] = message(session.swap.verify_full) + message(session.export, run_dir / "mended")
    return seen


def fresh_answers(model: str, run: str) -> list[Any]:
    return answers(make_session(Path(run), model))


def transformers_greedy(model: str, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    eos = policy.config.eos_token_id
    found = []
    with torch.no_grad():
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(40):
                ids.append(int(policy(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == eos:
                    break
            found.append(tuple(ids[len(prompt) :]))
    return found


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hot_swap")


@pytest.fixture(scope="module")
def seen(run_dir: Path) -> dict[str, Any]:
    return run_ranks(1, observe_swaps, str(run_dir))[0]


def test_sampling_leaves_the_process_as_it_was(seen: dict[str, Any]) -> None:
    assert seen["random state untouched"] and seen["threads can be set"]


def test_sampling_is_reproducible_and_each_question_its_own(seen: dict[str, Any]) -> None:
    again, whole = seen["again"]
    assert [[t for t, _ in group] for group in again] == [[t for t, _ in group] for group in whole]
    alone, of_the_whole = seen["alone"]
    assert alone == of_the_whole
    assert seen["distinct"] > 12  # the samples of a question differ from one another
    assert all(
        len(tokens) == len(log_probs) and all(value <= 0 for value in log_probs)
        for group in whole
        for tokens, log_probs in group
    )


def test_an_interrupted_generation_leaves_a_clean_engine(seen: dict[str, Any]) -> None:
    assert seen["interrupted"]
    after, before = seen["after the interruption"]
    assert after == before


def test_rollouts_of_other_weights_are_refused(seen: dict[str, Any]) -> None:
    assert seen["stale"].startswith("AssertionError: rollouts of policy version [5] at version 0")
    assert seen["versions"] == [0, 3]


def test_answers_without_tokens_or_end_train_without_nan(seen: dict[str, Any]) -> None:
    loss, norm, updated, row = seen["strange"]
    assert updated and np.isfinite(loss) and np.isfinite(norm) and norm > 0
    numbers = [value for value in row.values() if isinstance(value, float)]
    assert np.isfinite(numbers).all() and np.isfinite(list(row["log_p_old"].values())).all()
    assert 0 < row["f_estimate"] < 1 and row["num_samples"] == 32


def test_trainer_and_engine_agree(seen: dict[str, Any]) -> None:
    assert seen["gap"] < 1e-4


def test_a_swap_restores_what_was_scrambled(seen: dict[str, Any]) -> None:
    assert seen["scrambled"].startswith("SwapMismatch: hot swap: rank 0: model.layers.0.self_attn.qkv_proj")
    assert seen["scrambled export"].startswith(
        "SwapMismatch: hot swap: rank 0: model.layers.0.self_attn.qkv_proj"
    )
    compared, parameters, aliased = seen["counts"]
    assert (
        compared == parameters and aliased == parameters - 8
    )  # weight and bias of four qkv projections are permuted


def test_a_fresh_engine_on_the_export_answers_bit_for_bit_the_same(
    seen: dict[str, Any], run_dir: Path
) -> None:
    fresh = run_ranks(1, fresh_answers, str(run_dir / "export"), str(run_dir / "fresh"))[0]
    assert fresh == seen["greedy"] == seen["greedy again"]
    untrained = run_ranks(1, fresh_answers, EMBEDDED, str(run_dir / "untrained"))[0]
    assert untrained != fresh


def test_the_export_answers_the_same_in_transformers(seen: dict[str, Any], run_dir: Path) -> None:
    from rlsc_mcore.config import ModelConfig
    from rlsc_mcore.data.questions import read_questions
    from rlsc_mcore.data.templates import render_prompt
    from rlsc_mcore.model.hf_checkpoint import load_tokenizer

    assert seen["counts"][0]
    tokenizer = load_tokenizer(run_dir / "export", ModelConfig(path="export"))
    prompts = [
        render_prompt("chat", question.text, tokenizer) for question in read_questions("embedded:train")[:6]
    ]
    assert run_ranks(1, transformers_greedy, str(run_dir / "export"), prompts)[0] == [
        group[0][0] for group in seen["greedy"]
    ]


def test_a_stale_prefix_cache_would_be_wrong_and_a_swap_resets_it(seen: dict[str, Any]) -> None:
    """`stale` and `fresh` were sampled with the same weights; only the cached keys and values of the prompt
    differ."""
    stale, fresh, again = seen["cache"]
    assert fresh == again
    first = [
        (s[0][0][0] != f[0][0][0], abs(s[0][1][0] - f[0][1][0])) for s, f in zip(stale, fresh, strict=True)
    ]
    assert any(
        other_token or difference > 1e-2 for other_token, difference in first
    )  # rounding alone is below 1e-4


def test_a_wrong_permutation_is_found(seen: dict[str, Any]) -> None:
    by_checksum, by_export = seen["wrong permutation"]
    # the first key's first element
    start = "SwapMismatch: hot swap: rank 0: model.layers.0.self_attn.qkv_proj.weight[128, 0] is "
    assert by_checksum.startswith(start) and "in the trainer" in by_checksum
    assert by_export.startswith(start) and "/wrong (" in by_export


def test_one_row_is_found_by_the_full_comparison_at_once_and_by_checksums_in_the_end(
    seen: dict[str, Any],
) -> None:
    start = "SwapMismatch: hot swap: rank 0: model.layers.3.self_attn.qkv_proj."
    assert seen["one row"].startswith(start)
    found = [message for message in seen["one row, sampled"] if message]
    assert found and all(message == seen["one row"] for message in found)
    assert len(found) < len(seen["one row, sampled"])


def test_a_parameter_that_is_no_longer_shared_is_named(seen: dict[str, Any]) -> None:
    name, found = seen["no longer shared"]
    assert found == f"SwapMismatch: hot swap: rank 0: {name} no longer shares the trainer's storage"
    assert seen["mended"] == ""


def test_rollouts_are_what_the_file_says() -> None:
    """The values that cross the stages keep their fields: files of older runs stay readable."""
    assert list(Rollout.__dataclass_fields__) == [
        "question_index", "sample_index", "prompt_ids", "response_ids", "engine_log_probs", "finish_reason", "policy_version", "text",
    ]  # fmt: skip
