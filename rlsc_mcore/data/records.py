"""Parse one record of a question file from any supported data set; the fields of the record decide its kind.

Training and evaluation share this parser. Supported: mathematics with `answer` or a boxed `solution`,
OlympiadBench, multiple choice in the common layouts, GPQA, SVAMP.
"""

import hashlib
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rlsc_mcore.config import ConfigError
from rlsc_mcore.grading.choices import LETTERS
from rlsc_mcore.grading.extraction import extract_boxed
from rlsc_mcore.grading.latex import normalize
from rlsc_mcore.grading.words import single_letter
from rlsc_mcore.types import Question

TEXT_FIELDS = ("problem", "question", "Problem", "Question")
ANSWER_FIELDS = ("answer", "expected_answer", "Answer", "answerKey", "correct", "target")
OPTION_FIELDS = ("choices", "options")
IMAGE_FIELDS = ("image", "images", "image_1", "decoded_image", "image_path")
GPQA_FIELDS = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
EVALCHEMY_OPTION_SEED = 42  # gives the options of every GPQA question the same order

# Evalchemy's prompt for GPQA. `_with_choices` has the one of Qwen2.5-Math's script for multiple choice.
GPQA_TEXT = (
    "Return your final response within \\boxed{{}} and only include the letter choice (A, B, C, or D) as your final response.\n"
    "Problem: {problem}\nOptions: {options}\nAnswer:"
)

_GSM8K_MARKER = "####"
_GROUPED_NUMBER = re.compile(r"[-+]?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?")
_LARGEST_EXACT_FLOAT = 2.0**53
_OWN_LETTER = re.compile(r"\s*(?:\(([A-J])\)|([A-J])\s*[.):])\s*")
_INLINE_OPTION = re.compile(r"(?:^|\s)(?:\(([A-J])\)|([A-J])[.):])(?=\s|\S)")


def read_question(
    index: int, record: Any, place: str, *, needs_answer: bool = False, option_seed: int | None = None
) -> Question:
    """Parse one record into a question; raises ConfigError naming `place` and the field.

    `option_seed` shuffles GPQA's options in the same way for every question. Without it their order depends
    on the question's text.
    """
    if not isinstance(record, Mapping):
        raise ConfigError(f"{place}: expected a JSON object, got {type(record).__name__}")
    question = _read_text_and_answer(index, record, place, needs_answer, option_seed)
    family = record.get("family")
    return replace(question, family=family.strip()) if isinstance(family, str) else question


def _read_text_and_answer(
    index: int, record: Mapping[str, Any], place: str, needs_answer: bool, option_seed: int | None
) -> Question:
    text = _read_text(record, place)
    _check_no_image(record, place)
    if GPQA_FIELDS[0] in record:
        return _read_gpqa(index, record, text, place, option_seed)
    options = _read_options(record, place)
    if options is not None:
        letter = _read_letter(record, options, place, needs_answer=needs_answer)
        return Question(index, _with_choices(text, options), letter, answer_format="choice")
    if "final_answer" in record and not isinstance(record["final_answer"], str | int | float):
        return _read_olympiad(index, record, text, place)
    answer = _read_answer(record, place, needs_answer=needs_answer)
    if answer is None:
        return Question(index, text, None)
    letter = single_letter(normalize(answer))
    if letter is not None and letter in LETTERS and len(set(_inline_letters(text))) >= 2:
        return Question(index, text, letter, answer_format="choice")
    return Question(index, text, answer)


