"""Training steps of real sizes, cut to a few layers, on fake CUDA tensors.

Every option that only a GPU has runs, holds the memory that is planned, and waits for the device where it
must and nowhere else.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlsc_mcore.config import ConfigError, LoraConfig, RunError
from rlsc_mcore.planning.memory import Layout, host_bytes, stage_train_bytes, static_bytes
from rlsc_mcore.rehearsal.run import fake_cuda_library, run_rank
from tests.rehearsal.cases import CASES, COLLECTIVES, LAYERS, MICRO_BATCH, Case, rehearse
from tests.rehearsal.shapes import model_folder

try:
    fake_cuda_library()
except ConfigError as error:
    pytest.skip(f"no rehearsal here: {error}", allow_module_level=True)

EXPECTED_COLLECTIVES = json.loads(COLLECTIVES.read_text(encoding="utf-8"))
# What an update may read from the device, by who reads it: the loss and the norm.
READS = {
    "rlsc_mcore.training.step.Trainer.step": 1,
    "megatron.core.optimizer.clip_grads.get_grad_norm_fp32": 1,
}
# How many questions there are.
GROUP_READS = {"rlsc_mcore.algorithm.confidence.group_log_normalizer": 1}
# Megatron reads the three sizes of every tensor that a pipeline stage receives.
SHAPE_READS = "megatron.core.pipeline_parallel.p2p_communication.P2PCommunicator._communicate_shapes"
# Which functions copy tensors to the host: the scores of a step, the log-probs of all ranks' questions, an
# offloaded optimizer state.
COPIES = ("_collect", "_group_normalizers", "StateOffload")


# The other cases add one option each.
QUICK = ("plain", "group softmax, two updates", "LoRA", "pipeline with all options, last stage")


def expected_reads(case: Case, step: dict[str, Any]) -> dict[str, int]:
    updates = 2 if "--training.updates-per-rollout" in case.flags else 1
    reads = {caller: updates * count for caller, count in READS.items()}
    is_last = case.stage == case.pp - 1
    if "group_softmax" in case.flags and is_last:
        reads |= GROUP_READS
    if case.pp > 1:
        # A tensor is received after its shape: two receives.
        reads[SHAPE_READS] = 3 * step["collectives"]["recv over pipeline_model_parallel (2)"] // 2
    return reads


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_a_step_runs_and_holds_what_is_planned(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    _, shape = model_folder(tmp_path / case.model, case.model, LAYERS)
    layout = Layout(case.tp, case.dp, pp=case.pp, **case.planned)
    run = rehearse(tmp_path, case)
    held = static_bytes(shape, layout, case.stage)
    assert run["built"] == pytest.approx(sum(held.values()), rel=0.01)
    if case.pp == 1:  # the plan counts the largest stage
        assert run["saved"] == pytest.approx(host_bytes(shape, layout)["a save"], rel=0.02)
    assert run["steps"][-1]["collectives"] == EXPECTED_COLLECTIVES[name]
    asleep = held["weights"] + (0 if case.planned.get("offload_during_rollout") else held["optimizer"])
    for step in run["steps"]:
        assert step["updated"] and step["reads"] == expected_reads(case, step)
        assert step["released"] == pytest.approx(asleep, rel=0.01)
        to_host = {
            caller: size
            for caller, size in step["copies_to_host"].items()
            if not any(name in caller for name in COPIES)
        }
        if "cpu_offload" in case.planned:  # gradients travel to the host, one copy
            (size,) = to_host.values()
            assert size == pytest.approx(held["gradients"] / case.dp, rel=0.01)
        else:
            assert not to_host


def test_stages_send_what_their_neighbours_receive() -> None:
    for pipeline in ("pipeline", "pipeline with all options"):
        first, last = (EXPECTED_COLLECTIVES[f"{pipeline}, {stage} stage"] for stage in ("first", "last"))
        for sender, receiver in ((first, last), (last, first)):
            sent, received = (
                {name.partition(" over ")[2]: count for name, count in each.items() if name.startswith(verb)}
                for each, verb in ((sender, "send"), (receiver, "recv"))
            )
            assert sent and sent == received


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tp", "pp", "world", "flags", "options"),
    [
        ("qwen2.5-1.5b", 1, 1, 1, [], {}),
        ("qwen2.5-1.5b", 1, 1, 1, ["--training.recompute", "selective"], {"recompute": "selective"}),
        ("qwen2.5-7b", 4, 1, 8, [], {}),
        ("qwen2.5-7b", 2, 2, 8, [], {}),
        ("qwen2.5-72b", 8, 1, 32, ["--training.recompute", "full"], {"recompute": "full"}),
        (
            "qwen2.5-7b",
            1,
            1,
            1,
            ["--lora.rank", "32", "--training.recompute", "full"],
            {"recompute": "full", "lora": LoraConfig(rank=32)},
        ),
    ],
    ids=["1.5b", "1.5b selective", "7b tp 4", "7b tp 2 pp 2", "72b tp 8 full", "7b LoRA"],
)
def test_the_peak_of_a_whole_model_is_planned(
    tmp_path: Path, name: str, tp: int, pp: int, world: int, flags: list[str], options: dict[str, Any]
) -> None:
    """Within 5 %, tensors alone: an engine and contexts are not rehearsed."""
    model, shape = model_folder(tmp_path / "model", name)
    base = ["--run-dir", "unused", "--model.path", str(model), "--data.path", "embedded:train"]
    layout = ["--parallel.tp", str(tp), "--parallel.pp", str(pp)]
    for stage in range(pp):
        run = run_rank(
            [*base, *layout, *MICRO_BATCH, *flags],
            model,
            rank=stage * (world // pp),
            world_size=world,
            lengths=(2000,) * 8,
            timeout_s=280,
        )
        (step,) = run["steps"]
        planned = stage_train_bytes(
            shape,
            Layout(
                tp, world // tp // pp, pp=pp, tokens_per_micro_batch=max(step["micro_batches"]), **options
            ),
            stage,
        )
        parts = sum(planned.values()) - planned["engine"] - planned["contexts"]
        print(f"stage {stage}: peak {step['peak'] / 2**30:.2f} GiB, planned {parts / 2**30:.2f}")
        assert parts == pytest.approx(step["peak"], rel=0.05)


def test_ranks_with_unequal_micro_batches_take_part_in_the_same_collectives(tmp_path: Path) -> None:
    """Over the data-parallel group: a rank that began one more would wait for ever. Tensor-parallel ones
    follow the micro-batches."""
    flags = ["--training.tokens-per-micro-batch", "2048"]
    few = rehearse(tmp_path, CASES["plain"], *flags, lengths=(1500,))
    many = rehearse(tmp_path, CASES["plain"], *flags, lengths=(1500,) * 3)
    for one, other in zip(few["steps"], many["steps"], strict=True):
        assert (len(one["micro_batches"]), len(other["micro_batches"])) == (1, 3)
        assert one["collectives"] == other["collectives"] and one["reads"] == other["reads"]


def test_what_fails_is_told_in_one_line(tmp_path: Path) -> None:
    expected = r"^rank 0 of 8 fails in the rehearsal: optimizer\.precision_aware, .*: choose one of the two$"
    with pytest.raises(RunError, match=expected) as caught:
        rehearse(tmp_path, CASES["precision aware"], "--optimizer.cpu-offload", "1.0")
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
        "rehearsing 8 GPUs: 24 sequences of 1280 tokens" in out
        and "it runs: 2 micro-batches of 15360 tokens" in out
    )
    assert "a step reads 2 values" in out and "memory" not in out


def test_the_command_rehearses_every_stage_of_a_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    from rlsc_mcore.commands.rehearse import run_rehearse

    recipe = ["--model.path", "Qwen/Qwen2.5-7B", "--data.path", "embedded:train", "--parallel.tp", "2"]
    options = [
        "--parallel.pp",
        "2",
        "--rollout.max-new-tokens",
        "1024",
        "--optimizer.precision-aware",
        "True",
    ]
    assert run_rehearse([*recipe, *options, "--gpus", "8", "--layers", "2"]) == 0
    out = capsys.readouterr().out
    assert "rank 0, pipeline stage 0:" in out and "rank 4, pipeline stage 1:" in out
    assert out.count("it runs: 2 micro-batches") == 2 and "send over pipeline_model_parallel (2)" in out
