"""Prompt templates: a question's text becomes the token ids that the engine continues."""

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
# The prompt that Evalchemy gives its mathematics benchmarks, shown in the case studies of arXiv 2506.06395:
# as plain text here, in a user turn of the model's chat template (which Evalchemy does) with
# `evalchemy-chat`.
EVALCHEMY = "Problem: {question}\nMark your solution with \\boxed\nAnswer:"

PLAIN_TEMPLATES = ("evalchemy", "none")  # text, before which the tokenizer puts its own tokens

_QUESTION = "{question}"
_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|eot|>", "<|END_OF_TURN_TOKEN|>")


class Tokenizer(Protocol):
    """What prompts need of a Hugging Face tokenizer."""

    chat_template: Any
    unk_token_id: Any
    added_tokens_decoder: Any

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool, **variables: Any
    ) -> Any: ...

    def convert_tokens_to_ids(self, tokens: Any) -> Any: ...

    def encode(self, text: Any, *, add_special_tokens: bool) -> Any: ...


def render_text(template: str, question: str, tokenizer: Tokenizer, date: datetime | None = None) -> str:
    """Return the prompt as text, special tokens of the chat formats spelled out.

    `date` is what a chat template that shows the day is told, now by default. Raises ConfigError naming
    data.template where the tokenizer lacks what the template needs.
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
    """Return the prompt's token ids.

    The chat formats spell out every special token, so none is added to them; plain text gets those that the
    tokenizer puts before a text (a beginning-of-text token, for example), not those that it puts after one: a
    model that reads an end-of-text token last has nothing to continue. `date` as in `render_text`.
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
    """Return the texts that the tokenizer turns into special tokens wherever they stand, the longest first.

    One or two characters are left out: some tokenizers pad with a punctuation mark.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    texts = {token.content for token in added if token.special and len(token.content.strip()) > 2}
    return sorted(texts, key=lambda text: (-len(text), text))


def find_control_tokens(questions: Sequence[Question], tokenizer: Tokenizer) -> list[tuple[int, str]]:
    """Return (position in `questions`, token) of every question whose text holds a control token.

    In a prompt such a text is no text: it ends the question's turn, or forges another one.
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
    """Raise ConfigError at the first prompt whose last token ends an answer, naming its question in
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
    """Raise ConfigError at the first prompt that is empty or longer than `max_prompt_tokens`, naming its
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
        # Text rather than ids: what tokenize=True returns differs between versions of transformers.
        # `strftime_now` is how a template asks for the day; a variable of that name stands before the
        # library's own.
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
    """Render a user's template in a sandbox: it sees the question and the beginning-of-text token, nothing of
    the process."""
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
    """Return the token that ends the model's turn under a template, as a list; empty where the template has
    no turns.

    A tokenizer's end token may be another one: base models with a chat template often name the end of a
    document.
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
    """Return what the chat template writes after an answer; nothing where it refuses answers."""
    answer = "the answer itself"
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False))
    except jinja2.TemplateError:
        return ""
    return text.rpartition(answer)[2].lstrip()
