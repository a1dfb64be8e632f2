"""LoRA on merged weights: the gradients of plain LoRA, the same training in every layout, no drift, resume
and export."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlsc_mcore.config import ConfigError
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import make_model_folder, make_rollouts, tiny_config

RANK, ALPHA = 4, 6.0
FLAGS = [
    "--lora.rank",
    str(RANK),
    "--lora.alpha",
    str(ALPHA),
    "--optimizer.lr",
    "3e-3",
    "--optimizer.eps",
    "1e-2",
]
PAIRS = "adapters.pairs."


def make_trainer(folder: str, tp: int, pp: int, flags: list[str], first: int = 0, run_dir: str = "") -> Any:
    from rlsc_mcore.parallel.backend import get_backend
    from rlsc_mcore.parallel.groups import initialize_groups
    from rlsc_mcore.run.folder import find_resumable
    from rlsc_mcore.training.checkpoint import load_checkpoint
    from rlsc_mcore.training.step import Trainer

    backend = get_backend()
    groups = initialize_groups(backend, tp, pp=pp)
    layout = ["--parallel.tp", str(tp), "--parallel.pp", str(pp)]
    trainer = Trainer(tiny_config(folder, [*layout, *FLAGS, *flags]), Path(folder), backend, groups)
    if first:
        assert load_checkpoint(find_resumable(Path(run_dir)), trainer).steps_done == first
    return trainer


def batches_of(trainer: Any, step: int) -> tuple[list[Any], int]:
    from rlsc_mcore.data.packing import merge_identical, pack

    groups = trainer.groups
    rollouts = make_rollouts(num_questions=4, num_samples=3, seed=step)
    mine = [rollout for rollout in rollouts if rollout.question_index % groups.dp_size == groups.dp_rank]
    sequences = merge_identical(
        mine, train_end_token=True, train_truncated=True, stop_token_ids=frozenset({0})
    )
    return pack(sequences, 64, multiple_of=groups.tp_size), len(rollouts)


def exported(trainer: Any) -> dict[str, torch.Tensor]:
    from rlsc_mcore.model.weight_map import export_weights

    policy, groups = trainer.policy, trainer.groups
    tensors = export_weights(
        policy.model_weights, policy.architecture, groups.tp_group, groups.tp_size, groups.pp_group
    )
    return {name: tensor.clone() for name, tensor in tensors}


def run_steps(
    folder: str,
    layout: tuple[int, int],
    flags: list[str],
    first: int,
    steps: int,
    run_dir: str = "",
    save: bool = False,
) -> dict[str, Any]:
    from tests.helpers.checkpoints import save_checkpoint

    trainer = make_trainer(folder, *layout, flags, first, run_dir)
    begin, outcomes = exported(trainer), []
    for step in range(first, first + steps):
        batches, num_samples = batches_of(trainer, step)
        outcomes.append(trainer.step(batches, step, num_samples))
    if save:
        save_checkpoint(Path(run_dir), trainer, first + steps, first + steps, "questions", 1)
    return {
        "begin": begin,
        "end": exported(trainer),
        "losses": [outcome.loss for outcome in outcomes],
        "grad_norms": [outcome.grad_norm for outcome in outcomes],
        "stale": [trainer.policy.adapters.stale(turn) for turn in range(8)],
    }


# ------------------------------------------------------------------ gradients


def gradients(folder: str, tp: int) -> dict[str, Any]:
    """Factors and their gradients after one pass, with B not zero; the merged weights too."""
    from rlsc_mcore.algorithm.objective import WeightedObjective

    trainer = make_trainer(folder, tp, 1, [])
    generator = torch.Generator().manual_seed(1)
    whole = {}
    for linear in trainer.policy.adapters.linears:
        for pair in linear.pairs:
            rows = len(pair.B) * (tp if linear.is_column_parallel else 1)
            values = torch.randn(rows, RANK, generator=generator) * 0.1
            whole[pair.projection] = values
            first = trainer.groups.tp_rank * len(pair.B) if linear.is_column_parallel else 0
            pair.B.data.copy_(values[first : first + len(pair.B)])
    trainer.policy.adapters.merge()
    batches, num_samples = batches_of(trainer, 0)
    loss, _ = trainer.accumulate_gradients(batches, WeightedObjective(trainer.config.algorithm, num_samples))
    found = {
        pair.projection: {
            "A": pair.A.detach().clone(),
            "B": pair.B.detach().clone(),
            "dA": pair.A.main_grad.clone(),
            "dB": pair.B.main_grad.clone(),
            "column": linear.is_column_parallel,
        }
        for linear in trainer.policy.adapters.linears
        for pair in linear.pairs
    }
    return {"loss": float(loss), "factors": found, "exported": exported(trainer)}


def oracle(folder: str, found: dict[str, Any]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Plain LoRA in float64: autograd through W0 + s B A of transformers' model."""
    from rlsc_mcore.parallel.packages import hide_broken_torchvision

    hide_broken_torchvision()
    from torch.func import functional_call
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    factors = {}
    for projection, each in found["factors"].items():
        A, B = each["A"].double().requires_grad_(), each["B"].double().requires_grad_()
        factors[projection] = (A, B)
        name = f"{projection}.weight"
        weights[name] = weights[name] + ALPHA / RANK * B @ A
        torch.testing.assert_close(
            found["exported"][name].double(), weights[name].detach(), rtol=0, atol=1e-6
        )
    rollouts = make_rollouts(num_questions=4, num_samples=3, seed=0)
    terms = []
    for rollout in rollouts:
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]])
        logits = functional_call(model, weights, (ids,)).logits[0, len(rollout.prompt_ids) - 1 : -1]
        logits = logits / found["temperature"]
        log_prob = logits.log_softmax(-1).gather(1, ids[0, len(rollout.prompt_ids) :, None]).sum()
        if rollout.response_ids:
            terms.append(-(log_prob.detach().exp() + found["alpha"]) * log_prob)
    loss = torch.stack(terms).sum() / len(rollouts)
    assert float(loss.detach()) == pytest.approx(found["loss"], rel=1e-5)
    loss.backward()
    return {name: (A.grad, B.grad) for name, (A, B) in factors.items()}


