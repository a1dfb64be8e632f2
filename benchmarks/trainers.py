"""Build a trainer for a model's shape with random weights and without an engine."""

import json
from collections.abc import Sequence
from pathlib import Path

from rlsc_mcore.config_file import parse_config
from rlsc_mcore.model.hf_checkpoint import resolve_model_folder
from rlsc_mcore.model.shape import Architecture
from rlsc_mcore.parallel.backend import Backend
from rlsc_mcore.parallel.groups import Groups
from rlsc_mcore.planning.known_models import find_model
from rlsc_mcore.training.step import Trainer


def find_shape(name: str) -> Architecture:
    """Return the shape of a public model's name, of a model folder, or of `embedded:...`."""
    return find_model(str(resolve_model_folder(name)) if name.startswith("embedded:") else name)


def write_config(shape: Architecture, folder: Path, layers: int | None = None) -> Path:
    """Write a config.json of `shape` into a new folder and return the folder; with `layers`, the model has
    only its first `layers` layers."""
    assert shape.rope_scaling_factor is None, (
        f"{shape.name} with scaled rotary embeddings is not written here"
    )
    config = {
        "architectures": [shape.name], "model_type": shape.name.removesuffix("ForCausalLM").lower(),
        "num_hidden_layers": layers or shape.num_layers, "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size, "num_attention_heads": shape.num_heads, "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim, "vocab_size": shape.vocab_size, "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": shape.norm_epsilon, "rope_theta": shape.rotary_base, "tie_word_embeddings": shape.tied_embeddings,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def make_trainer(folder: Path, flags: Sequence[str], backend: Backend, groups: Groups) -> Trainer:
    """Build the trainer for a folder's config.json with Megatron's random weights. Later flags override
    earlier ones. Collective over the world."""
    config = parse_config(
        ["--run-dir", "unused", "--model.path", str(folder), "--data.path", "embedded:train", *flags]
    )
    return Trainer(config, folder, backend, groups, load=False)
