"""Read and check model folder, tokenizer and questions before anything is built or written."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsc_mcore.config import Config, ConfigError, DataConfig
from rlsc_mcore.data.offline import encode_answers, read_offline
from rlsc_mcore.data.questions import QuestionSampler, questions_fingerprint, read_questions, read_records
from rlsc_mcore.data.templates import (
    check_prompt_ends,
    check_prompt_lengths,
    find_control_tokens,
    render_prompt,
    turn_end_ids,
)
from rlsc_mcore.grading.reward_hook import check_reward_function
from rlsc_mcore.grading.rewards import check_labels
from rlsc_mcore.model.architecture import check_fp8, check_head_dim, uses_transformer_engine
from rlsc_mcore.model.hf_checkpoint import (
    check_vocabulary,
    check_weights,
    left_over_weights,
    load_tokenizer,
    resolve_model_folder,
    weight_files,
)
from rlsc_mcore.model.shape import Architecture, check_parallel, check_stages, read_architecture
from rlsc_mcore.objectives import OBJECTIVES
from rlsc_mcore.observability.trackers import check_trackers
from rlsc_mcore.parallel.backend import Backend
from rlsc_mcore.training.input_record import InputRecord, check_unchanged, digest_inputs, prompt_date
from rlsc_mcore.training.optimizer import check_optimizer
from rlsc_mcore.training.stop_rules import stop_conditions
from rlsc_mcore.types import OfflineAnswer, Question


@dataclass(frozen=True)
class RunInputs:
    """Hold a run's model folder and data, checked against its configuration."""

    model_folder: Path
    architecture: Architecture
    tokenizer: Any
    questions: list[Question]  # empty for an evaluation without training
    prompts: list[list[int]]
    offline: list[tuple[OfflineAnswer, ...]]  # answers of each question; empty if the objective samples
    offline_ids: list[tuple[tuple[int, ...], ...]]  # their token ids
    evaluation_questions: list[Question]  # empty without evaluation.path
    evaluation_prompts: list[list[int]]
    max_model_len: int  # longest prompt plus longest answer, in tokens
    stop_token_ids: list[int]
    sampler: QuestionSampler
    record: InputRecord | None  # compared on resume; None for an evaluation without training
    warnings: tuple[str, ...]  # about inputs that are accepted but may be mistakes

    @property
    def fingerprint(self) -> str:
        """Return the digest of the training questions."""
        return questions_fingerprint(self.questions)


def read_inputs(
    config: Config, backend: Backend, asked_prompts: Sequence[list[int]] | None = None
) -> RunInputs:
    """Read and check all inputs; writes nothing, no collective. Raises `ConfigError` naming field or file.

    `asked_prompts` are all prompts of an evaluation without training, as token ids; the questions of the
    configuration are then not read. If `config.run_dir` already holds the run, its inputs must equal those
    that it started with.
    """
    folder = resolve_model_folder(config.model.path)
    architecture = read_architecture(folder)
    tokenizer = load_tokenizer(folder, config.model)
    check_vocabulary(tokenizer, architecture, folder)
    check_weights(folder, architecture)
    check_parallel(architecture, config.parallel.tp, folder)
    check_parallel(architecture, config.rollout.tp or config.parallel.tp, folder, "rollout.tp")
    check_stages(architecture, config.parallel, folder)
    check_head_dim(architecture, backend, folder)
    # Refuse options that this machine does not support.
    uses_transformer_engine(config.policy_model, backend)
    check_fp8(config.policy_model, backend)
    check_optimizer(config, backend)
    check_trackers(config.observability)
    stop_conditions(config)

    data, rollout, evaluation = config.data, config.rollout, config.evaluation
    stop_token_ids = answer_end_ids(folder, tokenizer, data.template)
    warnings = [*_model_warnings(folder), *_end_warnings(stop_token_ids, folder)]
    context = architecture.max_position_embeddings
    limit = rollout.max_model_len or context
    if limit > context:
        raise ConfigError(
            f"rollout.max_model_len: {limit} is more than the model's context of {context} tokens"
        )
    questions: list[Question] = []
    offline: list[tuple[OfflineAnswer, ...]] = []
    offline_ids: list[tuple[tuple[int, ...], ...]] = []
    evaluation_questions: list[Question] = []
    prompts, evaluation_prompts = list(asked_prompts or []), list[list[int]]()
    record = None
    if asked_prompts is None:
        date = prompt_date(Path(config.run_dir))

        def render(asked: Sequence[Question], source: str) -> list[list[int]]:
            rendered = [render_prompt(data.template, question.text, tokenizer, date) for question in asked]
            check_prompt_lengths(rendered, limit - 1, asked, source)
            check_prompt_ends(rendered, stop_token_ids, asked, source)
            return rendered

        objective = OBJECTIVES[config.algorithm.objective]
        if objective.is_offline:
            questions, offline = read_offline(data.path, objective, split=data.split)
        else:
            questions = read_questions(data.path, split=data.split)
        reward_function = ""
        if config.algorithm.reward_function is None:
            check_labels(config.algorithm.objective, questions, data.path)
        else:
            reward_function = check_reward_function(config.algorithm.reward_function)
        evaluation_questions = _evaluation_questions(config)
        warnings += _control_warnings(questions, tokenizer, data, "data.path", data.path)
        warnings += _control_warnings(
            evaluation_questions, tokenizer, data, "evaluation.path", str(evaluation.path)
        )
        prompts = render(questions, data.path)
        offline_ids = encode_answers(offline, prompts, tokenizer, data.template, limit) if offline else []
        evaluation_prompts = render(evaluation_questions, str(evaluation.path))
        digests = digest_inputs(
            folder,
            questions,
            prompts,
            evaluation_questions,
            evaluation_prompts,
            stop_token_ids,
            offline,
            reward_function,
        )
        check_unchanged(Path(config.run_dir), digests)
        record = InputRecord(date.isoformat(), digests)
    longest = max(len(prompt) for prompt in [*prompts, *evaluation_prompts])
    warnings += _room_warnings([*prompts, *evaluation_prompts], limit, rollout.max_new_tokens)
    return RunInputs(
        model_folder=folder,
        architecture=architecture,
        tokenizer=tokenizer,
        questions=questions,
        prompts=prompts,
        offline=offline,
        offline_ids=offline_ids,
        evaluation_questions=evaluation_questions,
        evaluation_prompts=evaluation_prompts,
        max_model_len=min(limit, longest + rollout.max_new_tokens),
        stop_token_ids=stop_token_ids,
        sampler=QuestionSampler(len(prompts), data.questions_per_step, data.shuffle, config.training.seed),
        record=record,
        warnings=tuple(warnings),
    )


