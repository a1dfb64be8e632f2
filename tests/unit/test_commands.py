"""Bad input through `rlsc train`: one line that names file, line or field, before anything is built or
written."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from rlsc_mcore.commands import train as commands
from rlsc_mcore.config import CollectiveRunError, RunError
from rlsc_mcore.config_file import dump_config, parse_config
from rlsc_mcore.model.hf_checkpoint import resolve_model_folder
from tests.helpers.folders import EMBEDDED, copy_embedded, edit_config, make_runnable_folder

FLAGS = [
    "--model.dtype",
    "float32",
    "--data.questions-per-step",
    "2",
    "--rollout.max-new-tokens",
    "8",
    "--training.num-steps",
    "1",
]


@pytest.fixture(autouse=True)
def nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A trainer that is built after all fails the test: input is checked first. Leaves no process group
    behind."""

    def build(*args: object, **kwargs: object) -> None:
        pytest.fail("bad input reached the trainer")

    monkeypatch.setattr("rlsc_mcore.training.session.Trainer", build)
    environment = {
        name: os.environ.get(name)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    had_groups = dist.is_initialized()
    yield
    if dist.is_initialized() and not had_groups:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)


GOOD = '{"problem": "1+1?", "answer": 2}\n'


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "no such file: {file}"),
        ("", "{file} holds no questions"),
        ("\n\n", "{file} holds no questions"),
        (GOOD + GOOD + '{"problem": "1', "{file}, line 3: malformed JSON"),
        (GOOD + "[1]\n", "{file}, line 2: expected a JSON object, got list"),
        (GOOD + '{"answer": 3}\n', "{file}, line 2: a question without text"),
        (GOOD + '{"problem": " "}\n', "{file}, line 2: `problem`: expected the question's text"),
        (
            GOOD + json.dumps({"problem": "one more " * 1000}) + "\n",
            "{file}: question 1 (counted from 0): its prompt has",
        ),
    ],
    ids=["missing", "empty", "blank", "malformed", "list", "no text", "blank text", "too long"],
)
def test_question_files(
    tmp_path: Path, run_cli: Callable[..., tuple[int, list[str]]], content: str | None, named: str
) -> None:
    file, run_dir = tmp_path / "questions.jsonl", tmp_path / "run"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    code, lines = run_cli(
        "train", "--run-dir", run_dir, "--model.path", EMBEDDED, "--data.path", file, *FLAGS
    )
    assert (code, len(lines)) == (2, 1), lines
    assert lines[0].startswith("rlsc train: ") and named.format(file=file) in lines[0]
    assert not run_dir.exists()


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (without("config.json"), "has no config.json"),
        (without("model.safetensors"), "has no *.safetensors weights"),
        (without("tokenizer.json"), "has no tokenizer"),
        (shutil.rmtree, "model.path: no folder"),
        (
            lambda folder: edit_config(folder, architectures=["MambaForCausalLM"]),
            "architectures: MambaForCausalLM is not supported",
        ),
        (
            lambda folder: edit_config(folder, num_attention_heads=8, num_key_value_heads=4),
            "head_dim: vLLM on a CPU runs",
        ),
        (
            lambda folder: edit_config(folder, vocab_size=480),
            "ids up to 495, but config.json says vocab_size = 480",
        ),
        (
            lambda folder: edit_config(folder, vocab_size=576),
            "model.embed_tokens.weight has shape (512, 128), config.json says (576, 128)",
        ),
        (
            lambda folder: edit_config(folder, num_hidden_layers=5, layer_types=None),
            "has no tensor 'model.layers.4.",
        ),
    ],
    ids=[
        "config",
        "weights",
        "tokenizer",
        "folder",
        "architecture",
        "head_dim",
        "vocabulary",
        "rows",
        "layers",
    ],
)
def test_model_folders(
    tmp_path: Path, run_cli: Callable[..., tuple[int, list[str]]], damage: Callable[[Path], None], named: str
) -> None:
    folder, run_dir = copy_embedded(tmp_path / "model"), tmp_path / "run"
    damage(folder)
    code, lines = run_cli(
        "train", "--run-dir", run_dir, "--model.path", folder, "--data.path", "embedded:train", *FLAGS
    )
    assert (code, len(lines)) == (2, 1), lines
    assert str(folder) in lines[0] and named in lines[0]
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--rollout.num-samples", "0"], "rollout.num_samples: expected at least 1, got 0"),
        (["--algorithm.alpha", "-0.1"], "algorithm.alpha: expected at least 0, got -0.1"),
        (
            ["--rollout.temperature", "0"],
            "rollout.temperature: expected at least 0.01 (the engine samples nothing colder), got 0.0",
        ),
        (
            ["--rollout.temperature", "-1"],
            "rollout.temperature: expected at least 0.01 (the engine samples nothing colder), got -1.0",
        ),
        (["--parallel.tp", "3"], "parallel.tp: 3 does not divide num_attention_heads = 4"),
        (["--parallel.tp", "2"], "parallel.tp: 2 does not divide the 1 processes that were started"),
        (
            ["--rollout.max-model-len", "5000"],
            "rollout.max_model_len: 5000 is more than the model's context of 256 tokens",
        ),
        (["--model.layers", "transformer_engine"], "model.layers: transformer_engine was asked for"),
        (["--evaluation.path", "/no/such/file.jsonl"], "evaluation.path: no such file: /no/such/file.jsonl"),
        (["--optimzer.lr", "1"], "--optimzer.lr"),
        (["--optimizer.lr", "fast"], "--optimizer.lr"),
        (["--resume"], "--resume: expected a value after it"),
    ],
)
def test_options(
    tmp_path: Path, run_cli: Callable[..., tuple[int, list[str]]], flags: list[str], named: str
) -> None:
    run_dir = tmp_path / "run"
    code, lines = run_cli(
        "train",
        "--run-dir",
        run_dir,
        "--model.path",
        EMBEDDED,
        "--data.path",
        "embedded:train",
        *FLAGS,
        *flags,
    )
    assert (code, len(lines)) == (2, 1), lines
    assert named in lines[0]
    assert not run_dir.exists()


