"""Model folders of public shapes: a config.json, no weights."""

import json
from dataclasses import replace
from pathlib import Path

from rlsc_mcore.model.shape import Architecture
from rlsc_mcore.planning.known_models import MODELS


def model_folder(folder: Path, name: str, layers: int | None = None) -> tuple[Path, Architecture]:
    """Write the config.json of a public model, cut to `layers`; return its folder and shape."""
    shape = MODELS[name] if layers is None else replace(MODELS[name], num_layers=layers)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": [shape.name],
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_theta": shape.rotary_base,
        "tie_word_embeddings": shape.tied_embeddings,
        "vocab_size": shape.vocab_size,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder, shape
