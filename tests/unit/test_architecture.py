"""config.json: what is read, and what is refused by the file's and the field's name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from rlsc_mcore.config import ConfigError, ModelConfig
from rlsc_mcore.model.architecture import CPU_HEAD_DIMS, check_head_dim, uses_transformer_engine
from rlsc_mcore.model.families import FAMILIES
from rlsc_mcore.model.shape import check_parallel, read_architecture

QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "vocab_size": 300,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class _Cpu:
    is_cuda = False


class _Cuda:
    is_cuda = True


def write(folder: Path, **changes: Any) -> Path:
    config = {name: value for name, value in (QWEN2 | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_a_qwen2_as_transformers_4_and_5_write_it(tmp_path: Path) -> None:
    old = read_architecture(write(tmp_path))
    assert dataclasses.asdict(old) == {
        "name": "Qwen2ForCausalLM",
        "num_layers": 2,
        "hidden_size": 128,
        "ffn_hidden_size": 96,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "vocab_size": 300,
        "max_position_embeddings": 256,
        "norm_epsilon": 1e-5,
        "rotary_base": 1e6,
        "rope_scaling_factor": None,
        "tied_embeddings": True,
        "qkv_bias": True,
        "qk_norm": False,
    }
    new = read_architecture(
        write(tmp_path, rope_theta=..., rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    )
    assert new == old


def test_defaults_of_absent_fields(tmp_path: Path) -> None:
    a = read_architecture(
        write(tmp_path, rope_theta=..., num_key_value_heads=..., tie_word_embeddings=..., hidden_act=...)
    )
    assert (a.rotary_base, a.num_kv_heads, a.tied_embeddings) == (10000.0, 4, False)


def test_qwen3_and_llama3(tmp_path: Path) -> None:
    qwen3 = read_architecture(write(tmp_path, architectures=["Qwen3ForCausalLM"], head_dim=64))
    assert (qwen3.head_dim, qwen3.qk_norm, qwen3.qkv_bias) == (64, True, False)
    llama = read_architecture(
        write(tmp_path, architectures=["LlamaForCausalLM"], rope_theta=..., rope_parameters=LLAMA3_ROPE)
    )
    assert (llama.rope_scaling_factor, llama.rotary_base, llama.qkv_bias, llama.qk_norm) == (
        32.0,
        5e5,
        False,
        False,
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "architectures: GPT2LMHeadModel is not supported; expected one of Qwen2",
        ),
        ({"architectures": []}, "architectures: None is not supported"),
        ({"architectures": ...}, "architectures: None is not supported"),
        ({"architectures": "Qwen2ForCausalLM"}, "architectures: None is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported"),
        ({"architectures": ["LlamaForCausalLM"], "attention_bias": True}, "attention_bias"),
        ({"architectures": ["LlamaForCausalLM"], "mlp_bias": True}, "mlp_bias"),
        ({"architectures": ["Qwen3ForCausalLM"], "attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rotary scaling 'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rotary scaling 'linear'"),
        ({"rope_parameters": LLAMA3_ROPE | {"low_freq_factor": 2.0}}, "rotary scaling 'llama3'"),
        (
            {"rope_parameters": LLAMA3_ROPE | {"original_max_position_embeddings": 4096}},
            "rotary scaling 'llama3'",
        ),
        ({"rope_parameters": {"rope_type": "llama3"}}, "missing field 'factor'"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor 0.5",
        ),
        ({"vocab_size": ...}, "missing field 'vocab_size'"),
        ({"hidden_size": "wide"}, "a field has a wrong value"),
        ({"num_attention_heads": 0}, "a field has a wrong value"),
        ({"rope_scaling": [1]}, "a field has a wrong value"),
        ({"num_hidden_layers": None}, "a field has a wrong value"),
    ],
)
def test_what_is_not_built_here_is_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_architecture(write(tmp_path, **changes))
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert named in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [("{", "not JSON"), ("", "not JSON"), ("[]", "expected a JSON object, got list"), ("\x00", "not JSON")],
)
def test_a_file_that_is_no_object(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=named):
        read_architecture(tmp_path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        read_architecture(tmp_path)


@pytest.mark.parametrize("tp", [1, 2])
def test_tp_that_divides(tmp_path: Path, tp: int) -> None:
    check_parallel(read_architecture(write(tmp_path)), tp, tmp_path)


@pytest.mark.parametrize(
    ("changes", "tp", "named"),
    [
        ({}, 3, "num_attention_heads = 4"),
        ({}, 4, "num_key_value_heads = 2"),
        ({"num_key_value_heads": 4, "intermediate_size": 98}, 4, "intermediate_size = 98"),
    ],
)
def test_tp_that_does_not_divide(tmp_path: Path, changes: dict[str, Any], tp: int, named: str) -> None:
    architecture = read_architecture(write(tmp_path, **changes))
    with pytest.raises(ConfigError, match=rf"^parallel\.tp: {tp} does not divide {named}"):
        check_parallel(architecture, tp, tmp_path)


def test_head_sizes_of_a_cpu(tmp_path: Path) -> None:
    for heads, size in ((4, 32), (2, 64)):
        assert size in CPU_HEAD_DIMS
        check_head_dim(
            read_architecture(write(tmp_path, num_attention_heads=heads, num_key_value_heads=2)),
            _Cpu(),
            tmp_path,
        )  # type: ignore[arg-type]
    small = read_architecture(write(tmp_path, num_attention_heads=8))
    with pytest.raises(ConfigError, match=r"config\.json: head_dim: vLLM on a CPU runs 32, .*, not 16$"):
        check_head_dim(small, _Cpu(), tmp_path)  # type: ignore[arg-type]
    check_head_dim(small, _Cuda(), tmp_path)  # type: ignore[arg-type]


def test_vllms_qwen2_ignores_head_dim(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"head_dim: vLLM's Qwen2ForCausalLM takes hidden_size / heads = 32, not 64"
    ):
        check_head_dim(read_architecture(write(tmp_path, head_dim=64)), _Cpu(), tmp_path)  # type: ignore[arg-type]


def test_transformer_engine_asked_for_on_a_cpu() -> None:
    model = ModelConfig(path="m", layers="transformer_engine")
    with pytest.raises(
        ConfigError, match=r"^model\.layers: transformer_engine was asked for, but it needs a GPU"
    ):
        uses_transformer_engine(model, _Cpu())  # type: ignore[arg-type]
    assert not uses_transformer_engine(ModelConfig(path="m"), _Cpu())  # type: ignore[arg-type]
    assert not uses_transformer_engine(ModelConfig(path="m", layers="torch"), _Cuda())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_s_row_is_complete(name: str, tmp_path: Path) -> None:
    """transformers builds it, its shape is read, and vLLM has its class."""
    import importlib.util

    import transformers

    row = FAMILIES[name]
    assert name == row.architecture and importlib.util.find_spec(row.vllm_module) is not None
    text = Path(importlib.util.find_spec(row.vllm_module).origin).read_text(encoding="utf-8")  # type: ignore[union-attr,arg-type]
    assert f"class {name}(" in text
    config = getattr(transformers, name).config_class(
        hidden_size=64, num_attention_heads=4, num_hidden_layers=1, intermediate_size=32
    )
    model = getattr(transformers, name)(config)
    has_bias = model.model.layers[0].self_attn.q_proj.bias is not None
    has_norm = hasattr(model.model.layers[0].self_attn, "q_norm")
    assert (has_bias, has_norm) == (row.qkv_bias, row.qk_norm)
    config.architectures = [name]
    config.save_pretrained(tmp_path)
    architecture = read_architecture(tmp_path)
    assert (architecture.name, architecture.qkv_bias, architecture.qk_norm) == (
        name,
        row.qkv_bias,
        row.qk_norm,
    )
