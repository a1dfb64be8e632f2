"""Hugging Face folders: what is read, what is refused by name, and what is written."""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlsc_mcore.config import ConfigError, ModelConfig
from rlsc_mcore.model import hf_checkpoint
from rlsc_mcore.model.hf_checkpoint import (
    INDEX_FILE,
    SafetensorsFolder,
    check_vocabulary,
    check_weights,
    left_over_weights,
    load_tokenizer,
    resolve_model_folder,
    write_hf_folder,
)
from rlsc_mcore.model.shape import read_architecture
from rlsc_mcore.model.weight_map import hf_shapes
from rlsc_mcore.run.made_here import MARKER
from tests.helpers.folders import EMBEDDED, copy_embedded, edit_config
from tests.helpers.tiny import make_model_folder

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_embedded(tmp_path / "model")


def shard(folder: Path, *, count: int = 3) -> dict[str, torch.Tensor]:
    """Rewrite a folder's weights as an indexed set of files."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    weight_map = {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        save_file({name: tensors[name] for name in names[number::count]}, folder / file)
        weight_map |= dict.fromkeys(names[number::count], file)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return tensors


def test_an_indexed_set_of_files_reads_like_one(folder: Path) -> None:
    whole = {name: tensor.clone() for name, tensor in shard(folder).items()}
    save_file(
        {"model.norm.weight": torch.zeros(128)}, folder / "other.safetensors"
    )  # not in the index: not part of the model
    source = SafetensorsFolder(folder)
    check_weights(folder, read_architecture(folder))
    for name, tensor in whole.items():
        assert name in source and source.shape(name) == tuple(tensor.shape)
        assert torch.equal(source.read(name, None, 0, 0), tensor)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(source.read(name, 0, 3, 9), whole[name][3:9])
    assert torch.equal(source.read(name, 1, 3, 9), whole[name][:, 3:9])


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_expected_shapes_are_those_that_transformers_writes(
    tmp_path: Path, architecture: str, tied: bool
) -> None:
    folder = make_model_folder(tmp_path / "model", architecture=architecture, tied=tied)
    written = {name: tuple(tensor.shape) for name, tensor in load_file(folder / WEIGHTS).items()}
    assert hf_shapes(read_architecture(folder)) == written
    check_weights(folder, read_architecture(folder))


def zeros(folder: Path) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in load_file(folder / WEIGHTS).items()}


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    source = SafetensorsFolder(folder)
    return {name: source.read(name, None, 0, 0) for name in hf_shapes(read_architecture(folder))}


def transformers_weights(folder: Path) -> dict[str, torch.Tensor]:
    """What transformers itself loads from the folder: the oracle of which files count."""
    from rlsc_mcore.parallel.packages import hide_broken_torchvision

    hide_broken_torchvision()
    from transformers import AutoModelForCausalLM

    state = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    return {name: tensor for name, tensor in state.items() if name in hf_shapes(read_architecture(folder))}


@pytest.mark.parametrize("kind", ["stray", "left-over shards", "named"])
def test_the_files_that_are_read_are_those_of_transformers(folder: Path, kind: str) -> None:
    left_over = []
    if kind == "stray":  # sorts before and after the real file
        for name in ("model_old.safetensors", "a.safetensors"):
            save_file(zeros(folder), folder / name)
        left_over = ["a.safetensors", "model_old.safetensors"]
    elif kind == "left-over shards":
        left_over = [INDEX_FILE, "old-00001.safetensors"]
        save_file(zeros(folder), folder / "old-00001.safetensors")
        weight_map = dict.fromkeys(zeros(folder), "old-00001.safetensors")
        (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    else:
        save_file(
            {name: tensor + 1 for name, tensor in zeros(folder).items()},
            folder / "ones.safetensors",
            {"format": "pt"},
        )
        edit_config(folder, transformers_weights="ones.safetensors")
        left_over = [WEIGHTS]
    expected = transformers_weights(folder)
    check_weights(folder, read_architecture(folder))
    found = read_all(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert left_over_weights(folder) == left_over


def test_nothing_is_left_over_in_a_plain_folder(folder: Path) -> None:
    assert left_over_weights(folder) == []
    shard(folder)
    assert left_over_weights(folder) == []


def test_a_tensor_in_two_files_of_the_index_names_both(folder: Path) -> None:
    shard(folder)
    extra = load_file(folder / "model-00002-of-00003.safetensors") | {"model.norm.weight": torch.zeros(128)}
    for name in ("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"):
        save_file(load_file(folder / name) | {"model.norm.weight": extra["model.norm.weight"]}, folder / name)
    with pytest.raises(
        ConfigError,
        match=r"'model\.norm\.weight' is in model-0000\d-of-00003\.safetensors and in model-0000\d-of",
    ):
        check_weights(folder, read_architecture(folder))


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_a_tied_model_with_an_output_layer_of_its_own(
    tmp_path: Path, architecture: str, scale: float
) -> None:
    folder = make_model_folder(tmp_path / "model", architecture=architecture)
    tensors = load_file(folder / WEIGHTS)
    head = tensors["model.embed_tokens.weight"].clone()
    head[-1] *= scale
    save_file(tensors | {"lm_head.weight": head}, folder / WEIGHTS, {"format": "pt"})
    if scale == 1.0:
        check_weights(folder, read_architecture(folder))
        return
    named = r"lm_head\.weight is not equal to model\.embed_tokens\.weight, but config\.json says tie_word_embeddings: true"
    with pytest.raises(ConfigError, match=named):
        check_weights(folder, read_architecture(folder))
    edit_config(folder, tie_word_embeddings=False)
    check_weights(folder, read_architecture(folder))


def damage(kind: str, folder: Path) -> None:
    weights = folder / WEIGHTS
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif kind == "half":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif kind == "empty":
        weights.write_bytes(b"")
    elif kind == "pickled":
        torch.save({}, folder / "pytorch_model.bin")
        weights.unlink()
    elif kind == "none":
        weights.unlink()
    elif kind in ("missing", "norm", "shape"):
        tensors = load_file(weights)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        if kind == "missing":
            del tensors["model.layers.2.self_attn.k_proj.bias"]
        elif kind == "norm":
            del tensors["model.norm.weight"]
        else:
            tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 128)
        save_file(tensors, weights)
    elif kind == "fp8":
        name = "model.layers.0.mlp.up_proj.weight"
        tensors = load_file(weights)
        save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, weights)
    elif kind == "adapter":
        (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    elif kind == "unnamed":
        weights.rename(folder / "consolidated.safetensors")
    elif kind == "outside":
        (folder / INDEX_FILE).write_text(
            '{"weight_map": {"model.norm.weight": "../other.safetensors"}}', encoding="utf-8"
        )
        weights.unlink()
    elif kind == "untied":
        edit_config(folder, tie_word_embeddings=None)
    elif kind == "rows":
        edit_config(folder, vocab_size=513)
    elif kind == "index_json":
        weights.unlink()
        (folder / INDEX_FILE).write_text("{", encoding="utf-8")
    elif kind == "index_fields":
        weights.unlink()
        (folder / INDEX_FILE).write_text('{"weight_map": 3}', encoding="utf-8")
    elif kind == "index_file":
        shard(folder)
        (folder / "model-00002-of-00003.safetensors").unlink()


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("truncated", r"model\.safetensors: not a whole safetensors file"),
        ("half", r"model\.safetensors: not a whole safetensors file"),
        ("empty", r"model\.safetensors: not a whole safetensors file"),
        (
            "pickled",
            r"has no \*\.safetensors weights; only safetensors are read, pickled \*\.bin files are refused",
        ),
        ("none", r"has no \*\.safetensors weights$"),
        ("missing", r"has no tensor 'model\.layers\.2\.self_attn\.k_proj\.bias'"),
        ("norm", r"has no tensor 'model\.norm\.weight'"),
        (
            "shape",
            r"model\.layers\.0\.mlp\.up_proj\.weight has shape \(3, 128\), config\.json says \(384, 128\)",
        ),
        ("rows", r"model\.embed_tokens\.weight has shape \(512, 128\), config\.json says \(513, 128\)"),
        (
            "fp8",
            r"model\.layers\.0\.mlp\.up_proj\.weight is stored as F8_E4M3; expected one of F64, F32, F16, BF16",
        ),
        ("adapter", r"holds an adapter \(adapter_config\.json\)"),
        ("unnamed", r"has neither model\.safetensors nor model\.safetensors\.index\.json"),
        ("outside", r"expected names of files in its folder, got '\.\./other\.safetensors'"),
        (
            "untied",
            r"has no tensor 'lm_head\.weight' and its config\.json does not say tie_word_embeddings: true",
        ),
        ("index_json", rf"{re.escape(INDEX_FILE)}: not an index"),
        ("index_fields", rf"{re.escape(INDEX_FILE)}: not an index"),
        (
            "index_file",
            r"lacks model-00002-of-00003\.safetensors, which its model\.safetensors\.index\.json names",
        ),
    ],
)
def test_damaged_weights_are_named(folder: Path, kind: str, named: str) -> None:
    damage(kind, folder)
    with pytest.raises(ConfigError, match=named) as error:
        check_weights(folder, read_architecture(folder))
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_pickled_file_beside_the_weights_is_never_read(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04not a pickle")
    check_weights(folder, read_architecture(folder))


def test_a_tokenizer_larger_than_the_embedding(folder: Path) -> None:
    tokenizer = load_tokenizer(folder, ModelConfig(path=str(folder)))
    check_vocabulary(tokenizer, read_architecture(folder), folder)
    largest = max(tokenizer.get_vocab().values())
    edit_config(folder, vocab_size=largest)
    with pytest.raises(
        ConfigError, match=rf"has ids up to {largest}, but config\.json says vocab_size = {largest}"
    ):
        check_vocabulary(tokenizer, read_architecture(folder), folder)


def test_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="has no tokenizer"):
        load_tokenizer(folder, ModelConfig(path=str(folder)))


def test_a_damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"the tokenizer of .* does not load") as error:
        load_tokenizer(folder, ModelConfig(path=str(folder)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("embedded:other", "no embedded model 'other'"),
        ("/no/such/folder", "no folder /no/such/folder"),
        ("./absent/model", "no folder"),
        ("absent", "no folder absent"),
        ("someone/absent-model", "could not be fetched from the hub"),
    ],
)
def test_a_path_that_is_no_model(path: str, named: str) -> None:
    with pytest.raises(ConfigError, match=r"^model\.path: ") as error:
        resolve_model_folder(path)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_a_written_folder_reads_back(tmp_path: Path) -> None:
    source = resolve_model_folder(EMBEDDED)
    tensors = load_file(source / WEIGHTS)
    output = tmp_path / "out"
    write_hf_folder(tensors.items(), source, output, dtype="float32", write=True)
    assert sorted(file.name for file in output.iterdir()) == sorted(
        [MARKER, *(file.name for file in source.iterdir())]
    )
    check_weights(output, read_architecture(output))
    found = load_file(output / WEIGHTS)
    assert found.keys() == tensors.keys() and all(
        torch.equal(found[name], tensor) for name, tensor in tensors.items()
    )
    assert json.loads((output / "config.json").read_text(encoding="utf-8"))["dtype"] == "float32"
    assert list(tmp_path.iterdir()) == [output]


def test_a_tokenizers_code_and_named_templates_are_written_too(folder: Path, tmp_path: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    for name in ("additional_chat_templates/tool.jinja", "tokenization_mine.py"):
        (folder / name).write_text("content", encoding="utf-8")
    write_hf_folder(
        load_file(folder / WEIGHTS).items(), folder, tmp_path / "out", dtype="float32", write=True
    )
    for name in ("additional_chat_templates/tool.jinja", "tokenization_mine.py"):
        assert (tmp_path / "out" / name).read_text(encoding="utf-8") == "content"


@pytest.mark.parametrize("limit", [1, 100_000, 400_000])
def test_large_models_are_written_in_files_of_limited_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(hf_checkpoint, "MAX_SHARD_BYTES", limit)
    source = resolve_model_folder(EMBEDDED)
    tensors = load_file(source / WEIGHTS)
    output = tmp_path / "out"
    write_hf_folder(tensors.items(), source, output, dtype="float32", write=True)
    files = sorted(output.glob("*.safetensors"))
    index: dict[str, Any] = json.loads((output / INDEX_FILE).read_text(encoding="utf-8"))
    assert [file.name for file in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    assert index["metadata"]["total_size"] == sum(
        tensor.numel() * tensor.element_size() for tensor in tensors.values()
    )
    contents = {file.name: load_file(file) for file in files}
    for name, tensor in tensors.items():
        assert torch.equal(contents[index["weight_map"][name]][name], tensor)
    for content in contents.values():
        assert (
            sum(tensor.numel() * tensor.element_size() for tensor in content.values()) <= limit
            or len(content) == 1
        )
    check_weights(output, read_architecture(output))


def test_an_existing_folder_is_replaced_only_when_the_new_one_is_whole(tmp_path: Path) -> None:
    source, output = resolve_model_folder(EMBEDDED), tmp_path / "out"
    tensors = load_file(source / WEIGHTS)
    write_hf_folder(tensors.items(), source, output, dtype="float32", write=True)

    def broken() -> Any:
        yield "model.norm.weight", torch.zeros(128)
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        write_hf_folder(broken(), source, output, dtype="float32", write=True)
    assert torch.equal(load_file(output / WEIGHTS)["model.norm.weight"], tensors["model.norm.weight"])
    doubled = ((name, tensor * 2) for name, tensor in tensors.items())
    write_hf_folder(doubled, source, output, dtype="float32", write=True)
    assert torch.equal(load_file(output / WEIGHTS)["model.norm.weight"], tensors["model.norm.weight"] * 2)


@pytest.mark.parametrize("mask", [0o022, 0o007])
def test_written_files_have_the_permissions_that_the_umask_leaves(tmp_path: Path, mask: int) -> None:
    source = resolve_model_folder(EMBEDDED)
    before = os.umask(mask)
    try:
        write_hf_folder(
            load_file(source / WEIGHTS).items(), source, tmp_path / "out", dtype="float32", write=True
        )
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").iterdir()} == {0o666 & ~mask}


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    seen = []
    tensors = ((name, seen.append(name) or torch.zeros(2)) for name in ("a", "b"))  # type: ignore[func-returns-value]
    write_hf_folder(tensors, tmp_path, tmp_path / "out", dtype="float32", write=False)
    assert seen == ["a", "b"]  # each is a collective: every rank must take part
    assert list(tmp_path.iterdir()) == []
