"""Training steps of real sizes, cut to a few layers, on fake CUDA tensors.

Every option that only a GPU has runs, holds the memory that is planned, and waits for the device where it
must and nowhere else.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from rlsc_mcore.config import ConfigError, RunError
from rlsc_mcore.planning.memory import Layout, host_bytes, static_bytes, train_bytes
from rlsc_mcore.rehearsal.run import fake_cuda_library, run_rank
from tests.rehearsal.shapes import model_folder

try:
    fake_cuda_library()
except ConfigError as error:
    pytest.skip(f"no rehearsal here: {error}", allow_module_level=True)

TE_ADAM = ["tests.rehearsal.setup:transformer_engine_adam"]
# What a step may read from the device, by who reads it: the loss, the norm, and the scores in one copy.
READS = {
    "rlsc_mcore.training.step.Trainer.step": 1,
    "megatron.core.optimizer.clip_grads.get_grad_norm_fp32": 1,
}
LAYOUTS = {"1.5b": ("qwen2.5-1.5b", 2, 1, 1), "7b": ("qwen2.5-7b", 2, 4, 8), "72b": ("qwen2.5-72b", 2, 8, 32)}


def rehearse(
    folder: Path,
    layout: str,
    *flags: str,
    rank: int = 0,
    lengths: tuple[int, ...] = (1500,) * 8,
    **options: Any,
) -> dict[str, Any]:
    name, layers, tp, world = LAYOUTS[layout]
    model, _ = model_folder(folder / layout, name, layers)
    base = [
        "--run-dir",
        "unused",
        "--model.path",
        str(model),
        "--data.path",
        "embedded:train",
        "--parallel.tp",
        str(tp),
    ]
    return run_rank(
        [*base, *flags],
        model,
        rank=rank,
        world_size=world,
        lengths=lengths,
        steps=2,
        timeout_s=280,
        **options,
    )


@pytest.mark.parametrize(
    ("layout", "flags", "planned"),
    [
        ("1.5b", [], {}),
        ("7b", ["--parallel.overlap-grad-reduce", "True", "--parallel.overlap-param-gather", "True"], {}),
        ("72b", ["--training.recompute", "full"], {}),
        ("7b", ["--optimizer.precision-aware", "True"], {"precision_aware": True}),
        ("1.5b", ["--optimizer.cpu-offload", "1.0"], {"cpu_offload": 1.0}),
        ("1.5b", ["--optimizer.offload-during-rollout", "True"], {"offload_during_rollout": True}),
        (
            "1.5b",
            ["--optimizer.grad-dtype", "bfloat16", "--training.recompute", "selective"],
            {"grad_dtype": "bfloat16"},
        ),
        ("7b", ["--algorithm.objective", "entropy"], {}),
    ],
    ids=[
        "plain",
        "overlap",
        "full recompute",
        "precision aware",
        "cpu offload",
        "offload in rollouts",
        "bfloat16 gradients",
        "entropy",
    ],
)
def test_a_step_runs_and_holds_what_is_planned(
    tmp_path: Path, layout: str, flags: list[str], planned: dict[str, Any]
) -> None:
    name, layers, tp, world = LAYOUTS[layout]
    _, shape = model_folder(tmp_path / layout, name, layers)
    needs_adam = {"precision_aware", "cpu_offload"} & planned.keys()
    run = rehearse(tmp_path, layout, *flags, setup=TE_ADAM if needs_adam else [])
    held = static_bytes(shape, Layout(tp, world // tp, **planned))
    assert run["built"] == pytest.approx(sum(held.values()), rel=0.01)
    assert run["saved"] == pytest.approx(
        host_bytes(shape, Layout(tp, world // tp, **planned))["a save"], rel=0.02
    )
    asleep = held["weights"] + (0 if planned.get("offload_during_rollout") else held["optimizer"])
    for step in run["steps"]:
        assert step["updated"] and step["reads"] == READS
        assert step["released"] == pytest.approx(asleep, rel=0.01)
        to_host = {
            caller: size
            for caller, size in step["copies_to_host"].items()
            if "_collect" not in caller and "StateOffload" not in caller
        }
        if "cpu_offload" in planned:  # gradients travel to the host, one copy
            (size,) = to_host.values()
            assert size == pytest.approx(held["gradients"] / (world // tp), rel=0.01)
        else:
            assert not to_host


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tp", "world", "flags", "options"),
    [
        ("qwen2.5-1.5b", 1, 1, [], {}),
        ("qwen2.5-1.5b", 1, 1, ["--training.recompute", "selective"], {"recompute": "selective"}),
        ("qwen2.5-7b", 4, 8, [], {}),
        ("qwen2.5-72b", 8, 32, ["--training.recompute", "full"], {"recompute": "full"}),
    ],
    ids=["1.5b", "1.5b selective", "7b tp 4", "72b tp 8 full"],
)
def test_the_peak_of_a_whole_model_is_planned(
    tmp_path: Path, name: str, tp: int, world: int, flags: list[str], options: dict[str, str]
) -> None:
    """Within 5 %, tensors alone: an engine and contexts are not rehearsed."""
    model, shape = model_folder(tmp_path / "model", name)
    base = [
        "--run-dir",
        "unused",
        "--model.path",
        str(model),
        "--data.path",
        "embedded:train",
        "--parallel.tp",
        str(tp),
    ]
    run = run_rank([*base, *flags], model, rank=0, world_size=world, lengths=(2000,) * 4, timeout_s=280)
    (step,) = run["steps"]
    planned = train_bytes(
        shape, Layout(tp, world // tp, tokens_per_micro_batch=max(step["micro_batches"]), **options)
    )
    parts = sum(planned.values()) - planned["engine"] - planned["contexts"]
    print(f"peak {step['peak'] / 2**30:.2f} GiB, planned {parts / 2**30:.2f}")
    assert parts == pytest.approx(step["peak"], rel=0.05)


def test_two_passes_and_two_updates_read_no_more_per_update(tmp_path: Path) -> None:
    run = rehearse(
        tmp_path, "1.5b", "--algorithm.confidence", "group_softmax", "--training.updates-per-rollout", "2"
    )
    for step in run["steps"]:
        scored = {"rlsc_mcore.algorithm.confidence.group_log_normalizer": 1}  # how many questions there are
        assert (
            step["updated"]
            and step["reads"] == {caller: 2 * count for caller, count in READS.items()} | scored
        )


def test_ranks_with_unequal_micro_batches_take_part_in_the_same_collectives(tmp_path: Path) -> None:
    """Over the data-parallel group: a rank that began one more would wait for ever. Tensor-parallel ones
    follow the micro-batches."""
    flags = ["--training.tokens-per-micro-batch", "2048"]
    few = rehearse(tmp_path, "1.5b", *flags, lengths=(1500,))
    many = rehearse(tmp_path, "1.5b", *flags, lengths=(1500,) * 3)
    for one, other in zip(few["steps"], many["steps"], strict=True):
        assert (len(one["micro_batches"]), len(other["micro_batches"])) == (1, 3)
        assert one["collectives"] == other["collectives"] and one["reads"] == other["reads"]


def test_what_fails_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"^rank 0 of 1 fails in the rehearsal: .*optimizer\.precision_aware: it needs"
    ) as caught:
        rehearse(tmp_path, "1.5b", "--optimizer.precision-aware", "True")
    assert "\n" not in str(caught.value) and not torch.cuda.is_available()


def test_the_command_tells_whether_a_recipe_runs(capsys: pytest.CaptureFixture[str]) -> None:
    from rlsc_mcore.commands.rehearse import run_rehearse

    recipe = [
        "--model.path",
        "Qwen/Qwen2.5-7B",
        "--data.path",
        "embedded:train",
        "--parallel.tp",
        "4",
        "--rollout.max-new-tokens",
        "1024",
    ]
    assert run_rehearse([*recipe, "--gpus", "8", "--layers", "1"]) == 0
    out = capsys.readouterr().out
    assert (
        "rehearsing rank 0 of 8: 24 sequences of 1280 tokens" in out
        and "it runs: 2 micro-batches of 15360 tokens" in out
    )
    assert "a step reads 2 values" in out and "memory" not in out
