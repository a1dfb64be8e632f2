"""Templates: prompts against text written out by hand, token ids against a tokenizer with known ids, errors
by message."""

from datetime import datetime
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlsc_mcore.config import ConfigError
from rlsc_mcore.data.templates import (
    check_prompt_ends,
    check_prompt_lengths,
    control_tokens,
    find_control_tokens,
    render_prompt,
    render_text,
    turn_end_ids,
)
from rlsc_mcore.types import Question

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_LIKE = "{{ bos_token }}{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
BOS, IM_START, IM_END = 256, 257, 258


def make_tokenizer(
    chat_template: str | None, *, chatml_tokens: bool = True, adds_bos: bool = False, appends: bool = False
) -> PreTrainedTokenizerFast:
    """Build a tokenizer whose ids are the UTF-8 bytes of the text, followed by three special tokens."""
    byte_characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    character_of = {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + rank) for rank, byte in enumerate(others)
    }
    assert sorted(character_of.values()) == byte_characters
    backend = Tokenizer(
        models.BPE(vocab={character: byte for byte, character in character_of.items()}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.add_special_tokens(["<s>", "<|im_start|>", "<|im_end|>"] if chatml_tokens else ["<s>"])
    around = f"{'<s> ' if adds_bos else ''}$A{' <|im_end|>' if appends else ''}"
    if around != "$A":
        special = [("<s>", BOS), *([("<|im_end|>", IM_END)] if appends else [])]
        backend.post_processor = processors.TemplateProcessing(single=around, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", chat_template=chat_template)


def ids(*parts: str | int) -> list[int]:
    return [token for part in parts for token in (part.encode() if isinstance(part, str) else [part])]


def test_chat_is_the_tokenizers_own_with_the_generation_prompt() -> None:
    tokenizer = make_tokenizer(CHATML)
    assert (
        render_text("chat", "1+1?", tokenizer) == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    )
    expected = ids(IM_START, "user\n1+1?", IM_END, "\n", IM_START, "assistant\n")
    prompt = render_prompt("chat", "1+1?", tokenizer)
    assert prompt == expected and type(prompt) is list and all(type(token) is int for token in prompt)


def test_chat_template_that_spells_out_its_first_token_gets_one_only() -> None:
    tokenizer = make_tokenizer(LLAMA_LIKE, adds_bos=True)
    assert render_prompt("chat", "é", tokenizer) == ids(BOS, "[é]")


def test_qwen25_math_system_line_whatever_the_tokenizers_own_template() -> None:
    expected = ids(
        *(
            IM_START,
            "system\nPlease reason step by step, and put your final answer within \\boxed{}.",
            IM_END,
            "\n",
        ),
        *(IM_START, "user\nWhat is {x} + {question}?", IM_END, "\n", IM_START, "assistant\n"),
    )
    for chat_template in (CHATML, None):
        tokenizer = make_tokenizer(chat_template, adds_bos=True)
        assert render_prompt("qwen25-math", "What is {x} + {question}?", tokenizer) == expected


@pytest.mark.parametrize("adds_bos", [False, True])
def test_plain_templates_get_the_tokens_a_text_begins_with(adds_bos: bool) -> None:
    tokenizer = make_tokenizer(None, chatml_tokens=False, adds_bos=adds_bos)
    first = [BOS] if adds_bos else []
    assert render_prompt("none", "a {question}\n", tokenizer) == first + ids("a {question}\n")
    assert render_prompt("evalchemy", "a {question}", tokenizer) == first + ids(
        "Problem: a {question}\nMark your solution with \\boxed\nAnswer:"
    )


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("text", ["What is 2+3?", "a<|im_end|>", "<|im_end|>", " spaces ", "é\n"])
def test_no_prompt_ends_with_a_token_that_the_tokenizer_appends(adds_bos: bool, text: str) -> None:
    plain, appending = (
        make_tokenizer(CHATML, adds_bos=adds_bos),
        make_tokenizer(CHATML, adds_bos=adds_bos, appends=True),
    )
    for template in ("none", "evalchemy", "chat", "qwen25-math"):
        assert render_prompt(template, text, appending) == render_prompt(template, text, plain)
    assert appending.encode(text)[-1] == IM_END


DATED = "{{ strftime_now('%d %b %Y') }}{% for message in messages %}[{{ message['content'] }}]{% endfor %}"


def test_a_template_that_shows_the_day_shows_the_given_one() -> None:
    tokenizer = make_tokenizer(DATED)
    assert render_text("chat", "q", tokenizer, datetime(2024, 7, 5)) == "05 Jul 2024[q]"
    assert render_text("chat", "q", tokenizer) == f"{datetime.now():%d %b %Y}[q]"
    assert render_text("chat", "q", make_tokenizer(CHATML), datetime(2024, 7, 5)) == render_text(
        "chat", "q", make_tokenizer(CHATML)
    )


def test_control_tokens_in_questions_are_found() -> None:
    texts = [
        "plain",
        "x <|im_end|>\n<|im_start|>assistant\n",
        "a < b and |c|",
        "strike <s>this</s>",
        "<|im_ end|>",
    ]
    questions = [Question(index, text, None) for index, text in enumerate(texts)]
    assert find_control_tokens(questions, make_tokenizer(CHATML)) == [(1, "<|im_start|>"), (3, "<s>")]
    assert find_control_tokens(questions, make_tokenizer(None, chatml_tokens=False)) == [(3, "<s>")]


def test_a_short_padding_token_is_no_control_token() -> None:
    tokenizer = make_tokenizer(CHATML)
    tokenizer.add_special_tokens({"pad_token": "!"})
    assert control_tokens(tokenizer) == ["<|im_start|>", "<|im_end|>", "<s>"]


def test_a_prompt_that_ends_an_answer_is_refused() -> None:
    questions = [Question(0, "a", None), Question(4, "b", None)]
    check_prompt_ends([[1, 2], [2, 3]], [7], questions, "q.jsonl")
    with pytest.raises(
        ConfigError,
        match=r"^q\.jsonl: question 4 \(counted from 0\): its prompt ends with token 7, which ends an answer",
    ):
        check_prompt_ends([[7, 2], [2, 7]], [7], questions, "q.jsonl")


def test_evalchemy_asks_in_a_users_turn() -> None:
    turn = "Problem: 1+1?\nMark your solution with \\boxed\nAnswer:"
    assert (
        render_text("evalchemy-chat", "1+1?", make_tokenizer(CHATML))
        == f"<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(ConfigError, match=r"^data\.template: `evalchemy-chat` needs a chat template"):
        render_text("evalchemy-chat", "1+1?", make_tokenizer(None))


def test_missing_chat_template_names_the_field_and_the_way_out() -> None:
    with pytest.raises(ConfigError) as caught:
        render_prompt("chat", "q", make_tokenizer(None))
    assert str(caught.value) == (
        "data.template: `chat` needs a chat template and this tokenizer has none; use qwen25-math, evalchemy "
        "or none"
    )


@pytest.mark.parametrize(
    "broken",
    ["{{ raise_exception('only system messages\nhere') }}", "{% for %}", "{{ messages[0].absent.deeper }}"],
)
def test_failing_chat_template_is_a_one_line_error(broken: str) -> None:
    with pytest.raises(ConfigError) as caught:
        render_prompt("chat", "q", make_tokenizer(broken))
    assert str(caught.value).startswith(
        "data.template: `chat`: the tokenizer's chat template failed ("
    ) and "\n" not in str(caught.value)


def test_qwen25_math_needs_chatml_tokens() -> None:
    with pytest.raises(ConfigError) as caught:
        render_prompt("qwen25-math", "q", make_tokenizer(CHATML, chatml_tokens=False))
    assert str(caught.value) == (
        "data.template: `qwen25-math` needs the token <|im_start|>, which this tokenizer lacks; use chat, "
        "evalchemy or none"
    )


def test_unknown_template() -> None:
    with pytest.raises(ConfigError) as caught:
        render_prompt("alpaca", "q", make_tokenizer(None))
    assert str(caught.value) == (
        "data.template: expected chat, qwen25-math, evalchemy, evalchemy-chat, none or a file ending in "
        ".jinja, got 'alpaca'"
    )


def test_prompt_lengths() -> None:
    questions = [Question(3, "short", None), Question(7, "long", None)]
    check_prompt_lengths([[1] * 4, [1] * 5], 5, questions, "gsm8k.jsonl")
    with pytest.raises(ConfigError) as caught:
        check_prompt_lengths([[1] * 4, [1] * 6], 5, questions, "gsm8k.jsonl")
    assert str(caught.value) == (
        "gsm8k.jsonl: question 7 (counted from 0): its prompt has 6 tokens, the limit is 5; "
        "remove or shorten the question, or raise rollout.max_model_len up to the model's context"
    )
    with pytest.raises(
        ConfigError, match=r"^gsm8k\.jsonl: question 3 \(counted from 0\): its prompt has no tokens"
    ):
        check_prompt_lengths([[], [1]], 5, questions, "gsm8k.jsonl")


def test_evalchemy_chat_is_the_same_prompt_in_a_user_turn() -> None:
    tokenizer = make_tokenizer(CHATML)
    assert render_text("evalchemy-chat", "1+1?", tokenizer) == render_text(
        "chat", render_text("evalchemy", "1+1?", tokenizer), tokenizer
    )


def test_the_token_that_ends_a_turn_is_the_templates_whatever_the_tokenizer_ends_texts_with(
    tmp_path: Path,
) -> None:
    tokenizer = make_tokenizer(CHATML)
    tokenizer.eos_token = "<s>"
    (tmp_path / "mine.jinja").write_text(
        "<|im_start|>user\n{{ question }}<|im_end|>\n<|im_start|>assistant\n", encoding="utf-8"
    )
    (tmp_path / "plain.jinja").write_text("Q: {{ question }}\nA:", encoding="utf-8")
    for template in ("chat", "evalchemy-chat", "qwen25-math", str(tmp_path / "mine.jinja")):
        assert turn_end_ids(template, tokenizer) == [IM_END], template
    for template in ("none", "evalchemy", str(tmp_path / "plain.jinja")):
        assert turn_end_ids(template, tokenizer) == [], template
    assert turn_end_ids("chat", make_tokenizer(LLAMA_LIKE)) == []  # its turns end with text
