"""Remake the embedded model, its tokenizer and its questions: `python -m rlsc_mcore.assets.make --out
DIR`."""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from random import Random

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen2ForCausalLM

from rlsc_mcore.assets.make.authors import AuthorMix, write_page
from rlsc_mcore.assets.make.measure import measure
from rlsc_mcore.assets.make.pretrain import LossPoint, PretrainConfig, pretrain
from rlsc_mcore.assets.make.splits import SPLIT_SEED, SPLIT_SIZES, draw_splits, write_questions
from rlsc_mcore.assets.make.tokenizer import build_tokenizer

TOKENIZER_SEED = 1
MEASURING_SEED = 11
SAVE_EVERY_POINTS = 10  # so that a run that was broken off leaves a model to look at
RECORDED_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")


def save_model(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model and tokenizer as a Hugging Face folder."""
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)


def recorded_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that make the model."""
    return {"python": platform.python_version()} | {name: version(name) for name in RECORDED_LIBRARIES}


def _file_hashes(out: Path) -> dict[str, str]:
    files = sorted([*out.glob("tiny_qwen2/*"), *out.glob("questions/*.jsonl")])
    return {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def make(out: Path, config: PretrainConfig, mix: AuthorMix) -> None:
    """Write `questions/`, `tiny_qwen2/` and `record.json` under `out`, on one thread."""
    torch.set_num_threads(1)
    (out / "questions").mkdir(parents=True, exist_ok=True)
    splits = draw_splits()
    for name, questions in splits.items():
        write_questions(out / "questions" / f"{name}.jsonl", questions)
    tokenizer = build_tokenizer(Random(TOKENIZER_SEED), mix)
    folder = out / "tiny_qwen2"

    def report(point: LossPoint, model: Qwen2ForCausalLM) -> None:
        print(json.dumps(asdict(point)), flush=True)
        if point.step % (SAVE_EVERY_POINTS * config.log_every_steps) == 0:
            save_model(model, tokenizer, folder)

    model, points = pretrain(
        config, tokenizer, lambda random, question: write_page(random, question, mix), report
    )
    save_model(model, tokenizer, folder)
    record = {
        "seeds": {
            "tokenizer": TOKENIZER_SEED,
            "splits": SPLIT_SEED,
            "pretraining": config.seed,
            "measuring": MEASURING_SEED,
        },
        "split_sizes": SPLIT_SIZES,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": points[-1].tokens,
        "pretraining": asdict(config),
        "authors": asdict(mix),
        "versions": recorded_versions(),
        "validation": measure(model, tokenizer, splits["validation"], MEASURING_SEED),
        "losses": [asdict(point) for point in points],
        "sha256": _file_hashes(out),
    }
    (out / "record.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the command line and remake everything."""
    parser = argparse.ArgumentParser(prog="python -m rlsc_mcore.assets.make", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write, e.g. rlsc_mcore/assets")
    parser.add_argument(
        "--tokens",
        type=int,
        default=PretrainConfig.total_tokens,
        help="pretraining tokens; fewer make a quick trial of the pipeline, not the embedded model",
    )
    arguments = parser.parse_args()
    make(arguments.out, PretrainConfig(total_tokens=arguments.tokens), AuthorMix())


if __name__ == "__main__":
    main()
