"""Use only the fused head in a plain transformers loop: `python examples/kernels_only.py [MODEL_FOLDER]`.

The loss and both gradients come out of one pass over chunks of tokens. Logits never exist as [tokens,
vocabulary].
"""

import sys

import torch

from rlsc_mcore.model.hf_checkpoint import resolve_model_folder
from rlsc_mcore.ops import linear_weighted_loss
from rlsc_mcore.parallel.packages import hide_broken_torchvision

hide_broken_torchvision()
from transformers import AutoModelForCausalLM  # noqa: E402


def main() -> None:
    """Compare loss and gradient of one sequence with full logits, and print the differences."""
    torch.manual_seed(0)
    folder = resolve_model_folder(sys.argv[1] if len(sys.argv) > 1 else "embedded:tiny_qwen2")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    token_ids = torch.randint(5, model.config.vocab_size - 5, (1, 48))
    prompt_tokens = 16
    targets = torch.cat([token_ids[0, 1:], torch.zeros(1, dtype=torch.int64)])
    mask = torch.zeros(48, dtype=torch.bool)
    mask[prompt_tokens - 1 : -1] = True

    hidden = model.model(token_ids).last_hidden_state[0]
    loss, log_probs = linear_weighted_loss(
        hidden,
        model.lm_head.weight,
        targets,
        mask_T=mask,
        cu_seqlens=torch.tensor([0, 48], dtype=torch.int32),
        coefficient_fn=lambda log_p, mask_T, cu_seqlens, sequences: torch.ones_like(log_p),
        live_counts=(int(mask.sum()),),
        vocab_size=model.config.vocab_size,
    )
    loss.backward()
    fused = model.lm_head.weight.grad.clone()
    model.zero_grad()

    logits = model(token_ids).logits[0, mask].log_softmax(-1)
    expected = -logits.gather(1, targets[mask][:, None]).sum()
    expected.backward()
    gradient = model.lm_head.weight.grad
    print(f"loss: fused {loss.item():.6f}, full logits {expected.item():.6f}")
    print(f"largest difference of the head's gradient: {(fused - gradient).abs().max().item():.1e}")
    assert abs(loss.item() - expected.item()) < 1e-3 and log_probs.shape == mask.shape
    torch.testing.assert_close(fused, gradient, rtol=1e-3, atol=1e-4)


if __name__ == "__main__":
    main()