def final_answer(value: str | float) -> str:
    """Reduce an answer of a data set to its final value: "...#### 1,800" -> "1800", 27.0 -> "27", " 204" ->
    "204"."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= _LARGEST_EXACT_FLOAT:
        value = int(value)
    answer = str(value).rpartition(_GSM8K_MARKER)[2].strip()
    return answer.replace(",", "") if _GROUPED_NUMBER.fullmatch(answer) else answer


def _read_text(record: Mapping[str, Any], place: str) -> str:
    present = [name for name in TEXT_FIELDS if record.get(name) is not None]
    if not present:
        raise ConfigError(
            f"{place}: a question without text: expected `problem` or `question`, got {list_fields(record)}"
        )
    # Ignore an empty field if another field has text: some data sets contain both names but fill only one.
    filled = [name for name in present if not isinstance(record[name], str) or record[name].strip()]
    name = (filled or present)[0]
    text = record[name]
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"{place}: `{name}`: expected the question's text, got {shorten(text)}")
    for before in ("Body", "context"):
        if isinstance(record.get(before), str) and record[before].strip():
            text = _prefixed(record[before].strip(), text, before)
    check_encodable(text, name, place)
    return text.strip()


def _prefixed(before: str, text: str, name: str) -> str:
    if name == "context":
        return f"{before}\n{text}"
    return f"{before}{'' if before.endswith('.') else '.'} {text.strip()}"


def _check_no_image(record: Mapping[str, Any], place: str) -> None:
    name = next((name for name in IMAGE_FIELDS if record.get(name) not in (None, "", [], {})), None)
    if name is not None:
        raise ConfigError(
            f"{place}: `{name}`: this question needs an image, which a text model cannot be asked; leave the "
            "record out"
        )


def _read_answer(record: Mapping[str, Any], place: str, *, needs_answer: bool) -> str | None:
    name = next((name for name in (*ANSWER_FIELDS, "final_answer") if record.get(name) is not None), None)
    if name is None:
        boxed = extract_boxed(record["solution"]) if isinstance(record.get("solution"), str) else None
        if boxed is None and needs_answer:
            raise ConfigError(
                f"{place}: `answer`: expected a string or a number to grade against, or a `solution` with a "
                "box"
            )
        return boxed
    answer = record[name]
    if (
        isinstance(answer, bool)
        or not isinstance(answer, str | int | float)
        or (isinstance(answer, float) and not math.isfinite(answer))
    ):
        raise ConfigError(f"{place}: `{name}`: expected a string or a finite number, got {shorten(answer)}")
    reduced = final_answer(answer)
    if not reduced:
        raise ConfigError(f"{place}: `{name}`: empty; write the final answer or leave the field out")
    check_encodable(reduced, name, place)
    return reduced


def _read_options(record: Mapping[str, Any], place: str) -> list[str] | None:
    """Return the options of a multiple-choice question without their letters; None if the record has no
    options.

    Layouts: a list of texts, with or without letters; a list of objects with `text`; an object from letter to
    text; an object with lists `text` and `label`; one text such as "A) 1 B) 2"; fields `A`, `B`, `C`, `D` or
    `option_a` ... of the record.
    """
    name = next((name for name in OPTION_FIELDS if name in record), None)
    if name is None:
        for names in (
            LETTERS,
            [f"option_{letter}" for letter in LETTERS.lower()],
            [f"option{letter}" for letter in LETTERS],
        ):
            texts = [str(record[field]) for field in names if record.get(field) is not None]
            if len(texts) >= 2 and all(record.get(field) is not None for field in names[: len(texts)]):
                return _checked_options(texts, "A to " + LETTERS[len(texts) - 1], place)
        return None
    value = record[name]
    if (
        isinstance(value, Mapping)
        and isinstance(value.get("text"), Sequence)
        and not isinstance(value["text"], str)
    ):
        value = value["text"]
    elif isinstance(value, Mapping):
        value = [value[letter] for letter in sorted(value)]
    if isinstance(value, str):
        marks = list(_INLINE_OPTION.finditer(value))
        ends = [mark.start() for mark in marks[1:]] + [len(value)]
        value = [value[mark.end() : end] for mark, end in zip(marks, ends, strict=False)]
    if not isinstance(value, Sequence) or not 2 <= len(value) <= len(LETTERS):
        shown = "no options" if value in (None, [], "") else shorten(record[name])
        raise ConfigError(
            f"{place}: `{name}`: expected the 2 to {len(LETTERS)} options of this question, got {shown}"
        )
    return _checked_options(
        [option.get("text", option) if isinstance(option, Mapping) else option for option in value],
        name,
        place,
    )


def _checked_options(options: Sequence[Any], name: str, place: str) -> list[str]:
    if not all(isinstance(option, str | int | float) and str(option).strip() for option in options):
        raise ConfigError(f"{place}: `{name}`: expected the text of every option")
    texts = [str(option).strip() for option in options]
    for text in texts:
        check_encodable(text, name, place)
    own = [_OWN_LETTER.match(text) for text in texts]
    if all(match is not None and (match[1] or match[2]) == LETTERS[i] for i, match in enumerate(own)):
        texts = [text[match.end() :] for text, match in zip(texts, own, strict=True) if match is not None]
    return texts


def _read_letter(
    record: Mapping[str, Any], options: Sequence[str], place: str, *, needs_answer: bool
) -> str | None:
    """Return the letter of the correct option. The answer field holds an index from 0, a letter, or the text
    of an option."""
    name = next(
        (name for name in (*ANSWER_FIELDS, "label", "answer_idx") if record.get(name) is not None), None
    )
    if name is None:
        if needs_answer:
            raise ConfigError(
                f"{place}: `answer`: expected an index or a letter of the {len(options)} choices"
            )
        return None
    answer = record[name]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        return LETTERS[answer]
    letter = str(answer).strip().strip("().").upper()
    if letter.isdigit() and int(letter) < len(options):
        return LETTERS[int(letter)]
    if len(letter) == 1 and letter in LETTERS[: len(options)]:
        return letter
    texts = [option for option in options if option == str(answer).strip()]
    if len(texts) != 1:
        raise ConfigError(
            f"{place}: `{name}`: expected an index or a letter of the {len(options)} choices, got "
            f"{shorten(answer)}"
        )
    return LETTERS[options.index(texts[0])]


def _with_choices(text: str, options: Sequence[str]) -> str:
    """Append all options on one line, as Qwen2.5-Math's script does for MMLU-STEM."""
    return f"{text}\nAnswer Choices: " + " ".join(
        f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)
    )


