"""Compare a whole step with TRL's GRPO trainer: `python -m benchmarks.bench_peers --model DIR [--questions 8
...]`.

Both sides use the same model folder, prompts, number of samples, temperature, maximum answer length,
optimizer and dtype. TRL gets a constant reward and no reference model. Each side runs in a separate process,
in turn, twice each; the first step of each is not counted. Sampled answers differ, so the result is time per
sampled token. The checks come first: both sides must read the same prompt tokens, and both must train with a
finite loss. On this engine's side the log-probs of trainer and engine must agree too. `ratio` is TRL's time
per token over this engine's.

TRL samples with its colocated vLLM on a GPU. Its vLLM mode does not run on a CPU; there it samples with
`generate` of transformers.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from rlsc_mcore.observability.console import quiet_libraries

quiet_libraries()

import torch  # noqa: E402

from benchmarks.harness import MEAN_GAP_LIMIT, command_line, in_process, save  # noqa: E402
from rlsc_mcore.parallel.packages import hide_broken_torchvision  # noqa: E402

LEARNING_RATE = 1e-6


def main() -> None:
    """Measure both sides and write results/<device>/peers.json."""
    options = command_line(
        __doc__,
        required=["model"],
        model=(str, "model folder with a tokenizer, or embedded:tiny_qwen2"),
        questions=(8, "questions per step"),
        num_samples=(16, "answers per question"),
        max_new_tokens=(1024, "limit of an answer"),
        steps=(4, "steps per turn, the first of which is not counted"),
        turns=(2, "turns of each side"),
        per_device_batch=(int, "TRL's answers per forward pass (default: 4 on a GPU, 16 on a CPU)"),
    )
    options.cuda = torch.cuda.is_available()  # leaves the GPU to the two child processes
    options.dtype = "bfloat16" if options.cuda else "float32"
    options.per_device_batch = options.per_device_batch or (4 if options.cuda else 16)
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    for _ in range(options.turns):
        for name, side in (("ours", ours), ("trl", trl)):
            runs[name].append(in_process(in_scratch_folder, side, options))
    assert runs["ours"][0]["prompts"] == runs["trl"][0]["prompts"], "the sides read other prompt tokens"
    result = summarize(runs)
    print(json.dumps(result, indent=1))
    device = torch.device("cuda" if options.cuda else "cpu")
    save(__file__, result, device, options.out, trl=metadata.version("trl"), dtype=options.dtype)


def summarize(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return seconds per 1000 sampled tokens of each side, and TRL's time as a multiple of this engine's."""
    per_token = {
        name: [
            1e3 * seconds / tokens
            for turn in turns
            for seconds, tokens in zip(turn["seconds"], turn["tokens"], strict=True)
        ]
        for name, turns in runs.items()
    }
    medians = {name: statistics.median(values) for name, values in per_token.items()}
    return {
        "seconds_per_1000_tokens": medians,
        "ratio": medians["trl"] / medians["ours"],
        "mean_answer_tokens": {
            name: statistics.mean(t for turn in turns for t in turn["mean_length"])
            for name, turns in runs.items()
        },
        "peak_device_bytes": {
            name: max(turn["peak_device_bytes"] for turn in turns) for name, turns in runs.items()
        },
        "sampler_of_trl": runs["trl"][0]["sampler"],
        "log_prob_gap_mean": max(turn["gap"] for turn in runs["ours"]),
        "steps_counted": len(per_token["ours"]),
    }


def in_scratch_folder(side: Callable[[argparse.Namespace, Path], Any], options: argparse.Namespace) -> Any:
    """Run one side in this process with a folder for its files."""
    with tempfile.TemporaryDirectory() as scratch:
        return side(options, Path(scratch))


def _questions(options: argparse.Namespace) -> tuple[Any, list[Any], list[list[int]]]:
    """Return the tokenizer, the step's questions and the tokens of their prompts."""
    from rlsc_mcore.config import ModelConfig
    from rlsc_mcore.data.questions import read_questions
    from rlsc_mcore.data.templates import render_prompt
    from rlsc_mcore.model.hf_checkpoint import load_tokenizer, resolve_model_folder

    tokenizer = load_tokenizer(resolve_model_folder(options.model), ModelConfig(path=options.model))
    questions = read_questions("embedded:train")[: options.questions]
    return (
        tokenizer,
        questions,
        [list(render_prompt("chat", question.text, tokenizer)) for question in questions],
    )


