"""Render prompt templates: convert a question's text to the token ids that the engine continues."""

from collections.abc import Collection, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import jinja2
import jinja2.sandbox

from rlsc_mcore.config import TEMPLATES, ConfigError
from rlsc_mcore.data.foreign_code import check_length, foreign_code
from rlsc_mcore.types import Question

# The system line and layout of Qwen2.5-Math's own chat template.
QWEN25_MATH = (
    "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
    "<|im_start|>user\n{question}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
# Evalchemy's prompt for its mathematics benchmarks, shown in the case studies of arXiv 2506.06395.
# `evalchemy` uses it as plain text; `evalchemy-chat` puts it in a user turn of the model's chat template, as
# Evalchemy does.
EVALCHEMY = "Problem: {question}\nMark your solution with \\boxed\nAnswer:"

PLAIN_TEMPLATES = ("evalchemy", "none")  # plain text; the tokenizer adds its tokens before it

_QUESTION = "{question}"
_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|eot|>", "<|END_OF_TURN_TOKEN|>")


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that prompts need."""

    chat_template: Any
    unk_token_id: Any
    added_tokens_decoder: Any

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool, **variables: Any
    ) -> Any: ...

    def convert_tokens_to_ids(self, tokens: Any) -> Any: ...

    def encode(self, text: Any, *, add_special_tokens: bool) -> Any: ...


def render_text(template: str, question: str, tokenizer: Tokenizer, date: datetime | None = None) -> str:
    """Return the prompt as text, with the special tokens of chat formats written out.

    `date` is passed to chat templates that show the date; default: now. Raises ConfigError naming
    data.template if the tokenizer lacks what the template needs.
    """
    if template == "chat":
        return _render_chat(question, tokenizer, date)
    if template == "qwen25-math":
        _require_chatml(tokenizer)
        return QWEN25_MATH.replace(_QUESTION, question)
    if template == "evalchemy-chat":
        return _render_chat(EVALCHEMY.replace(_QUESTION, question), tokenizer, date, template)
    if template == "evalchemy":
        return EVALCHEMY.replace(_QUESTION, question)
    if template == "none":
        return question
    if template.endswith(".jinja"):
        return _render_file(template, question, tokenizer)
    raise ConfigError(
        f"data.template: expected {', '.join(TEMPLATES)} or a file ending in .jinja, got {template!r}"
    )


def render_prompt(
    template: str, question: str, tokenizer: Tokenizer, date: datetime | None = None
) -> list[int]:
    """Return the token ids of the prompt.

    Chat formats contain every special token, so none is added. Plain text gets the tokens that the tokenizer
    adds before a text (such as a beginning-of-text token), but not those that it adds after a text, because a
    model has nothing to continue after an end-of-text token. `date`: see `render_text`.
    """
    with foreign_code(template):
        text = render_text(template, question, tokenizer, date)
    check_length(template, text)
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    if template not in PLAIN_TEMPLATES:
        return ids
    marked = list(tokenizer.encode(text, add_special_tokens=True))
    starts = range(len(marked) - len(ids) + 1)
    return next(
        (marked[: start + len(ids)] for start in starts if marked[start : start + len(ids)] == ids), marked
    )


def control_tokens(tokenizer: Tokenizer) -> list[str]:
    """Return the texts that the tokenizer converts to special tokens wherever they occur, longest first.

    Texts of one or two characters are excluded, because some tokenizers use a punctuation mark for padding.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    texts = {token.content for token in added if token.special and len(token.content.strip()) > 2}
    return sorted(texts, key=lambda text: (-len(text), text))


def find_control_tokens(questions: Sequence[Question], tokenizer: Tokenizer) -> list[tuple[int, str]]:
    """Return (position in `questions`, token) of every question whose text contains a control token.

    In a prompt such a text becomes a special token: it can end the question's turn or start a forged one.
    """
    tokens = control_tokens(tokenizer)
    pairs = [
        (place, token)
        for place, question in enumerate(questions)
        for token in tokens
        if token in question.text
    ]
    return list({place: (place, token) for place, token in reversed(pairs)}.values())[::-1]


def check_prompt_ends(
    prompts: Sequence[Sequence[int]],
    stop_token_ids: Collection[int],
    questions: Sequence[Question],
    source: str,
) -> None:
    """Raise ConfigError for the first prompt whose last token is a stop token, naming its question in
    `source`."""
    for prompt, question in zip(prompts, questions, strict=True):
        if prompt and prompt[-1] in stop_token_ids:
            raise ConfigError(
                f"{source}: question {question.index} (counted from 0): its prompt ends with token "
                f"{prompt[-1]}, which ends an "
                "answer; choose another data.template, or remove the token from the template"
            )


def check_prompt_lengths(
    prompts: Sequence[Sequence[int]], max_prompt_tokens: int, questions: Sequence[Question], source: str
) -> None:
    """Raise ConfigError for the first prompt that is empty or longer than `max_prompt_tokens`, naming its
    question in `source`."""
    for prompt, question in zip(prompts, questions, strict=True):
        place = f"{source}: question {question.index} (counted from 0)"
        if not prompt:
            raise ConfigError(
                f"{place}: its prompt has no tokens; choose another data.template or remove the question"
            )
        if len(prompt) > max_prompt_tokens:
            raise ConfigError(
                f"{place}: its prompt has {len(prompt)} tokens, the limit is {max_prompt_tokens}; "
                "remove or shorten the question, or raise rollout.max_model_len up to the model's context"
            )


def _render_chat(question: str, tokenizer: Tokenizer, date: datetime | None, template: str = "chat") -> str:
    if not tokenizer.chat_template:
        raise ConfigError(
            f"data.template: `{template}` needs a chat template and this tokenizer has none; use "
            "qwen25-math, evalchemy or none"
        )
    try:
        # Render text instead of ids: the return value of tokenize=True differs between transformers versions.
        # Templates get the date from `strftime_now`; a variable of that name overrides the library's
        # function.
        variables = {} if date is None else {"strftime_now": date.strftime}
        turns = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **variables)
    except jinja2.TemplateError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"data.template: `{template}`: the tokenizer's chat template failed ({reason}); use another "
            "template"
        ) from None
    return str(text)


