"""What a run reads before anything is built or written: model folder, tokenizer, questions; every bad input ends here."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsc_mcore.config import Config, ConfigError
from rlsc_mcore.data.questions import QuestionSampler, questions_fingerprint, read_questions
from rlsc_mcore.data.templates import check_prompt_lengths, render_prompt
from rlsc_mcore.grading.rewards import check_labels
from rlsc_mcore.model.architecture import check_fp8, check_head_dim, uses_transformer_engine
from rlsc_mcore.model.hf_checkpoint import check_vocabulary, check_weights, load_tokenizer, resolve_model_folder
from rlsc_mcore.model.shape import Architecture, check_parallel, check_stages, read_architecture
from rlsc_mcore.observability.wandb_log import check_wandb
from rlsc_mcore.parallel.backend import Backend
from rlsc_mcore.training.optimizer import check_optimizer
from rlsc_mcore.types import Question


@dataclass(frozen=True)
class RunInputs:
    """A run's model folder and data, checked against its configuration."""

    model_folder: Path
    architecture: Architecture
    tokenizer: Any
    questions: list[Question]
    fingerprint: str  # of the questions
    prompts: list[list[int]]
    evaluation_questions: list[Question]  # empty without evaluation.path
    evaluation_prompts: list[list[int]]
    max_model_len: int  # longest prompt and answer in tokens
    stop_token_ids: list[int]
    sampler: QuestionSampler


def read_inputs(config: Config, backend: Backend) -> RunInputs:
    """Read and check everything; no collective, nothing is written. Raises `ConfigError` naming field or file."""
    folder = resolve_model_folder(config.model.path)
    architecture = read_architecture(folder)
    tokenizer = load_tokenizer(folder, config.model)
    check_vocabulary(tokenizer, architecture, folder)
    check_weights(folder, architecture)
    check_parallel(architecture, config.parallel.tp, folder)
    check_parallel(architecture, config.rollout.tp or config.parallel.tp, folder, "rollout.tp")
    check_stages(architecture, config.parallel, folder)
    check_head_dim(architecture, backend, folder)
    # Refuse what cannot be had.
    uses_transformer_engine(config.model, backend)
    check_fp8(config.model, backend)
    check_optimizer(config, backend)
    check_wandb(config.observability.wandb_project)

    data, rollout, evaluation = config.data, config.rollout, config.evaluation
    questions = read_questions(data.path, split=data.split)
    check_labels(config.algorithm.objective, questions, data.path)
    prompts = [render_prompt(data.template, question.text, tokenizer) for question in questions]
    evaluation_questions = _evaluation_questions(config)
    evaluation_prompts = [render_prompt(data.template, question.text, tokenizer) for question in evaluation_questions]
    context = architecture.max_position_embeddings
    limit = rollout.max_model_len or context
    if limit > context:
        raise ConfigError(f"rollout.max_model_len: {limit} is more than the model's context of {context} tokens")
    check_prompt_lengths(prompts, limit - 1, questions, data.path)
    check_prompt_lengths(evaluation_prompts, limit - 1, evaluation_questions, str(evaluation.path))
    longest = max(len(prompt) for prompt in [*prompts, *evaluation_prompts])
    return RunInputs(
        model_folder=folder,
        architecture=architecture,
        tokenizer=tokenizer,
        questions=questions,
        fingerprint=questions_fingerprint(questions),
        prompts=prompts,
        evaluation_questions=evaluation_questions,
        evaluation_prompts=evaluation_prompts,
        max_model_len=min(limit, longest + rollout.max_new_tokens),
        stop_token_ids=_stop_token_ids(folder, tokenizer),
        sampler=QuestionSampler(len(questions), data.questions_per_step, data.shuffle, config.training.seed),
    )


def _evaluation_questions(config: Config) -> list[Question]:
    evaluation = config.evaluation
    if evaluation.path is None:
        return []
    questions = read_questions(evaluation.path, split=config.data.split, field="evaluation.path")[: evaluation.max_questions]
    ungraded = next((question for question in questions if question.answer is None), None)
    if ungraded is not None:
        raise ConfigError(f"evaluation.path: {evaluation.path}: question {ungraded.index} has no answer to grade against")
    return questions


def _stop_token_ids(folder: Path, tokenizer: Any) -> list[int]:
    """The ids that end an answer: the tokenizer's, and those of generation_config.json."""
    ids = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    file = folder / "generation_config.json"
    if file.is_file():
        extra = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        ids += [extra] if isinstance(extra, int) else list(extra or [])
    return sorted(set(ids))
