"""The training-step benchmark: its timers disturb nothing and lose nothing, its gate notices wrong
weights."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_train_step
from benchmarks.bench_train_step import Bench, default_flags, describe, flag_value, short_name
from rlsc_mcore.planning.known_models import MODELS
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import make_model_folder

PARTS = {"attention", "mlp", "head", "optimizer"}


def options(folder: str, **changes: Any) -> argparse.Namespace:
    found = {
        "shape": folder,
        "layers": None,
        "sequences": 4,
        "sequence_length": 24,
        "prompt_tokens": 4,
        "ragged": True,
        "repeats": 2,
    }
    return argparse.Namespace(**{**found, **changes})


def make_bench(folder: str, scratch: str, tp: int, *flags: str) -> Bench:
    from rlsc_mcore.parallel.backend import get_backend
    from rlsc_mcore.parallel.groups import initialize_groups

    backend = get_backend()
    groups = initialize_groups(backend, tp)
    mine = Path(scratch) / f"{groups.rank}"
    mine.mkdir()
    flags = (
        "--model.dtype",
        "float32",
        "--parallel.tp",
        str(tp),
        "--training.tokens-per-micro-batch",
        "48",
        *flags,
    )
    return Bench(options(folder), flags, backend, groups, mine)


def steps(bench: Bench, *, timed: bool) -> dict[str, Any]:
    """Three steps of a fresh trainer, the middle one timed or not."""
    from benchmarks.step_parts import timed_parts
    from benchmarks.trainers import make_trainer

    trainer = make_trainer(bench.folder, bench.flags, bench.backend, bench.groups)
    step = bench.our_step(trainer)
    outcomes, parts = [step()], {}
    if timed:
        with timed_parts(trainer) as timer:
            timer.begin("whole")
            outcomes.append(step())
            timer.end("whole")
            parts = timer.seconds()
    else:
        outcomes.append(step())
    outcomes.append(step())
    left = [name for name in ("_update",) if name in vars(trainer)]
    left += [
        name
        for name, module in trainer.policy.model.named_modules()
        if {"forward", "_postprocess"} & vars(module).keys()
    ]
    return {"outcomes": [(o.loss, o.grad_norm) for o in outcomes], "parts": parts, "left": left}


def timed_and_not(folder: str, scratch: str, tp: int, recompute: str) -> dict[str, Any]:
    bench = make_bench(folder, scratch, tp, "--training.recompute", recompute)
    return {
        "plain": steps(bench, timed=False),
        "timed": steps(bench, timed=True),
        "batches": bench.check()["sequences"],
    }


@pytest.mark.parametrize(
    ("world", "tp", "recompute"), [(1, 1, "none"), (1, 1, "selective"), (2, 2, "full"), (2, 1, "none")]
)
def test_timing_the_parts_changes_nothing_and_is_complete(
    tmp_path: Path, world: int, tp: int, recompute: str
) -> None:
    folder = str(make_model_folder(tmp_path / "model"))
    for rank in run_ranks(world, timed_and_not, folder, str(tmp_path), tp, recompute):
        for timed, plain in zip(rank["timed"]["outcomes"], rank["plain"]["outcomes"], strict=True):
            assert timed == pytest.approx(plain, rel=1e-6)
        assert rank["timed"]["left"] == []
        parts = rank["timed"]["parts"]
        assert parts.keys() == PARTS | {"whole"} and min(parts.values()) > 0
        inside = sum(parts[part] for part in PARTS)
        assert 0.3 * parts["whole"] < inside < parts["whole"]


def slow_part(folder: str, scratch: str, part: str) -> dict[str, float]:
    """Seconds by part where one part works in vain, forward and backward."""
    import time

    from benchmarks.step_parts import timed_parts
    from benchmarks.trainers import make_trainer

    def work(seconds: float) -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    class Work(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
            work(0.2)
            return tensor.view_as(tensor)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            work(0.3)
            return gradient

    bench = make_bench(folder, scratch, 1, "--training.tokens-per-micro-batch", "4096")
    trainer = make_trainer(bench.folder, bench.flags, bench.backend, bench.groups)
    step = bench.our_step(trainer)
    step()
    layer = trainer.policy.model.decoder.layers[1]
    module = {"attention": layer.self_attention.linear_proj, "mlp": layer.mlp.linear_fc1}[part]
    plain = module.forward
    module.forward = lambda tensor, *args, **kwargs: plain(Work.apply(tensor), *args, **kwargs)
    with timed_parts(trainer) as timer:
        step()
        return timer.seconds()


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_time_is_put_down_to_the_part_that_takes_it(tmp_path: Path, part: str) -> None:
    folder = str(make_model_folder(tmp_path / "model"))
    (found,) = run_ranks(1, slow_part, folder, str(tmp_path), part)
    assert found[part] > 0.5
    assert all(seconds < 0.2 for other, seconds in found.items() if other != part)


def wrong_weights(folder: str, scratch: str) -> str:
    bench = make_bench(folder, scratch, 1)
    plain = bench_train_step.export_weights

    def scrambled(*arguments: Any) -> Any:
        for name, tensor in plain(*arguments):
            yield name, tensor.roll(1, 0) if name.endswith("mlp.up_proj.weight") else tensor

    bench_train_step.export_weights = scrambled
    try:
        bench.check()
    except AssertionError as error:
        return str(error)
    return ""


def test_the_gate_notices_other_weights(tmp_path: Path) -> None:
    (message,) = run_ranks(1, wrong_weights, str(make_model_folder(tmp_path / "model")), str(tmp_path))
    assert message.startswith("step 1: ") and "transformers" in message


def collectives(folder: str, scratch: str, tp: int) -> tuple[float, float]:
    from benchmarks.step_parts import seconds_in_collectives
    from benchmarks.trainers import make_trainer

    bench = make_bench(folder, scratch, tp)
    trainer = make_trainer(bench.folder, bench.flags, bench.backend, bench.groups)
    step = bench.our_step(trainer)
    step()
    return seconds_in_collectives(bench.backend, step), seconds_in_collectives(
        bench.backend, lambda: torch.ones(8) @ torch.ones(8)
    )


def test_collectives_are_timed(tmp_path: Path) -> None:
    for seconds, without in run_ranks(
        2, collectives, str(make_model_folder(tmp_path / "model")), str(tmp_path), 2
    ):
        assert 0 < seconds < 60 and without == 0


@pytest.mark.parametrize(
    ("shape", "mfu", "said"),
    [
        ("qwen2.5-1.5b", 0.46, "goal on one H200 45%: reached"),
        ("qwen2.5-7b", 0.46, "goal on one H200 50%: MISSED"),
    ],
)
def test_the_verdict(shape: str, mfu: float, said: str) -> None:
    utilisation = {"mfu": mfu, "goal_on_one_h200": bench_train_step.GOALS[shape]}
    assert said in describe({"utilisation": utilisation, "about": {"shape": shape}})


def test_settings_that_fit_a_gpu_are_the_last_word_of_nobody() -> None:
    class Gpu:
        is_cuda = True

    flags = [*default_flags(MODELS["qwen2.5-7b"], Gpu()), "--training.tokens-per-micro-batch=6144"]  # type: ignore[arg-type]
    assert flag_value(flags, "--training.tokens-per-micro-batch", "") == "6144"
    assert flag_value(flags, "--optimizer.cpu-offload", "") == "0.5" or "--optimizer.precision-aware" in flags
    assert (
        flag_value(default_flags(MODELS["qwen2.5-1.5b"], Gpu()), "--training.tokens-per-micro-batch", "")
        == "15360"
    )  # type: ignore[arg-type]
    assert {short_name(name) for name in ("Qwen/Qwen2.5-7B", "qwen2.5-1.5b")} == set(bench_train_step.GOALS)