def test_an_answer_is_needed_only_where_it_is_graded(
    tmp_path: Path, run_cli: Callable[..., tuple[int, list[str]]]
) -> None:
    file = tmp_path / "ungraded.jsonl"
    file.write_text('{"problem": "1+1?", "answer": 2}\n{"problem": "2+2?"}\n', encoding="utf-8")
    code, lines = run_cli(
        "train",
        "--run-dir",
        tmp_path / "run",
        "--model.path",
        EMBEDDED,
        "--data.path",
        file,
        "--evaluation.path",
        file,
        *FLAGS,
    )
    assert (code, len(lines)) == (2, 1), lines
    assert f"evaluation.path: {file}: question 1 has no answer to grade against" in lines[0]


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_that_is_right_reaches_the_trainer(tmp_path: Path, tied: bool) -> None:
    """The other side of every refusal above."""
    folder = make_runnable_folder(tmp_path / "model", tied=tied)
    with pytest.raises(pytest.fail.Exception, match="bad input reached the trainer"):
        commands.run_train(
            [
                "--run-dir",
                str(tmp_path / "run"),
                "--model.path",
                str(folder),
                "--data.path",
                "embedded:train",
                *FLAGS,
            ]
        )


def existing_run(run_dir: Path, *flags: str) -> Path:
    run_dir.mkdir()
    config = parse_config(
        ["--run-dir", str(run_dir), "--model.path", EMBEDDED, "--data.path", "embedded:train", *FLAGS, *flags]
    )
    (run_dir / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    (run_dir / "metrics.jsonl").write_text('{"step": 0}\n', encoding="utf-8")
    return run_dir


def test_a_folder_of_another_run_is_left_alone(
    tmp_path: Path, run_cli: Callable[..., tuple[int, list[str]]]
) -> None:
    run_dir = existing_run(tmp_path / "run", "--optimizer.lr", "1e-3")
    before = {file.name: file.read_bytes() for file in run_dir.iterdir()}
    code, lines = run_cli(
        "train", "--run-dir", run_dir, "--model.path", EMBEDDED, "--data.path", "embedded:train", *FLAGS
    )
    assert (code, len(lines)) == (2, 1), lines
    assert (
        f"run_dir: {run_dir} holds a run with another configuration (optimizer.lr: 0.001 -> 1e-05)"
        in lines[0]
    )
    assert {file.name: file.read_bytes() for file in run_dir.iterdir()} == before


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--optimizer.lr", "2"], "cannot change optimizer.lr: 1e-05 -> 2.0"),
        (["--rollout.num-samples", "3"], "cannot change rollout.num_samples: 16 -> 3"),
        (["--training.seed", "3"], "cannot change training.seed"),
        (["--evaluation.num-samples", "9"], "cannot change evaluation.num_samples"),
        (["--config", "other.yaml"], "--resume: a run brings its own configuration"),
        ([], "no checkpoint there"),
        (["--training.num-steps", "9"], "no checkpoint there"),
    ],
)
def test_resuming_with_what_makes_another_run(
    tmp_path: Path, run_cli: Callable[..., tuple[int, list[str]]], flags: list[str], named: str
) -> None:
    run_dir = existing_run(tmp_path / "run")
    before = {file.name: file.read_bytes() for file in run_dir.iterdir()}
    code, lines = run_cli("train", "--resume", run_dir, *flags)
    assert (code, len(lines)) == (2, 1), lines
    assert named in lines[0]
    assert {file.name: file.read_bytes() for file in run_dir.iterdir()} == before