def test_gradients_are_those_of_plain_lora(tmp_path: Path) -> None:
    folder = str(make_model_folder(tmp_path / "model"))
    config = tiny_config(folder, FLAGS)
    (found,) = run_ranks(1, gradients, folder, 1)
    found |= {"temperature": config.rollout.temperature, "alpha": config.algorithm.alpha}
    expected = oracle(folder, found)
    assert len(expected) == 14  # seven projections of two layers
    for name, (dA, dB) in expected.items():
        for ours, theirs in ((found["factors"][name]["dA"], dA), (found["factors"][name]["dB"], dB)):
            torch.testing.assert_close(
                ours.double(), theirs, rtol=1e-4, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}"
            )


def test_sharded_gradients_are_parts_of_whole_ones(tmp_path: Path) -> None:
    folder = str(make_model_folder(tmp_path / "model"))
    (whole,) = run_ranks(1, gradients, folder, 1)
    ranks = run_ranks(2, gradients, folder, 2)
    for name, expected in whole["factors"].items():
        parts = [rank["factors"][name] for rank in ranks]
        split, axis = ("dB", 0) if expected["column"] else ("dA", 1)
        torch.testing.assert_close(
            torch.cat([part[split] for part in parts], axis), expected[split], rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(
            torch.cat([part[split[1]] for part in parts], axis), expected[split[1]], rtol=0, atol=0
        )


# ------------------------------------------------------------------ training


def assert_alike(ranks: list[dict[str, Any]], alone: dict[str, Any], label: str) -> None:
    for rank in ranks:
        assert rank["losses"] == pytest.approx(alone["losses"], rel=2e-6), label
        assert rank["grad_norms"] == pytest.approx(alone["grad_norms"], rel=2e-5), label
        assert rank["stale"] == [None] * 8, label
    for name, tensor in alone["end"].items():
        torch.testing.assert_close(
            ranks[0]["end"][name], tensor, rtol=0, atol=1e-6, msg=lambda t, n=name: f"{label}: {n}: {t}"
        )


@pytest.mark.parametrize("tied", [True, False])
def test_every_layout_trains_alike(tmp_path: Path, tied: bool) -> None:
    folder = str(make_model_folder(tmp_path / "model", tied=tied))
    (alone,) = run_ranks(1, run_steps, folder, (1, 1), [], 0, 3)
    assert not torch.equal(
        alone["begin"]["model.layers.0.mlp.up_proj.weight"], alone["end"]["model.layers.0.mlp.up_proj.weight"]
    )
    assert torch.equal(alone["begin"]["model.embed_tokens.weight"], alone["end"]["model.embed_tokens.weight"])
    for world, layout in ((2, (2, 1)), (2, (1, 1)), (2, (1, 2)), (4, (2, 2))):
        assert_alike(run_ranks(world, run_steps, folder, layout, [], 0, 3), alone, f"{world} ranks, {layout}")


@pytest.mark.parametrize(
    "flags",
    [
        ["--training.recompute", "full"],
        ["--training.recompute", "selective"],
        ["--optimizer.distributed", "False"],
        ["--parallel.overlap-grad-reduce", "True"],
        ["--training.updates-per-rollout", "2"],
    ],
    ids=lambda flags: flags[0],
)
def test_options_do_not_change_the_training(tmp_path: Path, flags: list[str]) -> None:
    folder = str(make_model_folder(tmp_path / "model"))
    ratio = flags if "updates" in flags[0] else []  # compared with the same updates on one rank
    (alone,) = run_ranks(1, run_steps, folder, (1, 1), ratio, 0, 2)
    assert_alike(run_ranks(2, run_steps, folder, (2, 1), flags, 0, 2), alone, flags[0])


def test_twenty_merges_in_bfloat16_do_not_drift(tmp_path: Path) -> None:
    """Every weight is the one rounding of W0 + s B A."""
    folder = str(make_model_folder(tmp_path / "model"))
    run_ranks(1, merge_twenty_times, folder)


def merge_twenty_times(folder: str) -> None:
    trainer = make_trainer(folder, 1, 1, ["--model.dtype", "bfloat16"])
    adapters = trainer.policy.adapters
    start = [linear.weight.detach().clone() for linear in adapters.linears]
    bases = [tensor.clone() for tensor in adapters.base_tensors()]
    for step in range(20):
        batches, num_samples = batches_of(trainer, step)
        trainer.step(batches, step, num_samples)
    for linear, before in zip(adapters.linears, start, strict=True):
        expected = before.double()
        for pair in linear.pairs:
            expected[pair.rows] += linear.scale * pair.B.detach().double() @ pair.A.detach().double()
        error = (linear.weight.double() - expected).abs()
        assert bool((error <= 2.0**-8 * expected.abs() + 1e-9).all())
        assert not torch.equal(linear.weight, before)
    assert all(map(torch.equal, adapters.base_tensors(), bases))
    with adapters.starting_weights():
        for linear, before in zip(adapters.linears, start, strict=True):
            assert torch.equal(linear.weight, before)
    assert [adapters.stale(turn) for turn in range(len(adapters.linears))] == [None] * len(adapters.linears)


def test_only_the_targets_are_trained(tmp_path: Path) -> None:
    folder = str(make_model_folder(tmp_path / "model"))
    flags = ["--lora.targets", "q_proj", "v_proj", "down_proj"]
    (alone,) = run_ranks(1, run_steps, folder, (1, 1), flags, 0, 2)
    changed = {
        name.split(".")[-2]
        for name, tensor in alone["end"].items()
        if not torch.equal(tensor, alone["begin"][name])
    }
    assert changed == {"q_proj", "v_proj", "down_proj"}
    assert_alike(run_ranks(2, run_steps, folder, (2, 1), flags, 0, 2), alone, "tp 2")


# ------------------------------------------------------------------ checkpoints and exports


@pytest.mark.parametrize(
    ("dtype", "distributed"), [("float32", True), ("bfloat16", True), ("bfloat16", False)]
)
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path, dtype: str, distributed: bool) -> None:
    folder, run_dir = str(make_model_folder(tmp_path / "model")), str(tmp_path / "run")
    flags = ["--model.dtype", dtype, "--optimizer.distributed", str(distributed)]
    (whole,) = run_ranks(1, run_steps, folder, (1, 1), flags, 0, 4)
    (first,) = run_ranks(1, run_steps, folder, (1, 1), flags, 0, 2, run_dir, True)
    (rest,) = run_ranks(1, run_steps, folder, (1, 1), flags, 2, 2, run_dir)
    assert first["losses"] + rest["losses"] == whole["losses"]
    for name, tensor in whole["end"].items():
        assert torch.equal(rest["end"][name], tensor), name
    saved = sum(file.stat().st_size for file in Path(run_dir).rglob("*.distcp"))
    model = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    assert saved < model  # adapters and their moments, not the frozen weights


