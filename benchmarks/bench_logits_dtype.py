"""Measure the effect of rounding logits: compare log-probs of whole answers from float32 and from bfloat16
logits with float64.

    python -m benchmarks.bench_logits_dtype

The operands (hidden states, head weight) are bfloat16 in all three cases; only the type of the logits
differs. p_old is a product over an answer, so the error of the sum of an answer's log-probs is reported.
Answers are drawn with the spread of a trained model: most tokens are confident, some are not. Writes
results/<device>/logits_dtype.json.
"""

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import command_line, save
from rlsc_mcore.ops import linear_token_log_probs

VOCAB = 152064
SPREAD = 2.5  # standard deviation of the logits other than the target's
BOOST = (10.0, 30.0)  # offset of the target's logit, drawn uniformly: p from 1 % to 1 - 1e-6


def draw(num_tokens: int, hidden_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Draw (hidden, weight, targets); hidden and weight are bfloat16."""
    generator = torch.Generator().manual_seed(0)
    weight = (
        torch.randn(VOCAB, hidden_size, generator=generator).mul_(SPREAD / math.sqrt(hidden_size)).bfloat16()
    )
    targets = torch.randint(0, VOCAB, (num_tokens,), generator=generator)
    own = weight[targets].float()
    low, high = BOOST
    boost = low + (high - low) * torch.rand(num_tokens, 1, generator=generator)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator) + boost * own / own.square().sum(
        1, keepdim=True
    )
    return hidden.bfloat16().to(device), weight.to(device), targets.to(device)


def exact_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
    """Compute log p in float64, some columns of the vocabulary at a time: float64 [T]."""
    target_logits = (hidden.double() * weight[targets].double()).sum(1)
    parts = [torch.logsumexp(hidden.double() @ block.double().t(), dim=1) for block in weight.split(rows)]
    return target_logits - torch.logsumexp(torch.stack(parts), dim=0)


def errors(log_probs: Tensor, exact: Tensor, length: int) -> dict[str, Any]:
    """Return the errors per token and per answer."""
    off = log_probs.double() - exact
    answers = off.view(-1, length).sum(1)
    return {
        "mean_token_error": float(off.abs().mean()),
        "largest_token_error": float(off.abs().max()),
        "answer_errors": answers.tolist(),
        "largest_answer_error": float(answers.abs().max()),
        "largest_relative_error_of_p": float(answers.abs().max().expm1()),
    }


def main() -> None:
    """Measure and write the result."""
    options = command_line(
        __doc__,
        answers=(4, "number of answers"),
        length=(1000, "tokens of an answer"),
        hidden_size=(256, "of the operands"),
        device=("cuda" if torch.cuda.is_available() else "cpu", "cuda or cpu"),
    )
    device = torch.device(options.device)
    hidden, weight, targets = draw(options.answers * options.length, options.hidden_size, device)
    exact = exact_log_probs(hidden, weight, targets, rows=19008)
    rows = {}
    for dtype in (torch.bfloat16, torch.float32):
        everything = torch.ones_like(targets, dtype=torch.bool)
        log_probs = linear_token_log_probs(
            hidden, weight, targets, mask_T=everything, vocab_size=VOCAB, logits_dtype=dtype
        )
        rows[str(dtype).removeprefix("torch.")] = errors(log_probs, exact, options.length)
    shape = {
        "vocabulary": VOCAB,
        "hidden_size": options.hidden_size,
        "answers": options.answers,
        "tokens_per_answer": options.length,
        "mean_log_p": float(exact.mean()),
        "share_of_tokens_above_p_0.99": float((exact > math.log(0.99)).double().mean()),
    }
    path = save(__file__, {"shape": shape, "logits_dtype": rows}, device, options.out)
    for name, row in rows.items():
        answer, token = row["largest_answer_error"], row["largest_token_error"]
        print(f"{name} logits: log p of an answer is off by up to {answer:.3g}, of a token by {token:.3g}")
    print(path)


if __name__ == "__main__":
    main()