def test_resuming_nothing(tmp_path: Path, run_cli: Callable[..., tuple[int, list[str]]]) -> None:
    code, lines = run_cli("train", "--resume", tmp_path / "absent")
    assert (code, len(lines)) == (2, 1) and "no run there; expected" in lines[0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["fly"], "unknown command 'fly'; expected quickstart, train"),
        (["export", "/no/such/run"], "/no/such/run: no run there"),
        (["eval", "--model", "/no/such/model"], "model.path: no folder /no/such/model"),
        (["eval", "--model", EMBEDDED, "--data", "/no/such.jsonl"], "no such file: /no/such.jsonl"),
        (["train", "--config", "/no/such.yaml"], "--config /no/such.yaml: no such file"),
    ],
)
def test_other_commands(
    run_cli: Callable[..., tuple[int, list[str]]], arguments: list[str], named: str
) -> None:
    code, lines = run_cli(*arguments)
    assert (code, len(lines)) == (2, 1), lines
    assert named in lines[0]


def test_export_does_not_replace_a_folder_that_is_no_model(
    tmp_path: Path, run_cli: Callable[..., tuple[int, list[str]]]
) -> None:
    run_dir = existing_run(tmp_path / "run")
    output = tmp_path / "precious"
    output.mkdir()
    (output / "letter.txt").write_text("dear", encoding="utf-8")
    code, lines = run_cli("export", run_dir, "--output", output)
    assert (code, len(lines)) == (
        2,
        1,
    ) and f"--output {output}: exists and was not made by this program" in lines[0]
    assert (output / "letter.txt").read_text(encoding="utf-8") == "dear"


@pytest.mark.parametrize("command", ["export", "eval"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "best",
            "--checkpoint best: no such checkpoint in {run}/checkpoints (training.keep_best names none); "
            "there is latest, 2, 4",
        ),
        ("3", "--checkpoint 3: no such checkpoint in {run}/checkpoints; there is latest, 2, 4"),
        ("../4", "--checkpoint ../4: no such checkpoint in {run}/checkpoints; there is latest, 2, 4"),
    ],
)
def test_a_checkpoint_that_is_not_there(
    tmp_path: Path, run_cli: Callable[..., tuple[int, list[str]]], command: str, name: str, said: str
) -> None:
    run_dir = existing_run(tmp_path / "run")
    for step in (2, 4):
        (run_dir / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    (run_dir / "checkpoints" / "latest").write_text("step_000004\n", encoding="utf-8")
    code, lines = run_cli(command, *(["--model"] if command == "eval" else []), run_dir, "--checkpoint", name)
    assert (code, len(lines)) == (2, 1) and lines[0].endswith(said.format(run=run_dir)), lines


def test_a_model_folder_has_no_checkpoints(run_cli: Callable[..., tuple[int, list[str]]]) -> None:
    code, lines = run_cli("eval", "--model", EMBEDDED, "--checkpoint", "best")
    assert (code, len(lines)) == (2, 1) and lines[0].endswith(
        f"--checkpoint best: --model {EMBEDDED} is no run"
    )


@pytest.mark.parametrize(
    ("error", "rank", "printed"),
    [
        (RunError("alone"), "3", ["rlsc train: alone"]),
        (CollectiveRunError("together"), "0", ["rlsc train: together"]),
        (CollectiveRunError("together"), "3", []),
    ],
)
def test_what_all_ranks_raise_is_printed_once(
    run_cli: Callable[..., tuple[int, list[str]]],
    monkeypatch: pytest.MonkeyPatch,
    error: RunError,
    rank: str,
    printed: list[str],
) -> None:
    def fail(arguments: object) -> int:
        raise error

    monkeypatch.setattr("rlsc_mcore.commands.train.run_train", fail)
    monkeypatch.setenv("RANK", rank)
    assert run_cli("train") == (1, printed)


def test_usage_and_version(
    run_cli: Callable[..., tuple[int, list[str]]], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_cli()[0] == 2
    assert run_cli("--help")[0] == 0
    assert run_cli("--version")[0] == 0
    assert run_cli("train", "--help")[0] == 0


def test_the_embedded_model_is_a_folder() -> None:
    assert (resolve_model_folder(EMBEDDED) / "config.json").is_file()