def _render_file(file: str, question: str, tokenizer: Tokenizer) -> str:
    """Render a user's template in a sandbox. It has access to the question and the beginning-of-text token,
    not to the process."""
    try:
        source = Path(file).expanduser().read_text(encoding="utf-8")
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined, keep_trailing_newline=False
        )
        return environment.from_string(source).render(
            question=question, bos_token=getattr(tokenizer, "bos_token", None) or ""
        )
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"data.template: cannot read {file}: {reason}") from None
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"data.template: {file}, line {error.lineno}: {error.message}") from None
    except jinja2.TemplateError as error:
        raise ConfigError(
            f"data.template: {file}: {error} (a template may use `question` and `bos_token`)"
        ) from None


def _require_chatml(tokenizer: Tokenizer) -> None:
    missing = [
        token
        for token in _CHATML_TOKENS
        if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id)
    ]
    if missing:
        raise ConfigError(
            f"data.template: `qwen25-math` needs the token {missing[0]}, which this tokenizer lacks; use "
            "chat, evalchemy or none"
        )


def turn_end_ids(template: str, tokenizer: Any) -> list[int]:
    """Return the token that ends the model's turn under a template, as a list; empty if the template has no
    turns.

    The tokenizer's end token can be a different one: base models with a chat template often use an
    end-of-document token.
    """
    if template in ("chat", "evalchemy-chat"):
        with foreign_code(template):
            after = _text_after_answer(tokenizer)
        ids = list(tokenizer.encode(after, add_special_tokens=False)) if after else []
    elif template == "qwen25-math" or template.endswith(".jinja"):
        with foreign_code(template):
            shown = render_text(template, "", tokenizer)
        known = [token for token in _TURN_ENDS if token in shown]
        ids = [tokenizer.convert_tokens_to_ids(known[0])] if known else []
    else:
        return []
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return [token for token in ids[:1] if token in added and token != tokenizer.unk_token_id]


def _text_after_answer(tokenizer: Any) -> str:
    """Return the text that the chat template writes after an answer; empty if it rejects answers."""
    answer = "the answer itself"
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False))
    except jinja2.TemplateError:
        return ""
    return text.rpartition(answer)[2].lstrip()
