"""`rlsc chat`: ask the model of a run before and after training, and show both answers side by side.

transformers generates from the model folder that the run started from and from the run's export. Every
question stands alone, as in training.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlsc_mcore.config import ConfigError
from rlsc_mcore.config_file import load_config
from rlsc_mcore.run.folder import EXPORT_FOLDER, config_file
from rlsc_mcore.run.printable import printable


@dataclass(frozen=True)
class Settings:
    """How the answers are generated; `temperature` 0 is greedy."""

    template: str
    temperature: float
    max_new_tokens: int
    seed: int


def run_chat(arguments: Sequence[str]) -> int:
    """Run `rlsc chat`: answer questions until the input ends; return the exit code."""
    parser = argparse.ArgumentParser(
        "rlsc chat",
        description="Ask the model of a run before and after training; an empty line or Ctrl-D ends.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run with an export")
    parser.add_argument("--question", action="append", help="answer this question and stop; may be repeated")
    parser.add_argument("--temperature", type=float, help="0: greedy (default: rollout.temperature)")
    parser.add_argument(
        "--max-new-tokens", type=int, help="longest answer in tokens (default: rollout.max_new_tokens)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the first answer")
    known = parser.parse_args(arguments)
    config = load_config(config_file(known.run))
    settings = Settings(
        config.data.template,
        config.rollout.temperature if known.temperature is None else known.temperature,
        config.rollout.max_new_tokens if known.max_new_tokens is None else known.max_new_tokens,
        known.seed,
    )
    if not 0 <= settings.temperature < float("inf"):
        raise ConfigError(f"--temperature: expected at least 0, got {settings.temperature:g}")
    if settings.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens: expected at least 1, got {settings.max_new_tokens}")
    if settings.seed < 0:
        raise ConfigError(f"--seed: expected at least 0, got {settings.seed}")
    after = known.run / EXPORT_FOLDER
    if not (after / "config.json").is_file():
        raise ConfigError(f"{known.run}: has no export; write it first: rlsc export {known.run}")
    console = Console(highlight=False)
    models = _load_models(config.model.path, after, config)
    for number, question in enumerate(_questions(known.question)):
        answers = [
            model.answer(question, settings, settings.seed + number)  # the same seed for both models
            for model in models
        ]
        console.print(side_by_side(question, answers))
    return 0


class ChatModel:
    """A model folder, loaded for generation."""

    def __init__(self, folder: Path, config: Any) -> None:
        """Raises `ConfigError` if the folder holds no model."""
        import torch
        from transformers import AutoModelForCausalLM

        from rlsc_mcore.model.hf_checkpoint import load_tokenizer
        from rlsc_mcore.parallel.backend import device_type
        from rlsc_mcore.training.inputs import answer_end_ids

        self.tokenizer = load_tokenizer(folder, config.model)
        self._device = device_type()
        dtype = getattr(torch, config.model.dtype)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        self._model.to(self._device).eval()
        self._end_ids = answer_end_ids(folder, self.tokenizer, config.data.template)

    def answer(self, question: str, settings: Settings, seed: int) -> str:
        """Return one answer to `question`, rendered by the template of the run.

        Raises `ConfigError` if the prompt fills the model's context.
        """
        import torch

        from rlsc_mcore.data.templates import render_prompt

        prompt = render_prompt(settings.template, question, self.tokenizer)
        room = self._model.config.max_position_embeddings - len(prompt)
        if room < 1:
            raise ConfigError(f"the question has {len(prompt)} tokens and fills the context: shorten it")
        ids = torch.tensor([prompt], device=self._device)
        sampling: dict[str, Any] = {"do_sample": False}
        if settings.temperature > 0:
            # top_k and top_p of the model folder would cut the distribution that the run sampled from.
            sampling = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
        torch.manual_seed(seed)
        with torch.no_grad():
            output = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=min(settings.max_new_tokens, room),
                eos_token_id=self._end_ids or None,
                pad_token_id=self._end_ids[0] if self._end_ids else 0,
                **sampling,
            )
        return str(self.tokenizer.decode(output[0, len(prompt) :].tolist(), skip_special_tokens=True))


def side_by_side(question: str, answers: Sequence[str]) -> Table:
    """Return a table with the answers before and after training in two columns."""
    table = Table(title=Text(printable(question)), title_justify="left", show_lines=True, expand=True)
    for name in ("before", "after"):
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*(Text("\n".join(map(printable, answer.splitlines()))) for answer in answers))
    return table


def _load_models(before: str, after: Path, config: Any) -> list[ChatModel]:
    from rlsc_mcore.model.hf_checkpoint import resolve_model_folder
    from rlsc_mcore.observability.console import Reporter
    from rlsc_mcore.parallel.packages import hide_broken_torchvision

    hide_broken_torchvision()
    from transformers.utils import logging

    logging.disable_progress_bar()
    report = Reporter(enabled=True)
    models = []
    for name, folder in (("before", resolve_model_folder(before)), ("after", after)):
        with report.bar(f"loading the model {name} training"):
            models.append(ChatModel(folder, config))
    return models


def _questions(given: Sequence[str] | None) -> Iterator[str]:
    """Yield the questions of the command line, else the lines of the standard input up to an empty one."""
    if given is not None:
        yield from given
        return
    while True:
        if sys.stdin.isatty():
            print("question> ", end="", flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line
