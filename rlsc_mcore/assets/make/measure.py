r"""Measure the pretrained model on a split: how often its answers are right, boxed, and equal to each other.

"Strict" reads the last \boxed{} of an answer, "lenient" its last number. `agreement` is an estimate of F, the
probability that two samples at temperature 1 are the same answer, token by token: the mean of p(y|x).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

from rlsc_mcore.assets.make.tasks import Question
from rlsc_mcore.assets.make.tokenizer import render_prompt

SAMPLES_PER_QUESTION = 4
SAMPLED_TEMPERATURES = (0.5, 1.0)
LONGEST_ANSWER_TOKENS = 128
ROWS_PER_PASS = 240  # answers generated at once; only speed and memory depend on it
BOXED = re.compile(r"\\boxed\{(\d+)\}")
NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One generated answer with its right result."""

    text: str
    expected: int
    num_tokens: int
    probability: float  # p(y|x) at temperature 1

    def is_right(self, form: re.Pattern[str]) -> bool:
        """Say whether the last match of `form` in the text is the right result."""
        found = form.findall(self.text)
        return bool(found) and int(found[-1]) == self.expected


def _answers(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, questions: list[Question], temperature: float
) -> Iterator[Answer]:
    """Generate answers, one per question at temperature 0 and SAMPLES_PER_QUESTION above it."""
    samples = SAMPLES_PER_QUESTION if temperature > 0 else 1
    per_pass = ROWS_PER_PASS // samples
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature > 0
        else {"do_sample": False}
    )
    for start in range(0, len(questions), per_pass):
        asked = questions[start : start + per_pass]
        prompts = tokenizer(
            [render_prompt(question.text) for question in asked], return_tensors="pt", padding=True
        )
        prompt_length = prompts["input_ids"].shape[1]
        generated = model.generate(
            **prompts,
            **sampling,
            num_return_sequences=samples,
            max_new_tokens=LONGEST_ANSWER_TOKENS,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = generated.sequences[:, prompt_length:]
        lengths = (tokens != tokenizer.pad_token_id).sum(1)
        logits = torch.stack(generated.logits, dim=2)  # [B, V, L]
        log_probs = -functional.cross_entropy(
            logits, tokens, reduction="none", ignore_index=tokenizer.pad_token_id
        ).sum(1)
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        for row, text in enumerate(texts):
            yield Answer(
                text=text,
                expected=asked[row // samples].answer,
                num_tokens=int(lengths[row]),
                probability=float(log_probs[row].exp()),
            )


def _summary(answers: list[Answer]) -> dict[str, float]:
    def mean(values: Iterator[float]) -> float:
        return round(sum(values) / len(answers), 4)

    return {
        "strict_accuracy": mean(answer.is_right(BOXED) for answer in answers),
        "lenient_accuracy": mean(answer.is_right(NUMBER) for answer in answers),
        "boxed_share": mean(BOXED.search(answer.text) is not None for answer in answers),
        "mean_tokens": mean(answer.num_tokens for answer in answers),
    }


@torch.no_grad()
def measure(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, questions: list[Question], seed: int
) -> dict[str, dict[str, float]]:
    """Return accuracies and lengths for greedy answers and at each sampled temperature; `agreement` at
    temperature 1."""
    torch.manual_seed(seed)
    model.eval()
    result = {"greedy": _summary(list(_answers(model, tokenizer, questions, 0.0)))}
    for temperature in SAMPLED_TEMPERATURES:
        answers = list(_answers(model, tokenizer, questions, temperature))
        result[f"temperature_{temperature}"] = _summary(answers)
        if temperature == 1.0:
            result["temperature_1.0"]["agreement"] = round(
                sum(answer.probability for answer in answers) / len(answers), 4
            )
    return result