def ours(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Run this engine's loop: sample, train, swap, record."""
    from rlsc_mcore.config_file import parse_config
    from rlsc_mcore.training.session import Session
    from rlsc_mcore.training.signals import StopRequest

    _, questions, prompts = _questions(options)
    file = scratch / "questions.jsonl"
    rows = (json.dumps({"question": question.text, "answer": "0"}) + "\n" for question in questions)
    file.write_text("".join(rows), encoding="utf-8")
    flags = ["--run-dir", str(scratch / "run"), "--model.path", options.model, "--data.path", str(file)]
    flags += f"--model.dtype {options.dtype} --optimizer.lr {LEARNING_RATE}".split()
    flags += f"--data.template chat --data.questions-per-step {options.questions}".split()
    flags += f"--rollout.num-samples {options.num_samples} --rollout.temperature 1.0".split()
    flags += f"--rollout.max-new-tokens {options.max_new_tokens}".split()
    flags += f"--training.num-steps {options.steps} --training.save-every 0".split()
    session = Session(parse_config(flags), StopRequest())
    seconds = []
    for step in range(options.steps):
        begin = time.perf_counter()
        rollouts = session.sample(step)
        result = session.train(step, rollouts)
        session.hot_swap()
        session.record(step, rollouts, result)
        session.backend.synchronize()
        seconds.append(time.perf_counter() - begin)
        assert math.isfinite(result.outcome.loss), f"loss {result.outcome.loss}"
    rows = session.metrics.rows
    gap = max(row["log_prob_gap_mean"] for row in rows)
    assert gap < MEAN_GAP_LIMIT[options.dtype], f"trainer and engine disagree by {gap}"
    lengths = [row["mean_length"] for row in rows][1:]
    return {
        "prompts": prompts,
        "seconds": seconds[1:],
        "mean_length": lengths,
        "tokens": [length * options.questions * options.num_samples for length in lengths],
        "peak_device_bytes": torch.cuda.max_memory_reserved() if options.cuda else 0,
        "gap": gap,
    }


def trl(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Run TRL's GRPO trainer with a constant reward."""
    hide_broken_torchvision()
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from rlsc_mcore.model.hf_checkpoint import resolve_model_folder

    tokenizer, _, prompts = _questions(options)
    texts = [tokenizer.decode(prompt) for prompt in prompts]
    read = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    ends: list[float] = []
    lengths: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if options.cuda:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "completions/mean_length" in logs:
                assert math.isfinite(logs["loss"]), f"TRL: loss {logs['loss']}"
                lengths.append(float(logs["completions/mean_length"]))

    def constant(completions: list[Any], **kwargs: Any) -> list[float]:
        return [1.0] * len(completions)

    answers = options.questions * options.num_samples
    folder = str(resolve_model_folder(options.model))
    vllm: dict[str, Any] = {"use_vllm": False}
    if options.cuda:
        vllm = {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_enable_sleep_mode": True,
            "vllm_gpu_memory_utilization": 0.3,
        }
        vllm["vllm_max_model_length"] = max(map(len, prompts)) + options.max_new_tokens
        os.environ.update(
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=os.environ.get("MASTER_PORT", "29531"),
        )
    config = GRPOConfig(
        output_dir=str(scratch / "trl"), max_steps=options.steps, learning_rate=LEARNING_RATE, weight_decay=0.01, max_grad_norm=1.0,
        lr_scheduler_type="constant", per_device_train_batch_size=options.per_device_batch,
        gradient_accumulation_steps=answers // options.per_device_batch, num_generations=options.num_samples,
        max_completion_length=options.max_new_tokens, temperature=1.0, beta=0.0, bf16=options.cuda, use_cpu=not options.cuda,
        gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to="none", shuffle_dataset=False, **vllm,
    )  # fmt: skip
    dtype = torch.bfloat16 if options.cuda else torch.float32
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), reward_funcs=constant, args=config,
        train_dataset=Dataset.from_dict({"prompt": texts * options.steps}), processing_class=tokenizer, callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    assert len(ends) == len(lengths) == options.steps, (
        f"TRL: {len(ends)} steps, {len(lengths)} logs of {options.steps}"
    )
    return {
        "prompts": read,
        "seconds": [later - earlier for earlier, later in itertools.pairwise(ends)],
        "mean_length": lengths[1:],
        "tokens": [length * answers for length in lengths[1:]],
        "peak_device_bytes": torch.cuda.max_memory_reserved() if options.cuda else 0,
        "sampler": "colocated vLLM" if options.cuda else "transformers generate",
    }


if __name__ == "__main__":
    main()
