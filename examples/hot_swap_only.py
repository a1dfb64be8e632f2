"""Use only the hot swap in a plain torch loop over a transformers model: `python examples/hot_swap_only.py`.

The engine's fused tensors and the model's parameters share storage, so an optimizer step changes both. The
swap resets the engine's prefix cache, verifies the engine's weights and counts versions.
"""

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

from rlsc_mcore.observability.console import quiet_libraries

quiet_libraries()

import torch  # noqa: E402
from torch import nn  # noqa: E402

from rlsc_mcore.config_file import parse_config  # noqa: E402
from rlsc_mcore.model.hf_checkpoint import load_tokenizer, resolve_model_folder  # noqa: E402
from rlsc_mcore.model.shape import Architecture, read_architecture  # noqa: E402
from rlsc_mcore.model.weight_map import BoundWeight  # noqa: E402
from rlsc_mcore.parallel.backend import get_backend  # noqa: E402
from rlsc_mcore.parallel.groups import initialize_groups  # noqa: E402
from rlsc_mcore.rollout.engine import Completion, RolloutEngine, SamplingRequest  # noqa: E402
from rlsc_mcore.weight_sync.swap import HotSwap  # noqa: E402

FUSED = {  # parts of a transformers model -> tensor of the engine
    ("q_proj", "k_proj", "v_proj"): "qkv_proj",
    ("gate_proj", "up_proj"): "gate_up_proj",
}


@torch.no_grad()
def share_storage(model: nn.Module, architecture: Architecture) -> list[BoundWeight]:
    """Make the parameters views of tensors with the engine's layout, and describe these tensors."""
    parts_of: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():  # in order, and a tied head only once
        engine_name = name
        for parts, fused in FUSED.items():
            for part in parts:
                engine_name = engine_name.replace(f".{part}.", f".{fused}.")
        parts_of.setdefault(engine_name, []).append((name, parameter))
    weights = []
    for engine_name, parts in parts_of.items():
        is_vocabulary = engine_name in ("model.embed_tokens.weight", "lm_head.weight")
        rows = sum(len(parameter) for _, parameter in parts)
        padded = architecture.padded_vocab_size(1) if is_vocabulary else rows
        tensor = parts[0][1].new_zeros(padded, *parts[0][1].shape[1:])
        start = 0
        for _, parameter in parts:
            view = tensor[start : start + len(parameter)]
            view.copy_(parameter)
            parameter.data = view
            start += len(parameter)
        weights.append(
            BoundWeight(
                engine_name, nn.Parameter(tensor), (engine_name,), engine_name, "plain", 0, is_vocabulary
            )
        )
    return weights


def log_probs(model: nn.Module, prompt: list[int], answer: Completion) -> torch.Tensor:
    """Return the log-prob of each token of an answer, by transformers."""
    token_ids = torch.tensor([[*prompt, *answer.token_ids]])
    logits = model(token_ids).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, token_ids[0, len(prompt) :, None])[:, 0]


def main() -> None:
    """Train three steps, sample after each, and compare the engine's log-probs with those of transformers."""
    from transformers import AutoModelForCausalLM

    path = sys.argv[1] if len(sys.argv) > 1 else "embedded:tiny_qwen2"
    with tempfile.TemporaryDirectory() as run_dir:
        config = parse_config(
            ["--run-dir", run_dir, "--model.path", path, "--model.dtype", "float32",
             "--data.path", "embedded:train", "--rollout.max-new-tokens", "16", "--rollout.kv-cache-gib", "0.05"]
        )  # fmt: skip
        folder = resolve_model_folder(path)
        architecture = read_architecture(Path(folder))
        backend = get_backend()
        groups = initialize_groups(backend, 1)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        weights = share_storage(model, architecture)
        swap = HotSwap(SimpleNamespace(model_weights=weights, architecture=architecture), groups)  # type: ignore[arg-type]
        engine = RolloutEngine(
            config,
            folder,
            backend,
            groups,
            swap.bind,
            max_model_len=64,
            kv_bytes_per_token=architecture.kv_bytes_per_token(4, 1),
            stop_token_ids=[],
        )
        swap.fill()
        prompt = load_tokenizer(folder, config.model).encode("What is 2 + 3?")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(3):
            request = SamplingRequest(prompt, 4, 1.0, 16, seed=step)
            (answers,) = engine.generate([request])
            scores = [log_probs(model, prompt, answer) for answer in answers]
            gap = max(
                float((ours.detach() - torch.tensor(answer.log_probs)).abs().max())
                for ours, answer in zip(scores, answers, strict=True)
            )
            assert gap < 1e-3, gap
            optimizer.zero_grad()
            (-torch.stack([score.sum() for score in scores]).mean()).backward()
            optimizer.step()
            swap.swap(engine, verify="full")
            print(f"step {step}: largest difference of a log-prob {gap:.1e}, version {swap.policy_version}")
        engine.shutdown()


if __name__ == "__main__":
    main()
