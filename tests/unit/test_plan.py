"""`rlsc plan`: what is counted from shapes, what fits where, and that no torch is needed."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rlsc_mcore.commands.plan import dry_run_config, run_plan
from rlsc_mcore.commands.train import run_train
from rlsc_mcore.config import ConfigError
from rlsc_mcore.config_file import parse_config
from rlsc_mcore.model.shape import Architecture
from rlsc_mcore.model.weight_map import BoundWeight, describe_weights, join_stages
from rlsc_mcore.planning.known_models import MODELS, num_parameters
from rlsc_mcore.planning.layouts import Candidate, candidates
from rlsc_mcore.planning.memory import (
    Layout,
    activation_bytes,
    checkpoint_bytes,
    config_layout,
    engine_weight_bytes,
    host_bytes,
    kv_bytes_per_token,
    rank_parameters,
    rollout_bytes,
    static_bytes,
    train_bytes,
    update_bytes,
)
from rlsc_mcore.planning.timing import GPUS, Work, pipeline_waits, seconds, swapped_bytes
from rlsc_mcore.weight_sync.plan import Place, build_plan
from tests.helpers.tiny import tiny_config
from tests.unit.test_swap_plan import engine_tensors, shapes_of
from tests.unit.test_weight_map import TORCH_NORMS, Shape, bound_ranks

WORK = Work(1024, 256, 1024, 3072)


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("gpus", [1, 8, 64, 512])
def test_every_model_is_planned_on_1_to_512_gpus(
    capsys: pytest.CaptureFixture[str], name: str, gpus: int
) -> None:
    code = run_plan(
        ["--model", name, "--gpus", str(gpus), "--gpu-memory-gib", "141", "--questions-per-step", "512"]
    )
    out = capsys.readouterr().out
    assert f"{gpus} x H200 with 141 GiB" in out
    assert ("best: parallel.tp" in out) == (code == 0) and ("nothing fits" in out) == (code == 1)


def test_one_gpu_s_bytes_written_out() -> None:
    shape = MODELS["qwen2.5-7b"]
    held = static_bytes(shape, Layout(1, 1))
    assert held == {
        "weights": 2 * 7_615_616_512,
        "gradients": 4 * 7_615_616_512,
        "optimizer": 12 * 7_615_616_512,
    }
    assert static_bytes(shape, Layout(1, 4))["optimizer"] == 3 * 7_615_616_512
    assert static_bytes(shape, Layout(1, 4, distributed=False))["optimizer"] == 12 * 7_615_616_512
    assert static_bytes(shape, Layout(1, 1, dtype="float32"))["optimizer"] == 8 * 7_615_616_512
    assert static_bytes(shape, Layout(1, 4, precision_aware=True))["optimizer"] == 2 * 7_615_616_512
    assert static_bytes(shape, Layout(1, 1, cpu_offload=0.75))["optimizer"] == 3 * 7_615_616_512
    kept, moved = (rollout_bytes(shape, Layout(1, 4, offload_during_rollout=out), 0) for out in (False, True))
    assert sum(kept.values()) - sum(moved.values()) == 3 * 7_615_616_512  # and training needs what it needs
    assert train_bytes(shape, Layout(1, 4, offload_during_rollout=True)) == train_bytes(shape, Layout(1, 4))
    assert kept["gradients"] == moved["gradients"] == 0  # the buffers are freed before the engine wakes
    assert static_bytes(shape, Layout(1, 1, grad_dtype="bfloat16"))["gradients"] == 2 * 7_615_616_512
    # An update's float32 copies count where they outlast the activations: both moments, or the gradients of a
    # shard.
    assert update_bytes(shape, Layout(1, 4)) == 0
    assert update_bytes(shape, Layout(1, 1, precision_aware=True)) == 8 * (
        152064 * 3584 + (64 << 20)
    )  # the largest parameter, a part
    assert update_bytes(shape, Layout(4, 64, precision_aware=True)) == 8 * (
        static_bytes(shape, Layout(4, 1))["weights"] // 2 // 64
    )
    assert update_bytes(shape, Layout(1, 4, grad_dtype="bfloat16")) == 7_615_616_512
    update = train_bytes(shape, Layout(1, 1, "full", tokens_per_micro_batch=64, precision_aware=True))
    workspace = update["activations"] + update["logits workspace"] + update["update beyond them"]
    assert workspace == update_bytes(shape, Layout(1, 1, precision_aware=True))
    # On the host: what a save copies, and what was moved or is updated there.
    shard = 7_615_616_512 // 4
    assert host_bytes(shape, Layout(1, 4)) == {"a save": 14 * shard, "optimizer state": 0}
    assert host_bytes(shape, Layout(1, 4, distributed=False))["a save"] == 14 * 7_615_616_512
    assert host_bytes(shape, Layout(1, 4, precision_aware=True))["a save"] == 10 * shard
    assert host_bytes(shape, Layout(1, 4, offload_during_rollout=True))["optimizer state"] == 12 * shard
    assert host_bytes(shape, Layout(1, 4, cpu_offload=0.5))["optimizer state"] == 8 * shard
    # A checkpoint holds weights and states once, whatever the layout.
    for layout in (Layout(1, 4), Layout(4, 2, distributed=False), Layout(2, 1, pp=2)):
        expected = 14 * 7_615_616_512
        assert checkpoint_bytes(shape, layout) == pytest.approx(expected, rel=1e-3)
    assert checkpoint_bytes(shape, Layout(1, 1, precision_aware=True)) == 10 * 7_615_616_512
    assert checkpoint_bytes(shape, Layout(1, 1, dtype="float32")) == 16 * 7_615_616_512
    assert checkpoint_bytes(shape, Layout(1, 1, dtype="float32", distributed=False)) == 12 * 7_615_616_512
    # Keys and values of 28 layers, 4 KV heads of 128, in bfloat16.
    assert kv_bytes_per_token(shape, Layout(1, 1)) == 2 * 28 * 4 * 128 * 2
    assert kv_bytes_per_token(shape, Layout(4, 1)) == 2 * 28 * 1 * 128 * 2


def test_what_is_spread_shrinks_and_what_is_recomputed_is_not_kept() -> None:
    shape = MODELS["qwen2.5-7b"]
    sizes = [activation_bytes(shape, Layout(1, 1, recompute)) for recompute in ("none", "selective", "full")]
    assert sizes[0] > sizes[1] > sizes[2]
    assert activation_bytes(shape, Layout(4, 1)) < activation_bytes(shape, Layout(1, 1)) / 3
    assert activation_bytes(shape, Layout(1, 1, tokens_per_micro_batch=32768)) == 2 * sizes[0]


def test_an_engine_of_another_size() -> None:
    """Written out for 7B, bfloat16: what its ranks hold, receive and sample."""
    shape = MODELS["qwen2.5-7b"]
    numel = 7_615_616_512
    equal, single, wide = Layout(4, 2), Layout(4, 2, engine_tp=1), Layout(1, 8, engine_tp=4)
    assert (
        engine_weight_bytes(shape, equal) == 2 * 28 * 3584 * (28 + 8) * 128 // 4
    )  # the permuted projections alone
    assert engine_weight_bytes(shape, single) == 2 * numel + 2 * 5 * (
        32 << 20
    )  # a copy, and the exchange's buffers
    assert engine_weight_bytes(shape, wide) < 2 * numel / 3.9  # a slice, without any exchange
    assert [layout.num_engines for layout in (equal, single, wide)] == [2, 8, 2]
    split = numel - (2 * 28 + 1) * 3584  # every rank has the norms
    assert (
        swapped_bytes(shape, single) == 2 * split * 3 // 4
        and swapped_bytes(shape, equal) == swapped_bytes(shape, wide) == 0
    )
    # Of a trainer of 4 and engines of 8, rank 3 samples with the fourth eighth, which rank 1 trains; rank 0
    # with its own.
    assert swapped_bytes(MODELS["qwen2.5-32b"], Layout(4, 8, engine_tp=8)) == pytest.approx(
        7.63 * 2**30, rel=1e-3
    )
    assert kv_bytes_per_token(shape, single) == 4 * kv_bytes_per_token(shape, equal)
    gpu = GPUS["h200"]
    assert seconds(shape, single, WORK, gpu, 8)["swap"] == pytest.approx(2 * split * 0.75 / 450e9)
    many = Work(65536, 256, 1024, 3072)  # so many answers that weights are read for full batches only
    assert seconds(shape, single, many, gpu, 8)["rollout"] < seconds(shape, equal, many, gpu, 8)["rollout"]
    few = Work(
        64, 256, 1024, 3072
    )  # the longest answer decides: more GPUs read the weights of each token faster
    assert seconds(shape, single, few, gpu, 8)["rollout"] > seconds(shape, equal, few, gpu, 8)["rollout"]


def held_stages(
    a: Architecture, stage_layers: tuple[int, ...], tp: int, stage: int, tp_rank: int
) -> list[BoundWeight]:
    """All weights as a rank of a trainer in stages has them."""
    layer_of = {
        weight.engine: re.search(r"layers\.(\d+)\.", weight.engine)
        for weight in bound_ranks(a, tp, TORCH_NORMS)[tp_rank]
    }
    ends = [sum(stage_layers[: number + 1]) for number in range(len(stage_layers))]
    held: list[list[BoundWeight]] = [[] for _ in stage_layers]
    for weight in bound_ranks(a, tp, TORCH_NORMS)[tp_rank]:
        match = layer_of[weight.engine]
        if match is not None:
            held[next(number for number, end in enumerate(ends) if int(match[1]) < end)].append(weight)
        elif "embed" not in weight.engine:
            held[-1].append(weight)
        else:
            held[0].append(weight)
            if a.tied_embeddings and len(stage_layers) > 1:
                held[-1].append(replace(weight, name="output_layer.weight"))
    return join_stages(held[stage], stage, [describe_weights(weights) for weights in held])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("tp", "dp", "pp", "engine"),
    [(1, 1, 1, 1), (2, 1, 1, 2), (4, 1, 1, 1), (4, 1, 1, 2), (4, 2, 1, 8), (2, 2, 1, 4), (2, 4, 1, 8), (1, 2, 1, 2), (1, 1, 2, 1),
     (1, 2, 2, 1), (2, 1, 2, 2), (2, 2, 2, 4), (4, 1, 2, 1), (1, 1, 3, 1), (2, 2, 2, 1), (1, 4, 2, 2)],
)  # fmt: skip
def test_what_a_swap_receives_is_what_its_plan_says(
    tp: int, dp: int, pp: int, engine: int, tied: bool
) -> None:
    a = Shape(8, 2, 1, 4, 16, 3, 256, 6, tied, "Qwen2ForCausalLM").architecture()
    stage_layers = {1: (6,), 2: (4, 2), 3: (3, 2, 1)}[pp]
    received = []
    for rank in range(tp * dp * pp):
        stage, within = divmod(rank, tp * dp)
        members = [s * tp * dp + within // tp * tp + t for s in range(pp) for t in range(tp)]
        place = Place(rank % tp, tp, engine, tuple(member % engine for member in members), stage, pp)
        weights = held_stages(a, stage_layers, tp, stage, rank % tp)
        shapes = shapes_of(engine_tensors(a, place.engine_rank, engine))
        elements = 0
        for item in build_plan(weights, a, shapes, place).copies:
            per_index = shapes[item.engine_name][0].numel() // shapes[item.engine_name][0][item.axis]
            elements += sum(
                block.length * per_index for block in item.blocks if block.source_rank != place.member
            )
        received.append(elements)
    layout = Layout(tp, dp, pp=pp, engine_tp=engine, stage_layers=stage_layers)
    assert swapped_bytes(a, layout) == 2 * max(received)


@pytest.mark.parametrize("name", ["qwen2.5-1.5b", "qwen2.5-72b", "qwen3-8b"])
def test_stages_share_the_model_and_hold_micro_batches_in_flight(name: str) -> None:
    shape = MODELS[name]
    layout = Layout(1, 1, pp=4)
    stages = [rank_parameters(shape, layout, stage) for stage in range(4)]
    copy = shape.padded_vocab_size(1) * shape.hidden_size if shape.tied_embeddings else 0
    assert sum(stages) == num_parameters(shape, padded=True) + copy
    assert sum(layout.layers_of(shape)) == shape.num_layers
    assert layout.layers_of(shape)[-1] < layout.layers_of(shape)[0]  # the head takes the place of layers
    even = replace(layout, stage_layers=(shape.num_layers // 4,) * 4)
    first, last = activation_bytes(shape, even, 0), activation_bytes(shape, even, 3)
    assert first == pytest.approx(4 * last, rel=1e-6)
    assert engine_weight_bytes(shape, Layout(2, 1, pp=2), 1) > engine_weight_bytes(shape, Layout(2, 1))
    # Every stage works as long as the slowest; with few micro-batches a pipeline mostly fills and empties.
    long, short = (
        pipeline_waits(shape, replace(layout, tokens_per_micro_batch=tokens), WORK)
        for tokens in (2048, 131072)
    )
    assert 1 < long < short and pipeline_waits(shape, Layout(1, 4), WORK) == 1


def test_layers_of_stages_are_balanced() -> None:
    for name, shape in MODELS.items():
        cost = shape.cost_model()
        head = cost.per_trained_token / (cost.per_token / shape.num_layers)
        for pp in (1, 2, 4, 8):
            layers = shape.stage_layers(pp)
            assert len(layers) == pp and sum(layers) == shape.num_layers and min(layers) >= 1, name
            assert max(layers[:-1], default=0) - min(layers[:-1], default=0) <= 1
            if layers[-1] > 1:
                assert layers[-1] + head <= max((*layers[:-1], layers[-1] + head))


# What other engines train with, as published: model, GPUs of 80 GB, their tensor- and pipeline-parallel size.
PEERS = [
    ("qwen2.5-7b", 8, 2, 2),
    ("qwen2.5-32b", 8, 8, 1),
    ("qwen2.5-32b", 32, 4, 4),
    ("llama-3.1-70b", 32, 4, 8),
    ("qwen2.5-72b", 32, 8, 2),
]


@pytest.mark.parametrize(("name", "gpus", "tp", "pp"), PEERS)
def test_every_dense_recipe_of_other_engines_is_planned(
    name: str, gpus: int, tp: int, pp: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """A layout that fits is found and named; theirs is one that fits."""
    command = ["--model", name, "--gpus", str(gpus), "--gpu-memory-gib", "80", "--max-num-seqs", "64"]
    assert run_plan(command) == 0
    assert "best: parallel.tp" in capsys.readouterr().out
    fits = [c for c in theirs(name, gpus, pp) if not c.why_not and c.layout.tp == tp]
    assert fits and all(c.layout.pp == pp and c.layout.num_gpus == gpus for c in fits)


def theirs(name: str, gpus: int, pp: int) -> list[Candidate]:
    return candidates(
        MODELS[name], Layout(1, 1), Work(1024, 256, 1024, 3072, 64), GPUS["h100"],
        num_gpus=gpus, gpu_bytes=80 << 30, gpus_per_node=8, pp=pp,
    )  # fmt: skip


def test_offloading_is_searched_and_its_seconds_count(capsys: pytest.CaptureFixture[str]) -> None:
    """32B on 8 x 80 GB: moving the optimizer's state out while sampling makes room for the cache, and costs
    two copies."""
    assert run_plan(["--model", "qwen2.5-32b", "--gpus", "8", "--gpu-memory-gib", "80"]) == 0
    out = capsys.readouterr().out
    assert "best: parallel.tp 8, optimizer.offload_during_rollout True, training.recompute full" in out
    assert "offload 3.9" in out  # twice 45.8 GiB at 25 GB/s
    rows = [line for line in out.splitlines() if "does not fit" in line]
    assert rows and all(line.split("  does not fit")[0].split()[-1] == "-" for line in rows)


def test_more_ranks_than_questions_are_planned() -> None:
    """1.5B on 512 GPUs with 64 questions of 16 answers: a rank needs an answer, not a question."""
    command = ["--model", "qwen2.5-1.5b", "--gpus", "512", "--gpu-memory-gib", "80"]
    assert run_plan([*command, "--questions-per-step", "64"]) == 0
    assert run_plan([*command, "--questions-per-step", "1", "--num-samples", "2"]) == 1


RECIPES = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("recipe", "gpus", "gib", "flags"),
    [
        ("qwen2.5_math_1.5b_1gpu.yaml", 1, 80, ()),
        ("qwen2.5_math_7b_1x8.yaml", 8, 80, ()),
        ("qwen3_8b_1x8.yaml", 8, 80, ()),
        ("qwen2.5_math_7b_lora_1gpu.yaml", 1, 48, ()),
        ("qwen3_4b_lora_1gpu.yaml", 1, 24, ()),
        ("qwen2.5_math_72b_4x8.yaml", 32, 80, ()),
        ("qwen2.5_math_72b_4x8.yaml", 32, 141, ("--training.recompute", "none")),
    ],
)
def test_recipes_fit_the_gpus_that_they_name(
    recipe: str, gpus: int, gib: int, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "--config",
        str(RECIPES / recipe),
        "--dry-run",
        "--gpus",
        str(gpus),
        "--gpu-memory-gib",
        str(gib),
        *flags,
    ]
    assert run_train(command) == 0
    assert "this configuration: parallel.tp" in capsys.readouterr().out


def test_the_engines_size_is_chosen_or_given() -> None:
    def best(**options: object) -> list[Candidate]:
        return candidates(
            MODELS["qwen2.5-7b"], Layout(1, 1, **options), Work(65536, 256, 1024, 3072), GPUS["h200"],  # type: ignore[arg-type]
            num_gpus=8, gpu_bytes=141 << 30, gpus_per_node=8,
        )  # fmt: skip

    fits = [c for c in best() if not c.why_not]
    assert {c.layout.engine_ranks for c in fits} == {1}  # a full batch per GPU is fastest
    assert {c.layout.engine_ranks for c in best(engine_tp=2)} == {2}


def test_candidates_are_sound() -> None:
    for name in ("qwen2.5-0.5b", "qwen2.5-7b", "qwen2.5-72b", "smollm2-135m"):
        shape = MODELS[name]
        found = candidates(
            shape, Layout(1, 1), WORK, GPUS["h200"], num_gpus=32, gpu_bytes=141 << 30, gpus_per_node=8
        )
        fits = [c for c in found if not c.why_not]
        assert found[: len(fits)] == fits and len(found) == 12
        assert [c.step_seconds for c in fits] == sorted(c.step_seconds for c in fits)
        for candidate in fits:
            assert candidate.peak_bytes <= 141 << 30 and shape.num_kv_heads % candidate.layout.tp == 0
            assert candidate.training == train_bytes(shape, candidate.layout)
        assert any("does not divide" in c.why_not for c in found) == bool(
            shape.num_heads % 8 or shape.num_kv_heads % 8
        )
    big = candidates(
        MODELS["qwen2.5-72b"],
        Layout(1, 1),
        WORK,
        GPUS["h200"],
        num_gpus=1,
        gpu_bytes=141 << 30,
        gpus_per_node=8,
    )
    assert all("training needs" in c.why_not for c in big)


def test_a_configuration_is_planned_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(
        "qwen2.5-72b", ["--parallel.tp", "8", "--training.recompute", "full", "--model.dtype", "bfloat16"]
    )
    assert dry_run_config(config, "32", "141") == 0
    assert "this configuration: parallel.tp 8, training.recompute full" in capsys.readouterr().out
    assert dry_run_config(config, "8", "80") == 1
    assert "does not fit: training needs" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"parallel\.tp: 8 does not divide 12 GPUs"):
        dry_run_config(config, "12", "80")
    with pytest.raises(ConfigError, match="--gpus: expected a number, more than 0, got 'many'"):
        dry_run_config(config, "many", "80")


def test_a_configuration_s_engines_are_planned(capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(
        "qwen2.5-7b", ["--parallel.tp", "4", "--rollout.tp", "1", "--training.recompute", "full"]
    )
    assert dry_run_config(config, "8", "141") == 0
    out = capsys.readouterr().out
    assert "this configuration: parallel.tp 4, rollout.tp 1, training.recompute full" in out
    assert "hot swap 21.28" in out  # three quarters of 28.4 GiB


def test_where_nothing_fits_the_least_costly_remedy_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """7B on one GPU: on 142 GiB with micro-batches of one longest sequence, on 126 GiB with bfloat16 moments
    too."""
    one = ["--model", "qwen2.5-7b", "--gpus", "1", "--gpu-memory-gib", "142"]
    assert run_plan(one) == 1
    out = capsys.readouterr().out
    layout = "parallel.tp 1, optimizer.offload_during_rollout True, training.recompute full"
    assert "nothing fits" in out and f"with --tokens-per-micro-batch 3328 {layout} fits:" in out
    one[-1] = "126"
    assert run_plan(one) == 1
    out = capsys.readouterr().out
    told = "with --tokens-per-micro-batch 3328 --precision-aware parallel.tp 1, training.recompute selective fits:"
    assert "nothing fits" in out and told in out
    assert run_plan([*one, *told.split()[1:4]]) == 0  # what is told is true
    assert "optimizer 56.74" in capsys.readouterr().out  # 8 bytes per parameter
    assert run_plan([*one, "--tokens-per-micro-batch", "3328", "--cpu-offload", "0.5"]) == 0
    assert "optimizer 42.56" in capsys.readouterr().out  # half of 12 bytes per parameter
    assert run_plan(["--model", "qwen2.5-32b", *one[2:]]) == 1
    assert "with --" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "asked", [["--precision-aware"], ["--offload-during-rollout"], ["--cpu-offload", "0.25"], []], ids=str
)
@pytest.mark.parametrize("memory", ["60", "100", "125", "141"])
def test_what_is_told_may_be_added_to_the_command(
    asked: list[str], memory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever was asked for already: the told flags exclude nothing of it, and then it fits."""
    command = ["--model", "qwen2.5-7b", "--gpus", "1", "--gpu-memory-gib", memory, *asked]
    if run_plan(command) == 1 and (
        told := [line for line in capsys.readouterr().out.splitlines() if line.startswith("with --")]
    ):
        flags = told[0].partition(" parallel.tp ")[0].split()[1:]
        assert run_plan([*command, *flags]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cpu-offload", "1.5"], "--cpu-offload: expected a share, at most 1, got 1.5"),
        (["--dtype", "float32", "--precision-aware"], "--precision-aware: expected --dtype bfloat16 with it"),
        (
            ["--cpu-offload", "1", "--offload-during-rollout"],
            "--cpu-offload: expected neither --precision-aware nor",
        ),
    ],
)
def test_settings_that_exclude_each_other(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_plan(["--model", "qwen2.5-7b", "--gpus", "1", "--gpu-memory-gib", "141", *flags])


@pytest.mark.parametrize("flag", ["--gpus", "--gpu-memory-gib", "--num-samples"])
def test_a_bad_number_is_named(flag: str) -> None:
    arguments = ["--model", "qwen2.5-7b", "--gpus", "1", "--gpu-memory-gib", "80", flag, "-1"]
    with pytest.raises(ConfigError, match=f"{flag}: expected more than 0, got -1"):
        run_plan(arguments)


def test_neither_plan_nor_dry_run_imports_torch(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from rlsc_mcore.cli import _run\n"
        "code = _run('plan', ['--model', 'qwen2.5-1.5b', '--gpus', '8', '--gpu-memory-gib', '80'])\n"
        "assert code == 0 and 'torch' not in sys.modules\n"
        f"flags = ['--dry-run', '--gpus', '1', '--run-dir', r'{tmp_path / 'run'}', '--model.path', 'embedded:tiny_qwen2']\n"
        "from rlsc_mcore.commands.train import run_train\n"
        "assert run_train([*flags, '--data.path', 'embedded:train', '--gpu-memory-gib', '80']) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "best: parallel.tp " in run.stdout and "this configuration: parallel.tp 1" in run.stdout
    assert not (tmp_path / "run").exists()


def test_the_head_s_workspace_is_that_of_the_kernels() -> None:
    from rlsc_mcore.ops.chunks import WORKSPACE_BYTES
    from rlsc_mcore.planning.memory import HEAD_WORKSPACE_BYTES

    assert WORKSPACE_BYTES["cuda"] == HEAD_WORKSPACE_BYTES


@pytest.mark.parametrize(
    ("flags", "copies"),
    [
        ([], 1),
        (["--algorithm.objective", "nsd"], 2),
        (["--algorithm.objective", "empo", "--algorithm.kl-start", "0.1"], 2),
        (["--algorithm.objective", "self_distill", "--distill.teacher", "start"], 2),
        (["--algorithm.objective", "self_distill"], 1),
    ],
)
def test_a_copy_of_the_starting_weights_is_counted(flags: list[str], copies: int) -> None:
    config = parse_config(["--run-dir", "r", "--model.path", "m", "--data.path", "d", *flags])
    shape = MODELS["qwen2.5-7b"]
    layout = config_layout(config, 4, 2)
    assert static_bytes(shape, layout)["weights"] == copies * 2 * rank_parameters(shape, layout)
