"""What the launch script asks before anything starts, without torch: one line and exit code 2, or the facts
of the run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlsc_mcore.commands.plan import dry_run_config
from rlsc_mcore.commands.train import run_train
from rlsc_mcore.config_file import dump_config, load_config, parse_config
from rlsc_mcore.model.hf_checkpoint import resolve_model_folder
from rlsc_mcore.planning.known_models import MODELS
from rlsc_mcore.planning.launch_checks import check_launch, main
from rlsc_mcore.planning.memory import Layout, rollout_bytes, train_bytes

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FLAGS = ["--model.path", "embedded:tiny_qwen2", "--model.dtype", "float32", "--data.path", "embedded:train"]


def check(tmp_path: Path, *flags: str, nodes: int = 1, ranks: int = 2) -> int:
    layout = ["--nodes", str(nodes), "--ranks-per-node", str(ranks)]
    return main([*layout, "--", *FLAGS, "--run-dir", str(tmp_path / "run"), "--parallel.tp", "2", *flags])


def test_facts_of_a_good_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path, nodes=2) == 0
    facts = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert (
        facts["run_dir"] == str(tmp_path / "run")
        and facts["layout"] == "tp 2 x dp 2"
        and facts["start"] == "a new run"
    )
    assert not list(tmp_path.iterdir())  # nothing is made


def test_tensor_parallelism_over_nodes_is_remarked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(tmp_path, nodes=2, ranks=1) == 0
    assert "tp 2 spans nodes of 1: slow" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "ranks", "message"),
    [
        ((), 3, "parallel.tp: 2 does not divide the 3 ranks (1 nodes x 3)"),
        (("--parallel.tp", "4"), 4, "parallel.tp: 4 does not divide num_key_value_heads = 2"),
        (
            ("--data.questions-per-step", "1", "--rollout.num-samples", "1"),
            4,
            "data.questions_per_step: 1 x rollout.num_samples 1 = 1 answers",
        ),
        (
            ("--parallel.pp", "3"),
            4,
            "parallel.pp: parallel.tp 2 x parallel.pp 3 = 6 do not divide the 4 ranks",
        ),
        (("--parallel.pp", "8", "--parallel.tp", "1"), 8, "parallel.pp: 8 stages, but"),
        (
            ("--model.path", "Qwen/Qwen2.5-0.5B", "--parallel.tp", "8"),
            8,
            "parallel.tp: 8 does not divide num_attention_heads = 14",
        ),
        (("--model.path", "/absent"), 2, "model.path: no folder /absent"),
        (("--model.path", "embedded:absent"), 2, "model.path: no folder embedded:absent"),
        (("--data.path", "absent.jsonl"), 2, "data.path: no file absent.jsonl"),
        (("--evaluation.path", "./absent.jsonl"), 2, "evaluation.path: no file ./absent.jsonl"),
        (("--run-dir", "/dev/null/run"), 2, "run_dir: /dev/null/run cannot be written"),
        (("--algorithm.alpha", "-1"), 2, "algorithm.alpha: expected at least 0"),
        (("--resume", "/absent"), 2, "--resume /absent: no run there"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], ranks: int, message: str
) -> None:
    assert check(tmp_path, *flags, ranks=ranks) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"rlsc: error: {message}") and captured.err.count("\n") == 1


def test_every_failed_check_is_told_beside_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ("--data.path", "absent.jsonl", "--model.path", "/absent", "--run-dir", "/dev/null/run")
    assert check(tmp_path, *wrong, ranks=3) == 2
    captured = capsys.readouterr()
    told = [line.removeprefix("rlsc: error: ").partition(":")[0] for line in captured.err.splitlines()]
    assert told == ["parallel.tp", "model.path", "data.path", "run_dir"]
    facts = dict(line.split("\t") for line in captured.out.splitlines())
    assert facts["steps"] and facts["data"] == "absent.jsonl" and "layout" not in facts


def test_a_dry_run_tells_downloads_and_every_failed_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    flags = ["--run-dir", str(tmp_path / "run"), "--model.path", "Qwen/Qwen2.5-Math-7B"]
    flags += ["--data.path", "absent.jsonl", "--evaluation.path", "embedded:absent"]
    assert run_train(["--dry-run", "--gpus", "8", "--gpu-memory-gib", "80", *flags]) == 2
    captured = capsys.readouterr()
    assert "this configuration: parallel.tp 1" in captured.out
    # 7.62 B parameters in bfloat16
    assert "download: model Qwen/Qwen2.5-Math-7B: about 15.2 GB" in captured.out
    assert "\ncache: /" in captured.out
    assert "no network: first on a login node: rlsc prepare --model Qwen/Qwen2.5-Math-7B" in captured.out
    assert captured.err.startswith("rlsc train: data.path: no file absent.jsonl")
    assert "rlsc train: evaluation.path: expected one of embedded:test, embedded:train" in captured.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("{broken\n", "the first line is not JSON"),
        ('{"text": 1}\n', "has neither `problem` nor `question`"),
    ],
)
def test_bad_questions_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(text)
    assert check(tmp_path, "--data.path", str(file)) == 2
    assert f"data.path: {file}" in (error := capsys.readouterr().err) and message in error


@pytest.mark.parametrize(
    ("pattern", "message"), [("*.safetensors", "has no *.safetensors"), ("tokenizer*", "has no tokenizer")]
)
def test_an_incomplete_model_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pattern: str, message: str
) -> None:
    model = Path(shutil.copytree(resolve_model_folder("embedded:tiny_qwen2"), tmp_path / "model"))
    for file in model.glob(pattern):
        file.unlink()
    assert check(tmp_path, "--model.path", str(model)) == 2
    assert message in capsys.readouterr().err


def test_an_old_run_is_resumed_and_another_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    checkpoint = run_dir / "checkpoints" / "step_000003"
    checkpoint.mkdir(parents=True)
    (run_dir / "checkpoints" / "latest").write_text("step_000003\n")
    flags = dict(zip(FLAGS[::2], FLAGS[1::2], strict=True))
    (tmp_path / "flags.yaml").write_text(
        json.dumps({"run_dir": str(run_dir), **nested(flags), "parallel": {"tp": 2}})
    )
    (run_dir / "config.yaml").write_text(dump_config(load_config(tmp_path / "flags.yaml")))
    assert check(tmp_path) == 0
    assert f"start\tresumes {checkpoint}" in capsys.readouterr().out
    assert check(tmp_path, "--rollout.num-samples", "3") == 2
    assert "holds a run with another configuration (rollout.num_samples: 16 -> 3)" in capsys.readouterr().err


def nested(flags: dict[str, str]) -> dict[str, dict[str, str]]:
    tree: dict[str, dict[str, str]] = {}
    for name, value in flags.items():
        section, field = name.removeprefix("--").split(".")
        tree.setdefault(section, {})[field] = value
    return tree


def test_memory_is_what_the_plan_counts(tmp_path: Path) -> None:
    """The same sums as `rlsc train --dry-run` prints for the layout, with the optimizer's options; too little
    is told, not refused."""
    shape = MODELS["qwen2.5-0.5b"]
    flags = [
        "--model.path",
        "Qwen/Qwen2.5-0.5B",
        "--data.path",
        "embedded:train",
        "--parallel.tp",
        "2",
        "--run-dir",
        str(tmp_path / "run"),
    ]

    def memory(*more: str, gib: float = 141) -> tuple[str, str, list[str]]:
        facts = check_launch(parse_config([*flags, *more]), None, 1, 8, gib).facts
        training, rollout = (value for name, value in facts if name == "memory")
        return training, rollout, [value for name, value in facts if name == "warning"]

    layout = Layout(2, 4, recompute="full", tokens_per_micro_batch=8192)
    sums = [sum(train_bytes(shape, layout).values()), sum(rollout_bytes(shape, layout, 0).values())]
    small = ("--training.recompute", "full", "--training.tokens-per-micro-batch", "8192")
    training, rollout, warnings = memory(*small)
    assert training.startswith(
        f"training {sums[0] / 2**30:.1f} GiB per GPU: weights 0.46, gradients 0.92, optimizer 0.69,"
    )
    assert (
        rollout.startswith(f"rollout {sums[1] / 2**30:.1f} GiB per GPU:")
        and rollout.endswith("(and the KV cache)")
        and not warnings
    )
    assert "KV cache 10.00" in memory(*small, "--rollout.kv-cache-gib", "10")[1]
    assert "optimizer 0.35" in memory(*small, "--optimizer.cpu-offload", "0.5")[0]
    assert "optimizer 0.46" in memory(*small, "--optimizer.precision-aware", "True")[0]
    assert "of 3 are usable (GPU_MEMORY_GIB)" in memory(*small, gib=3)[2][0]


@pytest.mark.parametrize(
    "name", ["qwen2.5_math_7b_1x8.yaml", "qwen2.5_math_72b_4x8.yaml", "qwen2.5_math_1.5b_1gpu.yaml"]
)
def test_recipes_are_the_papers(name: str) -> None:
    config = load_config(CONFIGS / name)
    rollout, training = config.rollout, config.training
    assert (rollout.num_samples, rollout.temperature, rollout.max_new_tokens) == (16, 0.5, 3072)
    assert (config.optimizer.lr, training.num_steps, config.algorithm.alpha) == (1e-5, 10, 0.1)


@pytest.mark.parametrize(
    ("name", "gpus", "gib"),
    [
        ("qwen2.5_math_7b_1x8.yaml", "8", "80"),
        ("qwen2.5_math_72b_4x8.yaml", "32", "141"),
        ("qwen2.5_math_1.5b_1gpu.yaml", "1", "80"),
    ],
)
def test_recipes_fit_the_gpus_that_they_name(
    name: str, gpus: str, gib: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry_run_config(load_config(CONFIGS / name), gpus, gib) == 0, capsys.readouterr().out


def test_checks_need_no_torch(tmp_path: Path) -> None:
    program = f"""
import sys
from rlsc_mcore.planning.launch_checks import check_launch, main
from rlsc_mcore.commands.plan import dry_run_config
from rlsc_mcore.commands.train import run_train
from rlsc_mcore.planning.memory import Layout, rollout_bytes, train_bytes
from rlsc_mcore.planning.known_models import MODELS
code = main(["--nodes", "1", "--ranks-per-node", "1", "--", *{FLAGS!r}, "--run-dir", {str(tmp_path)!r}])
sys.exit(code or 10 * bool({{"torch", "vllm", "megatron", "transformers"}} & sys.modules.keys()))
"""
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=120).returncode == 0
