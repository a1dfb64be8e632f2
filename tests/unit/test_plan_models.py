"""Shapes of public models: parameter counts as published, and against torch's own models."""

import json
from pathlib import Path

import pytest

from rlsc_mcore.config import ConfigError
from rlsc_mcore.model.weight_map import hf_shapes
from rlsc_mcore.planning.known_models import MODELS, find_model, num_parameters

PUBLISHED = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen2.5-math-1.5b": 1_543_714_304,
    "qwen2.5-math-7b": 7_615_616_512,
    "qwen2.5-math-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


def test_every_model_has_its_published_number_of_parameters() -> None:
    assert {name: num_parameters(shape) for name, shape in MODELS.items()} == PUBLISHED


@pytest.mark.parametrize("name", list(MODELS))
def test_the_count_is_that_of_the_weight_table(name: str) -> None:
    total = 0
    for shape in hf_shapes(MODELS[name]).values():
        size = 1
        for dim in shape:
            size *= dim
        total += size
    assert num_parameters(MODELS[name]) == total


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b", "Qwen2.5-7B"])
def test_names_are_found_however_they_are_written(name: str) -> None:
    assert find_model(name) is MODELS["qwen2.5-7b"]


def test_a_folder_or_its_config_will_do(tmp_path: Path) -> None:
    from tests.helpers.tiny import make_model_folder

    folder = make_model_folder(tmp_path / "model")
    copy = tmp_path / "my_model.json"
    copy.write_text((folder / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    shape = find_model(str(folder))
    assert shape.num_layers == 2 and find_model(str(copy)) == shape


def test_what_is_unknown_is_refused_with_the_known_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--model gpt-5: no such folder.*qwen2\.5-7b"):
        find_model("gpt-5")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"architectures": ["BertModel"]}), encoding="utf-8")
    with pytest.raises(ConfigError, match="architectures"):
        find_model(str(file))
