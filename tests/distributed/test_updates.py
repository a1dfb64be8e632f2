"""Several updates per batch of rollouts: weights stay those of the policy that sampled, in every layout,
against torch alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import make_model_folder, make_rollouts, tiny_config

NUM_UPDATES = 3
TEMPERATURE, ALPHA, LR, EPS, CLIP = 0.5, 0.1, 2e-3, 1e-2, 0.05
NUM_ROLLOUTS = 12


def update(folder: str, tp: int, flags: list[str], budget: int) -> dict[str, Any]:
    """One step of NUM_UPDATES updates on fixed rollouts, spread over the data-parallel ranks."""
    from rlsc_mcore.data.packing import merge_identical, pack
    from rlsc_mcore.model.weight_map import export_weights
    from rlsc_mcore.parallel.backend import get_backend
    from rlsc_mcore.parallel.groups import initialize_groups
    from rlsc_mcore.training.step import Trainer

    backend = get_backend()
    groups = initialize_groups(backend, tp)
    options = [
        "--parallel.tp",
        str(tp),
        "--training.updates-per-rollout",
        str(NUM_UPDATES),
        "--rollout.temperature",
        str(TEMPERATURE),
    ]
    options += ["--algorithm.alpha", str(ALPHA), "--optimizer.lr", str(LR), "--optimizer.eps", str(EPS)]
    options += ["--optimizer.weight-decay", "0", "--optimizer.clip-grad", str(CLIP), *flags]
    trainer = Trainer(tiny_config(folder, options), Path(folder), backend, groups)
    rollouts = make_rollouts(num_questions=4, num_samples=3)
    sequences = merge_identical(
        rollouts, train_end_token=True, train_truncated=True, stop_token_ids=frozenset({0})
    )
    batches = pack(sequences[groups.dp_rank :: groups.dp_size], budget, multiple_of=groups.tp_size)
    outcome = trainer.step(batches, 0, len(rollouts))
    exported = export_weights(
        trainer.policy.weights, trainer.policy.architecture, groups.tp_group, groups.tp_size
    )
    weights = {name: tensor.clone() for name, tensor in exported}
    return {
        "updates": [vars(update) for update in outcome.updates],
        "num_tokens": outcome.num_tokens,
        "computed": sum(len(batch.token_ids) for batch in batches),
        "exported": weights if groups.rank == 0 else {},
    }


def oracle(folder: str, confidence: str) -> dict[str, Any]:
    """The same with transformers, a loop over rollouts and torch's AdamW, in float64."""
    from rlsc_mcore.parallel.packages import hide_broken_torchvision

    hide_broken_torchvision()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.999), eps=EPS, weight_decay=0.0)
    rollouts = make_rollouts(num_questions=4, num_samples=3)
    assert len(rollouts) == NUM_ROLLOUTS

    def log_prob(rollout: Any) -> torch.Tensor:
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]])
        logits = model(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1] / TEMPERATURE
        return logits.log_softmax(-1).gather(1, ids[0, len(rollout.prompt_ids) :, None]).sum()

    with torch.no_grad():
        old = [log_prob(rollout) for rollout in rollouts]
    if confidence == "group_softmax":
        weights = []
        for rollout, value in zip(rollouts, old, strict=True):
            rivals = [
                v
                for r, v in zip(rollouts, old, strict=True)
                if r.question_index == rollout.question_index and r.response_ids
            ]
            weights.append((value - torch.stack(rivals).logsumexp(0)).exp() + ALPHA)
    else:
        weights = [value.exp() + ALPHA for value in old]
    updates = []
    for _ in range(NUM_UPDATES):
        optimizer.zero_grad()
        terms = [-w * log_prob(r) for w, r in zip(weights, rollouts, strict=True) if r.response_ids]
        loss = torch.stack(terms).sum() / NUM_ROLLOUTS
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        updates.append({"loss": float(loss.detach()), "grad_norm": float(norm)})
    return {
        "updates": updates,
        "exported": {name: parameter.detach() for name, parameter in model.named_parameters()},
    }


@pytest.mark.parametrize("confidence", ["sequence", "group_softmax"])
def test_three_updates_equal_torch_alone_in_every_layout(tmp_path: Path, confidence: str) -> None:
    folder = str(make_model_folder(tmp_path / "model"))
    expected = oracle(folder, confidence)
    flags = ["--algorithm.confidence", confidence]
    for world, tp, budget in ((1, 1, 4096), (1, 1, 40), (2, 2, 40), (4, 2, 64)):
        ranks = run_ranks(world, update, folder, tp, flags, budget)
        for found in ranks:
            for ours, theirs in zip(found["updates"], expected["updates"], strict=True):
                assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5), (world, tp)
                assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), (world, tp)
                assert ours["updated"]
            assert found["num_tokens"] == NUM_UPDATES * found["computed"]
        for name, tensor in expected["exported"].items():
            torch.testing.assert_close(
                ranks[0]["exported"][name].double(),
                tensor,
                rtol=0,
                atol=2e-6,
                msg=lambda t, n=name: f"{n}: {t}",
            )


def test_sum_and_mean_stay_in_proportion(tmp_path: Path) -> None:
    folder = str(make_model_folder(tmp_path / "model"))
    (sum_,) = run_ranks(1, update, folder, 1, ["--algorithm.reduction", "sum"], 64)
    (mean,) = run_ranks(1, update, folder, 1, [], 64)
    for total, average in zip(sum_["updates"], mean["updates"], strict=True):
        # Both are clipped to the same norm, so AdamW moves alike and the losses stay in proportion.
        assert total["loss"] == pytest.approx(NUM_ROLLOUTS * average["loss"], rel=1e-4)
        assert total["grad_norm"] == pytest.approx(NUM_ROLLOUTS * average["grad_norm"], rel=1e-3)
