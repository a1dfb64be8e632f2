"""One step of self-distillation in several layouts against transformers and torch alone, in float64."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import make_model_folder, make_moved_trainer, make_rollouts

TEMPERATURE, CLIP, LR, EPS = 0.8, 4.0, 2e-3, 1e-2
CASES = {
    "u_opsd": [],
    "canon": ["--distill.teacher", "start", "--distill.tokens", "all", "--distill.divergence", "jsd"],
    "ttpo": ["--distill.tokens", "agreeing", "--distill.penalty", "1.0"],
}


def values_of(case: str, rollout: Any) -> float:
    """A value for each rollout: the choice itself is tested elsewhere."""
    if case == "canon":
        return 1.0
    return 1.0 if rollout.sample_index % 2 == 0 else (-0.6 if case == "ttpo" else 0.0)


def teacher_prompt(question: int) -> tuple[int, ...]:
    return tuple(range(30 + question, 40 + 2 * question))


def step(folder: str, other: str, tp: int, budget: int, case: str) -> dict[str, Any]:
    """Train one step; the policy's weights are not those that it started with."""
    from rlsc_mcore.data.packing import merge_identical, pack
    from rlsc_mcore.model.weight_map import export_weights

    flags = ["--algorithm.objective", "self_distill", "--optimizer.lr", str(LR)]
    flags += ["--optimizer.eps", str(EPS), "--optimizer.weight-decay", "0", "--optimizer.clip-grad", "0"]
    flags += ["--rollout.temperature", str(TEMPERATURE), "--algorithm.log-prob-temperature", "sampling"]
    flags += ["--distill.clip", str(CLIP), *CASES[case]]
    trainer = make_moved_trainer(folder, other, flags, tp=tp)
    groups = trainer.groups
    rollouts = make_rollouts(num_questions=4, num_samples=3)
    sequences = merge_identical(
        rollouts,
        train_end_token=True,
        train_truncated=True,
        stop_token_ids=frozenset({0}),
        advantages=[values_of(case, rollouts[0] if i < 2 else rollout) for i, rollout in enumerate(rollouts)],
    )
    sequences = [
        replace(each, teacher_prompt=teacher_prompt(each.rollout.question_index)) for each in sequences
    ]
    batches = pack(sequences[groups.dp_rank :: groups.dp_size], budget, multiple_of=groups.tp_size)
    assert any(batch.teacher is not None for batch in batches)
    outcome = trainer.step(batches, 0, len(rollouts))
    exported = export_weights(
        trainer.policy.weights, trainer.policy.architecture, groups.tp_group, groups.tp_size
    )
    weights = {name: tensor.clone() for name, tensor in exported}
    return {
        "loss": outcome.loss,
        "grad_norm": outcome.grad_norm,
        "log_probs": outcome.scores.log_probs.sum().item(),
        "exported": weights if groups.rank == 0 else {},
    }


def oracle(folder: str, other: str, case: str) -> dict[str, Any]:
    """The same with a loop over rollouts, whole logits and torch's AdamW, in float64."""
    from rlsc_mcore.parallel.packages import hide_broken_torchvision

    hide_broken_torchvision()
    from transformers import AutoModelForCausalLM

    def load(path: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager")

    model = load(other)
    start = load(folder) if case == "canon" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.999), eps=EPS, weight_decay=0.0)
    rollouts = make_rollouts(num_questions=4, num_samples=3)

    def log_softmax(net: Any, prompt: tuple[int, ...], response: tuple[int, ...]) -> torch.Tensor:
        logits = net(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        return (logits / TEMPERATURE).log_softmax(-1)

    terms = []
    for i, rollout in enumerate(rollouts):
        value = values_of(case, rollouts[0] if i < 2 else rollout)
        if not rollout.response_ids or value == 0:
            continue
        log_q = log_softmax(model, rollout.prompt_ids, rollout.response_ids)
        if value < 0:
            chosen = log_q.gather(1, torch.tensor(rollout.response_ids)[:, None]).sum()
            terms.append(-value * chosen)
            continue
        with torch.no_grad():
            log_p = log_softmax(start, teacher_prompt(rollout.question_index), rollout.response_ids)
        if case == "canon":
            log_m = ((log_p.exp() + log_q.exp()) / 2).log()
            both = log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)
            divergence = both.sum(-1) / 2
        else:
            divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
        terms.append(divergence.clamp(max=CLIP).sum())
    loss = torch.stack(terms).sum() / len(rollouts)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
    optimizer.step()
    return {
        "loss": float(loss.detach()),
        "grad_norm": float(norm),
        "exported": {name: parameter.detach() for name, parameter in model.named_parameters()},
    }


@pytest.mark.parametrize("case", CASES)
def test_a_step_equals_torch_alone_in_every_layout(tmp_path: Path, case: str) -> None:
    folder = str(make_model_folder(tmp_path / "model"))
    other = str(make_model_folder(tmp_path / "other", seed=5))
    expected = oracle(folder, other, case)
    layouts = [(1, 1, 40), (2, 2, 40)]
    if case == "u_opsd":
        layouts += [(1, 1, 4096), (2, 1, 64)]
    for world, tp, budget in layouts:
        ranks = run_ranks(world, step, folder, other, tp, budget, case)
        for found in ranks:
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5), (world, tp)
            assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4), (world, tp)
        for name, tensor in expected["exported"].items():
            torch.testing.assert_close(
                ranks[0]["exported"][name].double(),
                tensor,
                rtol=0,
                atol=2e-6,
                msg=lambda t, n=name: f"{n}: {t}",
            )
