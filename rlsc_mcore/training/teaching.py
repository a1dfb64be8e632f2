"""Prompts and hidden states of a teacher: self-distillation across ranks, and the careless prompts of
`nsd`."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import torch

from rlsc_mcore.algorithm.self_distill import teach
from rlsc_mcore.config import Config
from rlsc_mcore.data.questions import Asked
from rlsc_mcore.data.templates import render_prompt
from rlsc_mcore.grading.rewards import classes_of_answers
from rlsc_mcore.model.build import Policy
from rlsc_mcore.ops.chunks import live_tokens
from rlsc_mcore.ops.head import gather_hidden
from rlsc_mcore.parallel.groups import Groups
from rlsc_mcore.training.inputs import RunInputs
from rlsc_mcore.training.starting_weights import StartingWeights
from rlsc_mcore.types import PackedBatch, Rollout


def gather_teaching(
    config: Config,
    inputs: RunInputs,
    groups: Groups,
    rollouts: Sequence[Rollout],
    places: Mapping[Asked, int],
) -> tuple[dict[tuple[int, int], float], dict[int, tuple[int, ...]]]:
    """Compare the answers of each question; collective over `engines_group`.

    Returns the value of every rollout (see algorithm/self_distill.py), by (position in the step, sample), and
    the teacher's prompt of every trained question, by question index. Engine `question % num_engines`
    compares all answers of a question; the other engines send it their text. A question whose teacher would
    exceed the model's context is not trained.
    """
    num_samples = config.rollout.num_samples
    parts: list[list[tuple[int, int, int, str, int, float]]] = [[] for _ in range(groups.num_engines)]
    for rollout in rollouts:
        place = places[rollout.question_index, rollout.sample_index // num_samples]
        length = len(rollout.response_ids)
        mean_log_prob = sum(rollout.engine_log_probs) / max(length, 1)
        row = (rollout.question_index, place, rollout.sample_index, rollout.text, length, mean_log_prob)
        parts[rollout.question_index % groups.num_engines].append(row)
    received = sorted(row for part in groups.exchange_objects_over_engines(parts) for row in part)
    by_question: dict[int, list[tuple[int, int, int, str, int, float]]] = {}
    for row in received:
        by_question.setdefault(row[0], []).append(row)
    values: list[list[float]] = []
    prompts: list[list[int]] = []
    for index, rows in by_question.items():
        texts, lengths = [row[3] for row in rows], [row[4] for row in rows]
        classes = classes_of_answers(texts, inputs.questions[index], config.algorithm.rewards)
        teaching = teach(classes, texts, lengths, [row[5] for row in rows], config.distill)
        taught = teaching.values
        if teaching.context is not None:
            text = config.distill.prompt.replace("{question}", inputs.questions[index].text)
            text = text.replace("{solution}", texts[teaching.context])
            prompt = teacher_prompt(config, inputs, text, max(lengths))
            if prompt is None:
                taught = [0.0] * len(rows)
            else:
                prompts += [[index, token] for token in prompt]
        values += [[row[1], row[2], value] for row, value in zip(rows, taught, strict=True)]
    value_table = torch.tensor(values, dtype=torch.float64).reshape(-1, 3)
    prompt_table = torch.tensor(prompts, dtype=torch.int64).reshape(-1, 2)
    contexts: dict[int, list[int]] = {}
    for index, token in torch.cat(groups.gather_tables_over_engines(prompt_table)).tolist():
        contexts.setdefault(index, []).append(token)
    everyone = torch.cat(groups.gather_tables_over_engines(value_table)).tolist()
    return (
        {(int(place), int(sample)): value for place, sample, value in everyone},
        {index: tuple(tokens) for index, tokens in contexts.items()},
    )


def careless_prompts(config: Config, inputs: RunInputs, indices: Iterable[int]) -> dict[int, tuple[int, ...]]:
    """Return the token ids of the careless prompt of `nsd` by question index; questions whose prompt exceeds
    the context have none."""
    found = {}
    for index in indices:
        text = config.algorithm.careless_prompt.replace("{question}", inputs.questions[index].text)
        prompt = teacher_prompt(config, inputs, text, config.rollout.max_new_tokens)
        if prompt is not None:
            found[index] = tuple(prompt)
    return found


def teacher_prompt(config: Config, inputs: RunInputs, text: str, answer_tokens: int) -> list[int] | None:
    """Render `text` as a question of the run.

    Returns None if an answer of `answer_tokens` tokens after it would exceed the model's context.
    """
    date = datetime.fromisoformat(inputs.record.date) if inputs.record is not None else None
    prompt = render_prompt(config.data.template, text, inputs.tokenizer, date)
    return prompt if len(prompt) + answer_tokens <= inputs.architecture.max_position_embeddings else None


class Teacher:
    """The weights that teach: the policy's current ones or those that it was built with."""

    def __init__(self, policy: Policy, *, keeps_start: bool) -> None:
        """Keep the starting weights of `policy` if `keeps_start`."""
        self._model = policy.model
        self.start = StartingWeights(policy) if keeps_start else None

    @torch.no_grad()
    def states(
        self, batch: PackedBatch, options: Mapping[str, Any]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the teacher's hidden states of the distilled tokens, [N, H], whole on every rank of the
        tensor-parallel group, and its output weight (None: the policy's).

        The hidden states are None if the batch distils nothing. `options` are the keyword arguments of the
        kernels. Collective over the tensor-parallel group.
        """
        teacher = batch.teacher
        if teacher is None:
            return None, None

        def head(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            whole = gather_hidden(hidden, options["group"], options["sequence_parallel"])
            live = live_tokens(teacher.response_mask, None, teacher.trained_lengths)
            # `weight` is a parameter, whose data changes after the pass with the starting weights.
            return whole.index_select(0, live.positions), weight.detach()

        if self.start is None:
            return self._model.score(teacher, head)[0], None
        with self.start.in_use():
            states, weight = self._model.score(teacher, head)
        return states, weight
