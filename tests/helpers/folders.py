"""Model folders that a whole run can use: a small random model with the embedded model's tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

from rlsc_mcore.model.hf_checkpoint import resolve_model_folder
from tests.helpers.tiny import make_model_folder

EMBEDDED = "embedded:tiny_qwen2"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def make_runnable_folder(folder: Path, **options: Any) -> Path:
    """Write a random model with the embedded tokenizer (512 ids, unless `vocab_size` has more) to
    `folder`."""
    make_model_folder(folder, **{"vocab_size": 512, **options})
    add_tokenizer(folder)
    return folder


def add_tokenizer(folder: Path) -> None:
    """Copy the embedded model's tokenizer."""
    for name in TOKENIZER_FILES:
        shutil.copyfile(resolve_model_folder(EMBEDDED) / name, folder / name)


def copy_embedded(folder: Path) -> Path:
    """Copy the embedded model, to be damaged by a test."""
    return Path(shutil.copytree(resolve_model_folder(EMBEDDED), folder))


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of config.json; None removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(
        json.dumps({name: value for name, value in config.items() if value is not None}), encoding="utf-8"
    )
