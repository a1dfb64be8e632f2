"""Train with plain `transformers` on length-sorted padded batches with full logits: the reference of the
training benchmarks."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from rlsc_mcore.types import UniqueSequence

# (ids [B, L], mask of targets [B, L - 1], sequence numbers)
PaddedBatch = tuple[torch.Tensor, torch.Tensor, list[int]]
# (log p [B] of the batch's sequences, sequence numbers) -> weights [B]
Weigh = Callable[[torch.Tensor, list[int]], torch.Tensor]


def load_model(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, device: torch.device
) -> Any:
    """Build the model of a folder's config.json with these weights. Every weight must match a parameter of
    the model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    missing, unexpected = model.load_state_dict(
        {name: tensor.to(device) for name, tensor in tensors}, strict=False
    )
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert not unexpected and set(missing) <= tied, (missing, unexpected)
    model.config.use_cache = False
    return model


def num_tokens(sequence: UniqueSequence) -> int:
    """Return the number of tokens of a sequence with its prompt."""
    return len(sequence.rollout.prompt_ids) + len(sequence.rollout.response_ids)


def pad_by_length(sequences: Sequence[UniqueSequence], budget: int) -> list[PaddedBatch]:
    """Return the sequences in length-sorted padded batches of at most `budget` tokens."""
    lengths = [num_tokens(sequence) for sequence in sequences]
    groups: list[list[int]] = [[]]
    for i in sorted(range(len(sequences)), key=lengths.__getitem__):
        if groups[-1] and lengths[i] * (len(groups[-1]) + 1) > budget:
            groups.append([])
        groups[-1].append(i)
    batches = []
    for group in groups:
        rows = [sequences[i].rollout.prompt_ids + sequences[i].rollout.response_ids for i in group]
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *([0] * (longest - len(row)))] for row in rows])
        mask = torch.zeros(len(rows), longest - 1, dtype=torch.bool)
        for position, (i, row) in enumerate(zip(group, rows, strict=True)):
            mask[position, len(sequences[i].rollout.prompt_ids) - 1 : len(row) - 1] = True
        batches.append((ids, mask, group))
    return batches


def accumulate(model: Any, batches: Sequence[PaddedBatch], weigh: Weigh, temperature: float) -> float:
    """Run forward and backward of the sum of -weight x log p and return the sum. Mutates the parameters'
    gradients."""
    model.zero_grad(set_to_none=True)
    device, total = model.device, 0.0
    for ids, mask, group in batches:
        ids, mask = ids.to(device), mask.to(device)
        logits = model(input_ids=ids).logits[:, :-1].float() / temperature
        negative = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        ).view_as(mask)
        negative = (negative * mask).sum(dim=1)
        loss = (negative * weigh(-negative.detach(), group).to(device)).sum()
        loss.backward()
        total += float(loss.detach())
    return total
