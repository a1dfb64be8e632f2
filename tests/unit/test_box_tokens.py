"""Tokens inside the last box: what is left of the decoded answer, and what is masked."""

import pytest

from rlsc_mcore.config import ModelConfig
from rlsc_mcore.grading.box_tokens import box_tokens
from rlsc_mcore.grading.extraction import extract_boxed
from rlsc_mcore.model.hf_checkpoint import load_tokenizer, resolve_model_folder


def characters(text: str) -> tuple[list[int], dict[int, str]]:
    return list(range(len(text))), dict(enumerate(text))


@pytest.mark.parametrize(
    "text",
    [
        "so \\boxed{42}.",
        "\\boxed{1} no, \\boxed{\\frac{1}{2}} it is" + " indeed" * 40,
        "\\boxed{ 7 }",
        "\\boxed 9 or so",
        "\\fbox{x+1}$",
        "the \\boxed{\\text{caf\u00e9 \u2211}}",
    ],
)
def test_the_content_of_the_last_box_is_found_character_by_character(text: str) -> None:
    ids, letters = characters(text)
    inside = box_tokens(ids, lambda part: "".join(letters[i] for i in part))
    assert "".join(text[i] for i in inside) == extract_boxed(text)


@pytest.mark.parametrize("text", ["no box", "", "\\boxed{", "\\boxed{}", "\\boxed{4" + "}" * 0])
def test_nothing_is_masked_without_a_complete_box(text: str) -> None:
    ids, letters = characters(text)
    assert not box_tokens(ids, lambda part: "".join(letters[i] for i in part))


@pytest.mark.parametrize("answer", ["42", "1234567", "\\frac{3}{4}", "\u221a2"])
@pytest.mark.parametrize("after", ["", ".", " is the answer.\n\nDone " * 20])
def test_with_a_real_tokenizer(answer: str, after: str) -> None:
    path = "embedded:tiny_qwen2"
    tokenizer = load_tokenizer(resolve_model_folder(path), ModelConfig(path=path))
    ids = tokenizer.encode(f"First \\boxed{{0}}, then 20 + 22, so \\boxed{{{answer}}}{after}")
    inside = box_tokens(ids, tokenizer.decode)
    masked = tokenizer.decode([ids[i] for i in inside])
    assert answer in masked and len(masked) <= len(answer) + 2  # at most the braces, in tokens of both
    outside = tokenizer.decode([token for i, token in enumerate(ids) if i not in inside])
    assert outside.startswith("First \\boxed{0}, then 20 + 22, so \\boxed") and answer not in outside