def test_another_layout_goes_on(tmp_path: Path) -> None:
    folder, run_dir = str(make_model_folder(tmp_path / "model")), str(tmp_path / "run")
    (whole,) = run_ranks(1, run_steps, folder, (1, 1), [], 0, 4)
    run_ranks(4, run_steps, folder, (2, 2), [], 0, 2, run_dir, True)
    for world, layout in ((1, (1, 1)), (2, (2, 1)), (2, (1, 2))):
        for rank in run_ranks(world, run_steps, folder, layout, [], 2, 2, run_dir):
            assert rank["losses"] == pytest.approx(whole["losses"][2:], rel=2e-6), layout


def write_both(folder: str, tp: int, pp: int, output: str) -> dict[str, torch.Tensor]:
    from rlsc_mcore.model.lora import write_adapter
    from rlsc_mcore.training.export import write_policy

    trainer = make_trainer(folder, tp, pp, [])
    for step in range(2):
        batches, num_samples = batches_of(trainer, step)
        trainer.step(batches, step, num_samples)
    policy, groups = trainer.policy, trainer.groups
    write_adapter(policy.adapters, trainer.config.lora, folder, Path(output) / "adapter", groups)
    write_policy(policy, Path(folder), Path(output) / "merged", "float32", groups)
    return exported(trainer)


