"""Small random models and rollouts, made on the spot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlsc_mcore.config import Config
from rlsc_mcore.config_file import parse_config
from rlsc_mcore.types import Rollout

VOCAB_SIZE = 300  # no multiple of 64: the padded rows take part in every test


def make_moved_trainer(folder: str, other: str, flags: list[str], *, tp: int = 1, pp: int = 1) -> Any:
    """A trainer that was built from `folder`, so that these are its starting weights, with the weights of
    `other`. In a rank's process only."""
    from rlsc_mcore.model.hf_checkpoint import load_weights
    from rlsc_mcore.parallel.backend import get_backend
    from rlsc_mcore.parallel.groups import initialize_groups
    from rlsc_mcore.training.step import Trainer

    backend = get_backend()
    groups = initialize_groups(backend, tp, pp=pp)
    layout = ["--parallel.tp", str(tp), "--parallel.pp", str(pp)]
    trainer = Trainer(tiny_config(folder, [*layout, *flags]), Path(folder), backend, groups)
    policy = trainer.policy
    load_weights(policy.weights, policy.architecture, Path(other), groups.tp_rank, groups.tp_size)
    trainer.optimizer.reload_model_params()
    return trainer


def make_model_folder(
    folder: Path,
    *,
    architecture: str = "qwen2",
    tied: bool = True,
    seed: int = 0,
    vocab_size: int = VOCAB_SIZE,
    head_dim: int = 32,
    max_position_embeddings: int = 128,
    num_kv_heads: int = 2,
    num_layers: int = 2,
) -> Path:
    """Write a random Hugging Face model (2 layers, 4 heads, 2 KV heads unless told otherwise, biases not
    zero) to `folder`."""
    from rlsc_mcore.parallel.packages import hide_broken_torchvision

    hide_broken_torchvision()
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    config_class, model_class = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[architecture]
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=4 * head_dim,
        intermediate_size=96,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
            elif "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def tiny_config(folder: str | Path, flags: Sequence[str] = (), run_dir: str | Path = "unused") -> Config:
    """A float32 configuration for a model folder; later flags win."""
    base = [
        "--run-dir",
        str(run_dir),
        "--model.path",
        str(folder),
        "--model.dtype",
        "float32",
        "--data.path",
        "embedded:train",
    ]
    return parse_config([*base, *flags])


def make_rollouts(
    *, num_questions: int, num_samples: int, vocab_size: int = VOCAB_SIZE, seed: int = 0
) -> list[Rollout]:
    """Random rollouts of ragged lengths; the first question has two identical answers and one without
    tokens."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, vocab_size, (count,), generator=generator).tolist())

    def length(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    rollouts = []
    for question in range(num_questions):
        prompt = tokens(length(1, 9))
        answers = [(*tokens(length(1, 20)), 0) for _ in range(num_samples)]
        if question == 0:
            answers[1] = answers[0]
            answers[2:3] = [()]
        for sample, answer in enumerate(answers):
            rollouts.append(
                Rollout(
                    question_index=question,
                    sample_index=sample,
                    prompt_ids=prompt,
                    response_ids=answer,
                    engine_log_probs=(-1.0,) * len(answer),
                    finish_reason="stop" if answer else "length",
                    policy_version=0,
                )
            )
    return rollouts