def _read_gpqa(index: int, record: Mapping[str, Any], text: str, place: str, seed: int | None) -> Question:
    absent = next((name for name in GPQA_FIELDS if not isinstance(record.get(name), str)), None)
    if absent is not None:
        raise ConfigError(f"{place}: `{absent}`: expected the option's text")
    order = list(range(len(GPQA_FIELDS)))
    # The published order lists the correct answer first, so shuffle the options.
    random.Random(seed if seed is not None else hashlib.sha256(text.encode()).digest()).shuffle(order)
    options = ", ".join(
        f"{letter}) {record[GPQA_FIELDS[i]]}" for letter, i in zip(LETTERS, order, strict=False)
    )
    asked = GPQA_TEXT.format(
        problem=record["Question"] if isinstance(record.get("Question"), str) else text, options=options
    )
    return Question(index, asked, LETTERS[order.index(0)], answer_format="choice")


def _read_olympiad(index: int, record: Mapping[str, Any], text: str, place: str) -> Question:
    answers = record["final_answer"]
    if (
        not isinstance(answers, Sequence)
        or not answers
        or not all(isinstance(answer, str) and answer for answer in answers)
    ):
        raise ConfigError(f"{place}: `final_answer`: expected a list of answers")
    error = record.get("error")
    try:
        tolerance = max(float(part) for part in str(error).split(",")) if error not in (None, "") else None
    except ValueError:
        raise ConfigError(f"{place}: `error`: expected a number, got {shorten(error)}") from None
    return Question(index, text, ", ".join(answers), tolerance=tolerance)


def _inline_letters(text: str) -> list[str]:
    plain = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r" \1", text)
    return [first or second for first, second in _INLINE_OPTION.findall(plain)]


def check_encodable(text: str, name: str, place: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError(
            f"{place}: `{name}`: an unpaired surrogate (\\ud800 to \\udfff) is not text; remove it"
        )


def list_fields(record: Mapping[str, Any]) -> str:
    return (
        "the fields " + ", ".join(repr(str(name)[:40]) for name in list(record)[:8])
        if record
        else "no fields"
    )


def shorten(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