@pytest.mark.parametrize(("world", "tp", "pp"), [(1, 1, 1), (4, 2, 2)])
def test_the_adapter_is_the_one_that_peft_loads(tmp_path: Path, world: int, tp: int, pp: int) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    folder = str(make_model_folder(tmp_path / "model"))
    expected = run_ranks(world, write_both, folder, tp, pp, str(tmp_path))[0]
    base = AutoModelForCausalLM.from_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == RANK
    merged = loaded.merge_and_unload().state_dict()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}")
        assert torch.equal(ours[name], tensor)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora.rank", "-1"], r"lora\.rank: expected 0 \(off\) or more, got -1"),
        (["--lora.alpha", "0"], r"lora\.alpha: expected more than 0"),
        (["--lora.targets", "q_proj", "qkv"], r"lora\.targets: expected different ones of q_proj, "),
        (["--lora.targets", "q_proj", "q_proj"], r"lora\.targets: expected different ones of q_proj, "),
        (["--model.layers", "transformer_engine"], r"model\.layers: expected torch or auto with lora\.rank"),
        (
            ["--parallel.overlap-grad-reduce", "True", "--parallel.overlap-param-gather", "True"],
            r"parallel\.overlap_param_gather: expected false with lora\.rank",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(tmp_path, [*FLAGS, *flags])
