"""The embedded model, tokenizer and questions: answers recomputed from the text alone, splits apart, files as
recorded."""

import ast
import dataclasses
import functools
import hashlib
import json
import operator
import re
import struct
import unicodedata
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import rlsc_mcore.assets
from rlsc_mcore.assets.make.authors import AuthorMix, write_page
from rlsc_mcore.assets.make.measure import measure
from rlsc_mcore.assets.make.pretrain import IGNORED_LABEL, PretrainConfig, batches, pretrain
from rlsc_mcore.assets.make.splits import SPLIT_SIZES, draw_from_split, draw_splits, split_of
from rlsc_mcore.assets.make.tasks import draw_question

ASSETS = Path(rlsc_mcore.assets.__file__).parent
MODEL = ASSETS / "tiny_qwen2"
PAGE = functools.partial(write_page, mix=AuthorMix())
LARGEST_WEIGHT_FILE_BYTES = 4_000_000
CPU_HEAD_SIZES = {32, 64, 80, 96, 112, 128, 160, 192, 224, 256}  # head sizes of vLLM's CPU attention
GAINS = {"buys", "finds", "gets"}
OPERATORS: dict[type, Callable[[int, int], int]] = {ast.Add: operator.add, ast.Sub: operator.sub}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads((ASSETS / "record.json").read_text(encoding="utf-8"))


