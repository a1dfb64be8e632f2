"""Compute TRL's losses and their gradients with respect to log-probs, by the code of its trainers.

`python -m tests.helpers.trl_losses` writes tests/unit/algorithm/trl_losses.json, which the tests compare with on
machines without TRL.
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

FILE = Path(__file__).parents[1] / "unit" / "algorithm" / "trl_losses.json"
LENGTHS = (5, 2, 7, 1)  # trained tokens of four answers
ADVANTAGES = (1.2, -0.7, 0.4, -0.9)
GRPO_OPTIONS = (
    {"clip_low": 0.2, "clip_high": 0.2, "kl": 0.0},
    {"clip_low": 0.2, "clip_high": 0.28, "kl": 0.0},
    {"clip_low": 0.1, "clip_high": 0.3, "kl": 0.04},
)
BETAS = (0.1, 0.5, 2.0)


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return old and current log-probs of the answers, padded on the right: float64 [4, 7] each."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(LENGTHS), max(LENGTHS))
    old = -torch.rand(shape, generator=generator, dtype=torch.float64) * 3
    return old, old + torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3


def mask() -> torch.Tensor:
    """Return 1 at the tokens of the answers and 0 at padding: int64 [4, 7]."""
    return (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()


def _trainer(**options: Any) -> Any:
    """Return what TRL's loss methods read from their trainer: options, and one process that gathers
    nothing."""

    def same(value: Any, **_: Any) -> Any:
        return value

    accelerator = SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, gather=same, gather_for_metrics=same, reduce=same
    )
    common = {
        "accelerator": accelerator,
        "model": SimpleNamespace(training=True),
        "aux_loss_enabled": False,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    return SimpleNamespace(**common, **options)


def grpo(seed: int, options: dict[str, float]) -> tuple[float, list[list[float]]]:
    """Return TRL's loss (dr_grpo, times answers x longest, which gives the sum) and its gradient."""
    from trl import GRPOTrainer

    old, current = batch(seed)
    current.requires_grad_()
    trainer = _trainer(
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=options["kl"],
        epsilon_low=options["clip_low"],
        epsilon_high=options["clip_high"],
        loss_type="dr_grpo",
        max_completion_length=max(LENGTHS),
        current_gradient_accumulation_steps=1,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
        _get_per_token_logps_and_entropies=lambda *_, **__: (current, torch.zeros_like(current), None),
    )
    inputs = {
        "prompt_ids": torch.ones(len(LENGTHS), 1, dtype=torch.int64),
        "prompt_mask": torch.ones(len(LENGTHS), 1, dtype=torch.int64),
        "completion_ids": mask(),
        "completion_mask": mask(),
        "advantages": torch.tensor(ADVANTAGES, dtype=torch.float64),
        "old_per_token_logps": old,
        "ref_per_token_logps": old,
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs) * len(LENGTHS) * max(LENGTHS)
    loss.backward()
    assert current.grad is not None
    return float(loss.detach()), current.grad.tolist()


def dpo(seed: int, beta: float) -> tuple[float, list[list[float]]]:
    """Return TRL's sigmoid loss of two pairs (answers 0 and 1 chosen, 2 and 3 rejected) and its gradient."""
    from trl import DPOTrainer

    old, current = batch(seed)
    current.requires_grad_()
    live = mask()
    sums = (old * live).sum(dim=1)
    outputs = SimpleNamespace(
        log_probs=current * live,
        entropy=torch.zeros_like(old),
        mean_logits=torch.zeros_like(old),
        is_top1=live.bool(),
    )
    trainer = _trainer(
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        beta=beta,
        use_weighting=False,
    )
    inputs = {
        "input_ids": torch.ones(len(LENGTHS), max(LENGTHS) + 1, dtype=torch.int64),
        "attention_mask": torch.ones(len(LENGTHS), max(LENGTHS) + 1, dtype=torch.int64),
        "completion_mask": torch.cat([torch.zeros(len(LENGTHS), 1, dtype=torch.int64), live], dim=1),
        "ref_chosen_logps": sums[:2],
        "ref_rejected_logps": sums[2:],
    }
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    loss.backward()
    assert current.grad is not None
    return float(loss.detach()), current.grad.tolist()


def cases() -> list[dict[str, Any]]:
    """Return every case with TRL's loss and gradient."""
    rows = []
    for seed in range(3):
        for options in GRPO_OPTIONS:
            loss, gradient = grpo(seed, options)
            rows.append(
                {"objective": "grpo", "seed": seed, "options": options, "loss": loss, "gradient": gradient}
            )
        for beta in BETAS:
            loss, gradient = dpo(seed, beta)
            options = {"dpo_beta": beta}
            rows.append(
                {"objective": "dpo", "seed": seed, "options": options, "loss": loss, "gradient": gradient}
            )
    return rows


if __name__ == "__main__":
    import trl

    FILE.write_text(json.dumps({"trl": trl.__version__, "cases": cases()}) + "\n", encoding="utf-8")
