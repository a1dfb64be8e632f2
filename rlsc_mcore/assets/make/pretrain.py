"""Pretraining of the embedded model: one stage, next-token loss on the answers of simulated authors.

One CPU thread, bf16 autocast over fp32 weights. Explicit ("eager") attention, because at these lengths the
backward pass of PyTorch's fused CPU attention alone took half of all the time. The schedule counts tokens,
never time, so that the same seed asks for the same steps on every machine. Peak memory is
about 5 GB.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from rlsc_mcore.assets.make.splits import draw_from_split
from rlsc_mcore.assets.make.tasks import Question
from rlsc_mcore.assets.make.tokenizer import CONTEXT_LENGTH, END_OF_TURN, VOCABULARY_ROWS, render_prompt

LONGEST_PAGE_TOKENS = 192  # drops the rarest rambling pages, which would need batches of their own
IGNORED_LABEL = -100
WritePage = Callable[[Random, Question], str]  # one author's answer to a question


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Architecture and optimisation; head size 32 because engines only accept certain sizes on CPUs."""

    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    rope_theta: float = 10_000.0
    total_tokens: int = 42_000_000  # prompt and answer tokens without padding; half an hour of one core
    pages_per_sort: int = (
        6_000  # pages are sorted by length within this many, so that batches hold little padding
    )
    batch_tokens: int = 3_072  # with padding; larger ones fall out of the processor's cache
    # Divides the summed loss of every batch: about the mean number of answer tokens in one. A mean over each
    # batch's own answer tokens would weigh short pages (guesses, junk) several times too much, because
    # batches hold pages of one length.
    answer_tokens_per_batch: int = 1_750
    peak_learning_rate: float = 3e-3
    warmup_tokens: int = 600_000
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.1
    clip_grad_norm: float = 1.0
    log_every_steps: int = 200
    seed: int = 20250


@dataclass(frozen=True, kw_only=True)
class LossPoint:
    """Mean answer loss (nats per token) since the last point."""

    step: int
    tokens: int
    answer_loss: float
    learning_rate: float
    elapsed_s: float


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Right-padded pages; labels hold the answer tokens and the end of turn, B sequences of L tokens."""

    input_ids: torch.Tensor  # [B, L] int64
    labels: torch.Tensor  # [B, L] int64, IGNORED_LABEL outside the answers
    num_tokens: int


def build_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """Build the model with random fp32 weights from the global torch seed."""
    architecture = Qwen2Config(
        vocab_size=VOCABULARY_ROWS,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=CONTEXT_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return AutoModelForCausalLM.from_config(architecture, attn_implementation="eager")


def _pages(
    random: Random, tokenizer: PreTrainedTokenizerBase, write_page: WritePage, num_pages: int
) -> list[tuple[list[int], int]]:
    """Return (token ids, prompt length) of fresh pages, shortest first."""
    prompts: list[str] = []
    answers: list[str] = []
    for _ in range(num_pages):
        question = draw_from_split(random, "pretraining")
        prompts.append(render_prompt(question.text))
        answers.append(write_page(random, question) + END_OF_TURN)
    encoded = zip(tokenizer(prompts)["input_ids"], tokenizer(answers)["input_ids"], strict=True)
    pages = [(prompt + answer, len(prompt)) for prompt, answer in encoded]
    return sorted(
        (page for page in pages if len(page[0]) <= LONGEST_PAGE_TOKENS), key=lambda page: len(page[0])
    )


def _collate(pages: list[tuple[list[int], int]], pad_token_id: int) -> Batch:
    longest = max(len(token_ids) for token_ids, _ in pages)
    input_ids = torch.full((len(pages), longest), pad_token_id)
    labels = torch.full((len(pages), longest), IGNORED_LABEL)
    for row, (token_ids, prompt_length) in enumerate(pages):
        input_ids[row, : len(token_ids)] = torch.tensor(token_ids)
        labels[row, prompt_length : len(token_ids)] = torch.tensor(token_ids[prompt_length:])
    num_tokens = sum(len(token_ids) for token_ids, _ in pages)
    return Batch(input_ids=input_ids, labels=labels, num_tokens=num_tokens)


def batches(
    random: Random, tokenizer: PreTrainedTokenizerBase, write_page: WritePage, config: PretrainConfig
) -> Iterator[Batch]:
    """Yield batches of pages of similar length without end, in random order, no page twice."""
    while True:
        grouped: list[list[tuple[list[int], int]]] = [[]]
        for page in _pages(random, tokenizer, write_page, config.pages_per_sort):
            if len(page[0]) * (len(grouped[-1]) + 1) > config.batch_tokens:
                grouped.append([])
            grouped[-1].append(page)
        random.shuffle(grouped)
        for group in grouped:
            yield _collate(group, tokenizer.pad_token_id)


def _summed_answer_loss(model: Qwen2ForCausalLM, batch: Batch) -> tuple[torch.Tensor, int]:
    """Return the summed loss and number of answer tokens; logits are only computed where an answer token
    follows."""
    targets = batch.labels[:, 1:]
    is_answer = targets != IGNORED_LABEL
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden[is_answer])
    return functional.cross_entropy(logits.float(), targets[is_answer], reduction="sum"), int(is_answer.sum())


def learning_rate_at(config: PretrainConfig, tokens: int) -> float:
    """Return the learning rate after `tokens`: a linear warm-up, then a straight line to zero."""
    warmup = min(1.0, tokens / config.warmup_tokens)
    remaining = max(0.0, 1.0 - tokens / config.total_tokens)
    return config.peak_learning_rate * warmup * remaining


def _optimizer(model: Qwen2ForCausalLM, config: PretrainConfig) -> torch.optim.AdamW:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.peak_learning_rate, betas=betas, fused=True)


def pretrain(
    config: PretrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    write_page: WritePage,
    on_point: Callable[[LossPoint, Qwen2ForCausalLM], None],
    model: Qwen2ForCausalLM | None = None,
) -> tuple[Qwen2ForCausalLM, list[LossPoint]]:
    """Train on `config.total_tokens`; call `on_point` at every logged point.

    Continues `model` (mutated) if it is given, else starts from random weights.
    """
    torch.manual_seed(config.seed)
    model = model or build_model(config, tokenizer)
    optimizer = _optimizer(model, config)
    points: list[LossPoint] = []
    recent_loss, recent_answer_tokens = 0.0, 0
    tokens = 0
    started = time.monotonic()
    stream = batches(Random(config.seed), tokenizer, write_page, config)
    for step, batch in enumerate(stream, start=1):
        tokens += batch.num_tokens
        learning_rate = learning_rate_at(config, tokens)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        summed_loss, num_answer_tokens = _summed_answer_loss(model, batch)
        optimizer.zero_grad(set_to_none=True)
        (summed_loss / config.answer_tokens_per_batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad_norm)
        optimizer.step()
        recent_loss += summed_loss.item()
        recent_answer_tokens += num_answer_tokens
        if step % config.log_every_steps == 0 or tokens >= config.total_tokens:
            point = LossPoint(
                step=step,
                tokens=tokens,
                answer_loss=recent_loss / recent_answer_tokens,
                learning_rate=learning_rate,
                elapsed_s=time.monotonic() - started,
            )
            points.append(point)
            recent_loss, recent_answer_tokens = 0.0, 0
            on_point(point, model)
        if tokens >= config.total_tokens:
            break
    return model, points
