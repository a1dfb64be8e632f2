"""Evaluate the engine's current weights: sample at each temperature, decode greedily, grade, score."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rlsc_mcore.config import Config
from rlsc_mcore.evaluation.records import AnswerRecord, QuestionRecord
from rlsc_mcore.evaluation.scores import GREEDY, HIGHEST_TEMPERATURE_SCORES, UNTEMPERED, score, score_key
from rlsc_mcore.grading.answers import Grade
from rlsc_mcore.grading.formats import grade_answers
from rlsc_mcore.observability.console import ProgressBar, ProgressBars
from rlsc_mcore.parallel.groups import Groups
from rlsc_mcore.rollout.engine import Completion, GenerationInterrupted, RolloutEngine, SamplingRequest
from rlsc_mcore.rollout.sampling import sample_seed
from rlsc_mcore.types import Question


def evaluate(
    engine: RolloutEngine,
    tokenizer: Any,
    questions: Sequence[Question],
    prompts: Sequence[Sequence[int]],
    config: Config,
    groups: Groups,
    progress: ProgressBars,
    *,
    label: str,
    max_new_tokens: int | None = None,
    stop_token_ids: Sequence[int] = (),
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Sample one greedy answer and `evaluation.num_samples` answers per temperature for each question; grade
    and score them.

    Collective over the world: each engine answers every `num_engines`-th question, and every rank returns the
    same result. Returns {"scores": name -> {"mean", "standard_error"}, "answers": [AnswerRecord],
    "questions": [QuestionRecord]}.

    Score names per temperature: `greedy`, `accuracy_t0.5` (strict: the last box), `lenient_t0.5` (without a
    box, the last number). At the highest temperature: `boxed_share`, `mean_length`, `truncated_share`,
    `distinct_share`. At temperature 1: `confidence_f` (F).

    The seeds do not depend on `label`, so evaluations before and after training are paired. `max_new_tokens`
    replaces `rollout.max_new_tokens`. `stop_token_ids` are stop tokens in addition to the engine's.
    `evaluation.grader` selects the rule for `strict`. Raises `GenerationInterrupted` soon after `should_stop`
    returns True.
    """
    local = range(groups.engine_index, len(questions), groups.num_engines)
    outcomes: dict[float, dict[int, list[AnswerRecord]]] = {}
    answers: list[AnswerRecord] = []
    temperatures = [GREEDY, *config.evaluation.temperatures]
    interrupted = False
    for temperature in temperatures:
        num_samples = 1 if temperature == GREEDY else config.evaluation.num_samples
        requests = [
            SamplingRequest(
                prompt_ids=prompts[i],
                num_samples=num_samples,
                temperature=temperature,
                max_new_tokens=min(
                    max_new_tokens or config.rollout.max_new_tokens, engine.max_model_len - len(prompts[i])
                ),
                seed=sample_seed(config.training.seed, f"evaluation/{temperature}", 0, questions[i].index),
                top_p=config.evaluation.top_p if temperature != GREEDY else 1.0,
                stop_token_ids=stop_token_ids,
                stop=config.evaluation.stop,
            )
            for i in local
        ]
        name = "greedy" if temperature == GREEDY else f"T={temperature:g}"
        with progress.bar(f"evaluating {label}, {name}, questions", len(requests)) as bar:
            try:
                completions = engine.generate(
                    requests, progress=_RequestCounter(bar), should_stop=should_stop
                )
            except GenerationInterrupted:
                interrupted = True
                break
        numbers = [sample for group in completions for sample in range(len(group))]
        asked_of = [questions[i] for i, group in zip(local, completions, strict=True) for _ in group]
        sampled = [completion for group in completions for completion in group]
        decoded = (
            tokenizer.decode(list(completion.token_ids), skip_special_tokens=True) for completion in sampled
        )
        texts = [text_before_stop(text, config.evaluation.stop) for text in decoded]
        grades = grade_answers(texts, asked_of, config.evaluation.grader)
        # The engine's log-probs are those of the sampling distribution if top_p is 1 and either the
        # temperature is 1 or the engine scores the tempered softmax.
        is_scored = config.evaluation.top_p == 1 and (
            temperature == UNTEMPERED or (engine.tempered and temperature != GREEDY)
        )
        record = partial(_record, temperature, is_scored)
        records = map(record, asked_of, numbers, sampled, texts, grades)
        graded = [[next(records) for _ in group] for group in completions]
        outcomes[temperature] = dict(zip(local, graded, strict=True))
        answers += [record for group in graded for record in group]
    if groups.any(interrupted):  # every rank must raise: the gather below is a collective
        raise GenerationInterrupted
    merged: dict[float, dict[int, list[AnswerRecord]]] = {temperature: {} for temperature in temperatures}
    rows: list[AnswerRecord] = []
    for part, part_answers in groups.gather_objects_over_engines((outcomes, answers)):
        for temperature in temperatures:
            merged[temperature].update(part[temperature])
        rows += part_answers
    asked = [
        QuestionRecord(
            question.index,
            question.text,
            question.answer or "",
            tokenizer.decode(list(prompt)),
            question.family,
        )
        for question, prompt in zip(questions, prompts, strict=True)
    ]
    rows.sort(key=lambda row: (temperatures.index(row.temperature), row.question, row.sample))
    return {"scores": _scores(merged, config.evaluation.temperatures), "answers": rows, "questions": asked}


class _RequestCounter:
    """Advance a bar by one for each finished request, with its number of tokens."""

    def __init__(self, bar: ProgressBar) -> None:
        self._bar = bar

    def advance(self, amount: int, tokens: int | None = None) -> None:
        self._bar.advance(1, amount)


def text_before_stop(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first stop string in it."""
    starts = [start for stop in stops if (start := text.find(stop)) >= 0]
    return text[: min(starts)] if starts else text


def _scores(
    outcomes: dict[float, dict[int, list[AnswerRecord]]], temperatures: Sequence[float]
) -> dict[str, Any]:
    by_temperature = {
        t: score([group for _, group in sorted(groups.items())]) for t, groups in outcomes.items()
    }
    scores: dict[str, Any] = {}
    for temperature in (GREEDY, *temperatures):
        for kind in ("accuracy", "lenient"):
            scores[score_key(kind, temperature)] = by_temperature[temperature][kind]
    if temperatures:
        highest = by_temperature[max(temperatures)]
        scores.update({name: highest[name] for name in HIGHEST_TEMPERATURE_SCORES})
    if "confidence_f" in by_temperature.get(UNTEMPERED, {}):
        scores["confidence_f"] = by_temperature[UNTEMPERED]["confidence_f"]
    return scores


def _record(
    temperature: float,
    is_scored: bool,
    question: Question,
    sample: int,
    completion: Completion,
    text: str,
    result: Grade,
) -> AnswerRecord:
    return AnswerRecord(
        question=question.index,
        temperature=temperature,
        sample=sample,
        gold=question.answer or "",
        text=text,
        extracted=result.extracted,
        strict=result.strict,
        lenient=result.lenient,
        boxed=result.boxed,
        truncated=completion.finish_reason == "length",
        tokens=len(completion.token_ids),
        log_prob=sum(completion.log_probs) if is_scored else None,
    )
