"""Sharded equals unsharded: the same rollouts on one rank, TP 2 with sequence parallelism, DP 2, and both."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import make_model_folder, make_rollouts, tiny_config

pytestmark = pytest.mark.distributed


def all_logits(trainer: Any, batch: Any) -> torch.Tensor:
    """Logits of a packed batch over the whole vocabulary, from Megatron's own output layer: float32 [T,
    V]."""
    import torch.distributed as dist

    from rlsc_mcore.model.build import packed_seq_params

    ids = batch.token_ids[None]
    with torch.no_grad(), trainer.backend.megatron():
        mine = trainer.policy.model(
            ids, torch.zeros_like(ids), None, packed_seq_params=packed_seq_params(batch)
        )[0].float()
    shards = [torch.empty_like(mine) for _ in range(trainer.groups.tp_size)]
    dist.all_gather(shards, mine.contiguous(), group=trainer.groups.tp_group)
    return torch.cat(shards, dim=1)[:, : trainer.policy.architecture.vocab_size]


def train_steps(folder: str, world_tp: int, steps: int, confidence: str, dtype: str) -> dict[str, Any]:
    """Run `steps` optimizer steps on fixed rollouts, spread over the data-parallel ranks; returns what a rank
    saw."""
    from rlsc_mcore.data.packing import merge_identical, pack
    from rlsc_mcore.model.weight_map import export_weights
    from rlsc_mcore.parallel.backend import get_backend
    from rlsc_mcore.parallel.groups import initialize_groups
    from rlsc_mcore.training.step import Trainer

    backend = get_backend()
    groups = initialize_groups(backend, world_tp)
    flags = [
        "--parallel.tp",
        str(world_tp),
        "--algorithm.confidence",
        confidence,
        "--model.dtype",
        dtype,
        "--optimizer.lr",
        "1e-3",
    ]
    # A large epsilon keeps AdamW smooth: with the usual one its first step is the sign of the gradient,
    # rounding noise included.
    flags += ["--optimizer.eps", "1e-2"]
    config = tiny_config(folder, flags)
    trainer = Trainer(config, Path(folder), backend, groups)
    rollouts = make_rollouts(
        num_questions=4, num_samples=3, vocab_size=trainer.policy.architecture.vocab_size
    )
    sequences = merge_identical(
        rollouts, train_end_token=True, train_truncated=True, stop_token_ids=frozenset({0})
    )
    # Sequence by sequence, so that a question's answers lie on several ranks.
    batches = pack(sequences[groups.dp_rank :: groups.dp_size], 64, multiple_of=groups.tp_size)
    logits = all_logits(trainer, pack(sequences, 4096, multiple_of=groups.tp_size)[0])
    outcomes = [trainer.step(batches, step, len(rollouts)) for step in range(steps)]
    exported = {
        name: tensor.clone()
        for name, tensor in export_weights(
            trainer.policy.weights, trainer.policy.architecture, groups.tp_group, groups.tp_size
        )
    }
    return {
        "logits": logits[: sum(len(s.rollout.prompt_ids) + len(s.rollout.response_ids) for s in sequences)],
        "losses": [outcome.loss for outcome in outcomes],
        "grad_norms": [outcome.grad_norm for outcome in outcomes],
        "exported": exported if groups.rank == 0 else None,
    }


@pytest.mark.parametrize(
    ("world", "tp", "tied", "confidence"),
    [
        *(
            (2, tp, tied, confidence)
            for tp in (2, 1)
            for tied in (True, False)
            for confidence in ("sequence", "group_softmax")
        ),
        (4, 2, True, "sequence"),
        (4, 2, False, "group_softmax"),
    ],
)
def test_several_ranks_equal_one(tmp_path: Path, world: int, tp: int, tied: bool, confidence: str) -> None:
    folder = str(make_model_folder(tmp_path / "model", tied=tied))
    (alone,) = run_ranks(1, train_steps, folder, 1, 5, confidence, "float32")
    ranks = run_ranks(world, train_steps, folder, tp, 5, confidence, "float32")
    for rank in ranks:
        torch.testing.assert_close(rank["logits"], alone["logits"], rtol=0, atol=2e-5)
        assert rank["losses"] == pytest.approx(alone["losses"], rel=2e-6)
        assert rank["grad_norms"] == pytest.approx(alone["grad_norms"], rel=2e-5)
    for name, tensor in alone["exported"].items():
        torch.testing.assert_close(
            ranks[0]["exported"][name],
            tensor,
            rtol=0,
            atol=1e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_bfloat16_two_ranks_agree_with_one(tmp_path: Path) -> None:
    folder = str(make_model_folder(tmp_path / "model"))
    (alone,) = run_ranks(1, train_steps, folder, 1, 2, "sequence", "bfloat16")
    ranks = run_ranks(2, train_steps, folder, 2, 2, "sequence", "bfloat16")
    assert ranks[0]["losses"] == pytest.approx(alone["losses"], rel=2e-2)
    assert ranks[0]["losses"] == ranks[1]["losses"]


def export_equals_source(folder: str, tp: int) -> list[str]:
    """Names of exported tensors that are not bit-equal to the folder's."""
    from safetensors.torch import load_file

    from rlsc_mcore.model.build import build_policy
    from rlsc_mcore.model.weight_map import export_weights
    from rlsc_mcore.parallel.backend import get_backend
    from rlsc_mcore.parallel.groups import initialize_groups

    backend = get_backend()
    groups = initialize_groups(backend, tp)
    policy = build_policy(tiny_config(folder, ["--parallel.tp", str(tp)]), Path(folder), backend, groups)
    source = load_file(Path(folder) / "model.safetensors")
    exported = dict(export_weights(policy.weights, policy.architecture, groups.tp_group, groups.tp_size))
    assert exported.keys() == source.keys()
    return [name for name, tensor in source.items() if not torch.equal(exported[name], tensor)]


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_export_is_bit_equal_under_tp(tmp_path: Path, architecture: str) -> None:
    folder = str(make_model_folder(tmp_path / "model", architecture=architecture, tied=False))
    assert run_ranks(2, export_equals_source, folder, 2) == [[], []]
