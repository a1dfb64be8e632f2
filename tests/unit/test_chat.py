"""`rlsc chat`: answers of both models side by side, equal to decoding by hand."""

import io
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlsc_mcore.commands.chat import run_chat
from rlsc_mcore.config import ConfigError, ModelConfig
from rlsc_mcore.config_file import dump_config, parse_config
from rlsc_mcore.data.templates import render_prompt
from rlsc_mcore.model.hf_checkpoint import load_tokenizer, resolve_model_folder
from rlsc_mcore.training.inputs import answer_end_ids
from tests.helpers.folders import EMBEDDED, copy_embedded

QUESTION = "What is 3 + 4?"
LONGEST = 12


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose export has other weights than the embedded model."""
    flags = ["--run-dir", str(tmp_path), "--model.path", "embedded:tiny_qwen2", "--model.dtype", "float32"]
    config = parse_config([*flags, "--data.path", "embedded:train"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    export = copy_embedded(tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.model.layers[-1].parameters():
            parameter.mul_(-1.0)
    model.save_pretrained(export)
    return tmp_path


def greedy(folder: Path) -> str:
    """Decode with the largest logit, without a cache."""
    tokenizer = load_tokenizer(folder, ModelConfig(path=str(folder)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    template = parse_config(["--run-dir", "x", "--model.path", "x", "--data.path", "x"]).data.template
    prompt = render_prompt(template, QUESTION, tokenizer)
    ids, ends = list(prompt), answer_end_ids(folder, tokenizer, template)
    for _ in range(LONGEST):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return str(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))


def shown(text: str) -> list[str]:
    """Return the two cells of the printed table, line ends removed."""
    rows = [line.strip("│").split("│") for line in text.splitlines() if line.startswith("│")]
    return ["".join(row[column].strip() for row in rows) for column in (0, 1)]


def test_both_answers_are_those_of_their_weights(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    options = ["--temperature", "0", "--max-new-tokens", str(LONGEST)]
    assert run_chat([str(run), *options, "--question", QUESTION]) == 0
    expected = [greedy(resolve_model_folder(EMBEDDED)), greedy(run / "export")]
    assert expected[0] != expected[1]
    assert shown(capsys.readouterr().out) == ["".join(text.split("\n")).strip() for text in expected]


def test_questions_come_from_the_standard_input(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 1 + 1?\nWhat is 2 + 2?\n\nnot asked\n"))
    assert run_chat([str(run), "--max-new-tokens", "2"]) == 0
    output = capsys.readouterr().out
    assert "What is 1 + 1?" in output and "What is 2 + 2?" in output and "not asked" not in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature", "-1"), "--temperature: expected at least 0, got -1"),
        (("--max-new-tokens", "0"), "--max-new-tokens: expected at least 1, got 0"),
        (("--seed", "-1"), "--seed: expected at least 0, got -1"),
    ],
)
def test_bad_options_are_named(run: Path, options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_chat([str(run), *options])


def test_a_run_without_an_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run there"):
        run_chat([str(tmp_path)])
    config = parse_config(["--run-dir", "x", "--model.path", "x", "--data.path", "x"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    with pytest.raises(ConfigError, match="rlsc export"):
        run_chat([str(tmp_path)])
