"""Read the files of a run for `rlsc report`, and pair its answers before and after training."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlsc_mcore.config import Config, ConfigError
from rlsc_mcore.config_file import changed_fields, load_config, parse_config
from rlsc_mcore.data.questions import read_questions
from rlsc_mcore.evaluation.over_seeds import metric_names, seed_average
from rlsc_mcore.evaluation.records import AnswerRecord, question_means, read_answers, read_question_records
from rlsc_mcore.evaluation.sampling_scores import calibration
from rlsc_mcore.evaluation.scores import score_label
from rlsc_mcore.evaluation.statistics import paired_change
from rlsc_mcore.grading.formats import grade_answers
from rlsc_mcore.observability.metrics import read_metrics
from rlsc_mcore.observability.mismatch import coarser
from rlsc_mcore.reports.contents import (
    AnswerGroup,
    Calibration,
    Change,
    QuestionView,
    RunView,
    Sampling,
    Step,
)
from rlsc_mcore.run.folder import config_file

MOST_GRADED_ROLLOUTS = 20_000  # per run, over all steps; grading them takes seconds even with algebra


def read_run(folder: Path) -> RunView:
    """Read the files of a run, which may be unfinished; raises ConfigError naming a missing or damaged
    file."""
    config = load_config(config_file(folder))
    before, after = (read_answers(folder / "evaluation", name) for name in ("before", "after"))
    summary = _read_json(folder / "summary.json")
    return RunView(
        name=folder.resolve().name,
        folder=str(folder),
        settings=_settings(config),
        metrics=read_metrics(folder),
        changes=changes(before, after, config.evaluation.temperatures),
        num_questions=len({answer.question for answer in before}),
        questions=question_views(
            before,
            after,
            {i: q.text for i, q in read_question_records(folder / "evaluation", "before").items()},
        ),
        steps=_steps(folder, config),
        versions=summary.get("versions", {}),
        seconds=summary.get("seconds", {}),
        planned_steps=config.training.num_steps,
        calibrations=[
            found
            for side, part in (("before", before), ("after", after))
            if (found := _calibration(side, part)) is not None
        ],
        dtype=coarser(config.model.dtype, config.rollout.dtype or config.model.dtype),
    )


def changes(
    before: Sequence[AnswerRecord], after: Sequence[AnswerRecord], temperatures: Sequence[float]
) -> list[Change]:
    """Return the change of every score, paired by question; without answers after training, only the values
    before."""
    hottest = max(temperatures, default=0.0)
    names = dict(metric_names(temperatures))
    names |= {"truncated_share": (hottest, "truncated"), "distinct_share": (hottest, "distinct")}
    found = []
    for name, (temperature, field) in names.items():
        first, second = _means(before, temperature, field), _means(after, temperature, field)
        if not first:
            continue
        label, digits = capitalised(score_label(name)), 1 if name == "mean_length" else 3
        start = paired_change(dict.fromkeys(first, 0.0), first)
        if not first.keys() & second.keys():
            found.append(Change(name, label, start.mean, None, start.standard_error, digits=digits))
            continue
        end, change = paired_change(dict.fromkeys(second, 0.0), second), paired_change(first, second)
        found.append(
            Change(
                name=name,
                label=label,
                before=start.mean,
                after=end.mean,
                before_error=start.standard_error,
                after_error=end.standard_error,
                difference=change.mean,
                low=change.low if math.isfinite(change.low) else None,
                high=change.high if math.isfinite(change.high) else None,
                p_value=change.p_value,
                digits=digits,
            )
        )
    return found


def question_views(
    before: Sequence[AnswerRecord], after: Sequence[AnswerRecord], texts: Mapping[int, str]
) -> list[QuestionView]:
    """Group the equal answers of every question; return the questions, those with the largest change
    first."""
    sides = [_by_question(before), _by_question(after)]
    views = []
    for index in sorted(sides[0].keys() | sides[1].keys()):
        temperatures = sorted(
            {temperature for side in sides for temperature in side.get(index, {})}, reverse=True
        )
        samplings, moved = [], []
        for temperature in temperatures:
            first, second = (side.get(index, {}).get(temperature, []) for side in sides)
            samplings.append(Sampling(temperature, _grouped(first, second), _grouped(second, first)))
            if first and second:
                moved.append(_moved(first, second))
        sampled = [
            [a for t, part in side.get(index, {}).items() if t > 0 or len(temperatures) == 1 for a in part]
            for side in sides
        ]
        shares = [sum(answer.strict for answer in part) / len(part) if part else 0.0 for part in sampled]
        gold = next(answer.gold for side in sides for part in side.get(index, {}).values() for answer in part)
        change = sum(moved) / len(moved) if moved else 0.0
        views.append(
            QuestionView(
                index, texts.get(index, f"question {index}"), gold, shares[0], shares[1], change, samplings
            )
        )
    return sorted(views, key=lambda view: (-view.moved, view.index))


def _calibration(side: str, answers: Sequence[AnswerRecord]) -> Calibration | None:
    """Return the calibration at the highest temperature whose answers all have a log-prob, or None."""
    sampled = {answer.temperature for answer in answers if answer.temperature > 0}
    scored = sampled - {answer.temperature for answer in answers if answer.log_prob is None}
    if not scored:
        return None
    found = calibration({index: parts.get(max(scored), []) for index, parts in _by_question(answers).items()})
    total, curve, below = sum(part["count"] for part in found["bins"]), [], 0
    for part in found["bins"]:
        curve.append((100.0 * (below + part["count"] / 2) / total, part["confidence"], part["accuracy"]))
        below += part["count"]
    return Calibration(side, max(scored), curve, found["auroc"], found["auroc_within"])


def _means(answers: Sequence[AnswerRecord], temperature: float, field: str) -> dict[int, float]:
    if field == "distinct":
        texts: dict[int, list[str]] = {}
        for answer in answers:
            if answer.temperature == temperature:
                texts.setdefault(answer.question, []).append(answer.text)
        return {question: len(set(part)) / len(part) for question, part in texts.items()}
    if field == "probability":
        return seed_average([answers], temperature, field)
    return question_means(answers, temperature, field)


def _by_question(answers: Sequence[AnswerRecord]) -> dict[int, dict[float, list[AnswerRecord]]]:
    found: dict[int, dict[float, list[AnswerRecord]]] = {}
    for answer in answers:
        found.setdefault(answer.question, {}).setdefault(answer.temperature, []).append(answer)
    return found


def _grouped(answers: Sequence[AnswerRecord], others: Sequence[AnswerRecord]) -> list[AnswerGroup]:
    elsewhere = {answer.text for answer in others}
    groups: dict[str, list[AnswerRecord]] = {}
    for answer in answers:
        groups.setdefault(answer.text, []).append(answer)
    made = [
        AnswerGroup(
            text=text,
            count=len(members),
            is_right=members[0].strict,
            is_boxed=members[0].boxed,
            is_truncated=members[0].truncated,
            extracted=members[0].extracted,
            tokens=members[0].tokens,
            log_prob=members[0].log_prob,
            is_only_here=bool(others) and text not in elsewhere,
        )
        for text, members in groups.items()
    ]
    return sorted(
        made, key=lambda group: (-group.count, -(group.log_prob if group.log_prob is not None else -math.inf))
    )


def _moved(before: Sequence[AnswerRecord], after: Sequence[AnswerRecord]) -> float:
    """Return the total variation distance between the final answers: 0 for equal frequencies, 1 if none is
    shared."""
    shares: dict[str | None, float] = {}
    for answers, sign in ((before, 1.0), (after, -1.0)):
        for answer in answers:
            shares[answer.extracted] = shares.get(answer.extracted, 0.0) + sign / len(answers)
    return sum(abs(value) for value in shares.values()) / 2


def _steps(folder: Path, config: Config) -> list[Step]:
    """Grade a sample of each step's saved answers; return [] if no answers were saved."""
    files = sorted((folder / "rollouts").glob("step_*.jsonl"))
    steps = sorted({int(file.name[5:11]) for file in files})
    try:
        read = read_questions(config.data.path, split=config.data.split)
        golds = {question.index: question for question in read if question.answer}
    except ConfigError:  # the question file cannot be read: the report has no accuracy curve
        golds = {}
    most = max(1, MOST_GRADED_ROLLOUTS // max(1, len(steps)))
    found = []
    for step in steps:
        rows = [row for file in files if int(file.name[5:11]) == step for row in _read_rows(file)]
        graded = [row for row in rows[:: max(1, len(rows) // most)] if row["question"] in golds]
        right = [
            result.strict
            for result in grade_answers(
                [row["text"] for row in graded], [golds[row["question"]] for row in graded]
            )
        ]
        tokens = sum(len(row["response_ids"]) for row in rows)
        entropy = -sum(row["engine_log_prob"] for row in rows) / tokens if tokens else None
        found.append(Step(step, sum(right) / len(right) if right else None, entropy))
    return found


def _read_rows(file: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ConfigError(f"{file}, line {number}: malformed JSON ({error})") from None
    return rows


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ConfigError(f"{file}: malformed JSON ({error})") from None


def capitalised(text: str) -> str:
    """Return `text` with its first letter in upper case and the other letters unchanged."""
    return text[:1].upper() + text[1:]


def _settings(config: Config) -> list[tuple[str, str]]:
    defaults = parse_config(["--run-dir", "-", "--model.path", "-", "--data.path", "-"])
    pairs = [change.partition(": ") for change in changed_fields(defaults, config)]
    return [(name, value.partition(" -> ")[2]) for name, _, value in pairs]