def answer_end_ids(folder: Path, tokenizer: Any, template: str) -> list[int]:
    """Return the ids that end an answer: those of the model folder, and the end of a turn under `template`.

    Raises `ConfigError` if `eos_token_id` in a file of the folder is invalid.
    """
    return sorted({*_stop_token_ids(folder, tokenizer), *turn_end_ids(template, tokenizer)})


def _model_warnings(folder: Path) -> list[str]:
    left_over = left_over_weights(folder)
    if not left_over:
        return []
    read = ", ".join(file.name for file in weight_files(folder)[:3])
    return [
        f"model.path: {folder}: {', '.join(left_over[:5])} not read; the weights are those of {read}, as "
        "transformers reads them"
    ]


def _end_warnings(stop_token_ids: Sequence[int], folder: Path) -> list[str]:
    if stop_token_ids:
        return []
    return [
        f"model.path: {folder}: no token is known to end an answer (no eos_token in tokenizer_config.json, "
        "generation_config.json or config.json): every answer runs to rollout.max_new_tokens"
    ]


def _room_warnings(prompts: Sequence[Sequence[int]], limit: int, max_new_tokens: int) -> list[str]:
    """Report how many prompts leave less than `max_new_tokens` of the context for their answers."""
    short = [len(prompt) for prompt in prompts if len(prompt) + max_new_tokens > limit]
    if not short:
        return []
    return [
        f"{len(short)} of {len(prompts)} prompts leave fewer than rollout.max_new_tokens = {max_new_tokens} "
        "tokens of the "
        f"context of {limit}: their answers are cut earlier, the earliest after {limit - max(short)}"
    ]


def _control_warnings(
    questions: Sequence[Question], tokenizer: Any, data: DataConfig, field: str, path: str
) -> list[str]:
    """Refuse control tokens in the questions' text, naming file and line.

    With the template "none", which passes text unchanged, return a warning instead.
    """
    found = find_control_tokens(questions, tokenizer)
    if not found:
        return []
    position, token = found[0]
    records = itertools.islice(
        read_records(path, split=data.split, field=field), questions[position].index, None
    )
    place = next(records)[0]
    more = f" ({len(found) - 1} more questions hold some)" if len(found) > 1 else ""
    message = (
        f"{place}: the text holds the control token {token!r}{more}, which the model does not read as text"
    )
    if data.template == "none":
        return [message]
    raise ConfigError(
        f"{message}: it would end or forge a turn of the prompt; remove it, or use data.template none if it "
        "is meant"
    )


def _evaluation_questions(config: Config) -> list[Question]:
    evaluation = config.evaluation
    if evaluation.path is None:
        return []
    questions = read_questions(evaluation.path, split=config.data.split, field="evaluation.path")[
        : evaluation.max_questions
    ]
    ungraded = next((question for question in questions if question.answer is None), None)
    if ungraded is not None:
        raise ConfigError(
            f"evaluation.path: {evaluation.path}: question {ungraded.index} has no answer to grade against"
        )
    return questions


def _stop_token_ids(folder: Path, tokenizer: Any) -> list[int]:
    """Return the ids that end an answer: of the tokenizer, generation_config.json and config.json.

    Raises `ConfigError` naming the file if `eos_token_id` is neither an id nor a list of ids.
    """
    ids = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            extra = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"{file}: not a JSON object: {error}") from None
        named = extra if isinstance(extra, list) else [] if extra is None else [extra]
        if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in named):
            raise ConfigError(f"{file}: eos_token_id: expected a token id or a list of them, got {extra!r}")
        ids += named
    return sorted(set(ids))