def read_split(name: str) -> list[dict[str, str]]:
    return [
        json.loads(line)
        for line in (ASSETS / "questions" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def evaluate_sum(expression: str) -> int:
    """Evaluate a sum with Python's own parser."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        assert isinstance(node, ast.Constant) and isinstance(node.value, int)
        return node.value

    return value(ast.parse(expression, mode="eval").body)


def evaluate_events(start: int, story: str) -> int:
    """Add and take away what a story tells."""
    for verb, amount in re.findall(r"(gives away|\w+) (\d+)(?=,| and|\.|$)", story):
        start += int(amount) if verb in GAINS else -int(amount)
    return start


def answer_from_text(text: str) -> int:
    """Answer a question from its text alone, without the code that made it."""
    if match := re.fullmatch(r"Compute ([\d+-]+)\.", text):
        return evaluate_sum(match[1])
    if match := re.fullmatch(r"Solve (\d+)x\+(\d+)=(\d+)\.", text):
        factor, constant, total = map(int, match.groups())
        (solution,) = (x for x in range(total + 1) if factor * x + constant == total)
        return solution
    if match := re.fullmatch(r"What do (\d+) \w+ at (\d+) and (\d+) \w+ at (\d+) cost\?", text):
        first_count, first_price, second_count, second_price = map(int, match.groups())
        return first_count * first_price + second_count * second_price
    if match := re.fullmatch(r"\w+ has (\d+) boxes of (\d+) \w+ and (.*)\. How many \w+ are left\?", text):
        return evaluate_events(int(match[1]) * int(match[2]), match[3])
    match = re.fullmatch(r"\w+ has (\d+) \w+, (.*)\. How many \w+ are left\?", text)
    assert match, text
    return evaluate_events(int(match[1]), match[2])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Compute 5+20-3.", 22),
        ("Solve 3x+4=19.", 5),
        ("What do 2 pens at 3 and 4 eggs at 5 cost?", 26),
        ("Ann has 4 boxes of 6 pens and loses 5. How many pens are left?", 19),
        ("Tom has 9 coins, gives away 2, finds 10 and sells 1. How many coins are left?", 16),
    ],
)
def test_the_independent_evaluator_agrees_with_answers_worked_out_by_hand(text: str, expected: int) -> None:
    assert answer_from_text(text) == expected


@pytest.mark.parametrize("name", SPLIT_SIZES)
def test_every_answer_is_right(name: str) -> None:
    rows = read_split(name)
    assert len(rows) == SPLIT_SIZES[name]
    for row in rows:
        assert row["answer"] == str(answer_from_text(row["question"])), row
    assert {row["family"] for row in rows} == {"chain", "word", "boxes", "equation", "cost"}


def test_the_files_hold_the_questions_that_the_command_draws() -> None:
    for name, questions in draw_splits().items():
        assert [row["question"] for row in read_split(name)] == [question.text for question in questions]


def test_splits_share_no_question_with_each_other_or_with_pretraining() -> None:
    texts = {name: [row["question"] for row in read_split(name)] for name in SPLIT_SIZES}
    together = [text for split in texts.values() for text in split]
    assert len(set(together)) == len(together) == sum(SPLIT_SIZES.values())
    for name, split in texts.items():
        assert {split_of(text) for text in split} == {name}
    stream = Random(3)
    pretraining = {draw_from_split(stream, "pretraining").text for _ in range(5_000)}
    assert not pretraining & set(together)


def test_every_family_draws_questions_whose_answer_the_evaluator_confirms() -> None:
    stream = Random(5)
    for _ in range(2_000):
        question = draw_question(stream)
        assert question.answer == answer_from_text(question.text), question
        assert question.answer >= 0


def test_authors_are_noisy_as_their_mix_says() -> None:
    stream = Random(9)
    mix = AuthorMix()
    num_pages = 4_000
    boxed_right = boxed = 0
    for _ in range(num_pages):
        question = draw_question(stream)
        results = re.findall(r"\\boxed\{(\d+)\}", write_page(stream, question, mix))
        boxed += bool(results)
        boxed_right += bool(results) and int(results[-1]) == question.answer
    # Junk (3 %) and rambling that gives up (14 % * 0.25) end in nothing; four standard errors are 3.1 %.
    assert boxed / num_pages == pytest.approx(mix.boxed_share * (1 - 0.03 - 0.14 * 0.25), abs=0.031)
    assert 0.6 < boxed_right / boxed < 0.9


def test_pretraining_batches_hold_only_their_split_and_train_on_answers_and_the_end_of_turn(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    config = PretrainConfig(pages_per_sort=200)
    batch = next(batches(Random(2), tokenizer, PAGE, config))
    assert batch.input_ids.numel() <= config.batch_tokens
    for input_ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        text = tokenizer.decode([token_id for token_id in input_ids if token_id != tokenizer.pad_token_id])
        prompt, answer = text.split("<|im_start|>assistant\n")
        question = prompt.removeprefix("<|im_start|>user\n").removesuffix("<|im_end|>\n")
        assert split_of(question) == "pretraining"
        assert tokenizer.decode([label for label in labels if label != IGNORED_LABEL]) == answer
        assert answer.endswith("<|im_end|>")


def test_pretraining_repeats_itself_bit_for_bit(tokenizer: PreTrainedTokenizerBase) -> None:
    config = PretrainConfig(
        total_tokens=2_500, pages_per_sort=200, batch_tokens=1_024, warmup_tokens=1_000, log_every_steps=1
    )
    (first, points), (second, _) = (
        pretrain(config, tokenizer, PAGE, lambda point, model: None) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert len(points) >= 3 and points[-1].tokens >= config.total_tokens
    assert points[0].learning_rate > 0 == points[-1].learning_rate


def test_the_model_answers_questions_it_never_saw(tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    result = measure(model, tokenizer, draw_splits()["validation"][:12], seed=0)
    # Greedy accuracy is above 0.9, so fewer than 8 of 12 would be an event of one in a thousand.
    assert result["greedy"]["strict_accuracy"] >= 8 / 12
    assert result["greedy"]["strict_accuracy"] > result["temperature_1.0"]["strict_accuracy"]
    assert 0 < result["temperature_1.0"]["agreement"] < 1


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_the_tokenizer_round_trips_any_text_in_nfc(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    normal = unicodedata.normalize("NFC", text.encode("utf-8", "ignore").decode())
    token_ids = tokenizer(normal)["input_ids"]
    assert tokenizer.decode(token_ids) == normal
    assert all(token_id < len(tokenizer) for token_id in token_ids)


def test_digits_are_single_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = [
        tokenizer.decode([token_id]) for token_id in tokenizer("120+345=465\n\\boxed{465}")["input_ids"]
    ]
    digits = [token for token in tokens if any(character.isdigit() for character in token)]
    assert digits == list("120345465465")


def test_the_chat_template_renders_the_prompt_the_model_was_trained_on(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    messages = [{"role": "user", "content": "Compute 1+2."}]
    expected = "<|im_start|>user\nCompute 1+2.<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected
    assert tokenizer(expected)["input_ids"][0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.decode(tokenizer(expected)["input_ids"]) == expected


def test_the_model_folder_holds_small_fp32_weights_of_an_engine_friendly_shape(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert (
        config["tie_word_embeddings"]
        and config["vocab_size"] == 512
        and config["max_position_embeddings"] == 256
    )
    assert config["hidden_size"] // config["num_attention_heads"] in CPU_HEAD_SIZES & {32, 64}
    assert (
        config["eos_token_id"] == tokenizer.eos_token_id and config["pad_token_id"] == tokenizer.pad_token_id
    )
    assert len(tokenizer) <= 512 and max(tokenizer.get_vocab().values()) < 512
    weights = (MODEL / "model.safetensors").read_bytes()
    assert len(weights) <= LARGEST_WEIGHT_FILE_BYTES
    (header_size,) = struct.unpack("<Q", weights[:8])
    header = json.loads(weights[8 : 8 + header_size])
    header.pop("__metadata__", None)
    assert {tensor["dtype"] for tensor in header.values()} == {"F32"}
    assert "lm_head.weight" not in header
    generation = json.loads((MODEL / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == tokenizer.eos_token_id


def test_no_file_names_a_place_on_the_machine_that_made_it() -> None:
    for file in [*MODEL.glob("*.json"), *MODEL.glob("*.jinja"), ASSETS / "record.json"]:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"[\"'\s](/(tmp|home|root|work|usr|mnt)/|file://|[A-Z]:\\\\)", text), file
        assert "_name_or_path" not in text


def test_the_record_matches_the_files(record: dict[str, Any]) -> None:
    files = {
        str(file.relative_to(ASSETS))
        for folder in ("tiny_qwen2", "questions")
        for file in (ASSETS / folder).iterdir()
    }
    assert set(record["sha256"]) == files
    for name, digest in record["sha256"].items():
        assert hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() == digest, name
    assert record["split_sizes"] == SPLIT_SIZES
    assert record["pretraining"] == dataclasses.asdict(PretrainConfig())
    assert record["authors"] == json.loads(json.dumps(dataclasses.asdict(AuthorMix())))
    assert record["tokens"] >= record["pretraining"]["total_tokens"]
    losses = [point["answer_loss"] for point in record["losses"]]
    assert losses[-1] < 0.2 * losses[0]
    assert record["losses"][-1]["learning_rate"] == 0.0
