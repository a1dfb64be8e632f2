"""Loading streams: a rank reads its own slices and holds little beside them; export is bit-equal for TP 1, 2
and 4."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import make_model_folder, tiny_config


def anonymous_bytes() -> int:
    """Memory of this process that is no file's: what mapped weights occupy is the page cache's and is given
    back."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def load(folder: str, tp: int) -> dict[str, Any]:
    from safetensors.torch import load_file

    from rlsc_mcore.model import hf_checkpoint, weight_map
    from rlsc_mcore.model.build import build_policy
    from rlsc_mcore.model.weight_map import export_weights
    from rlsc_mcore.parallel.backend import get_backend
    from rlsc_mcore.parallel.groups import initialize_groups

    backend = get_backend()
    groups = initialize_groups(backend, tp)
    policy = build_policy(
        tiny_config(folder, ["--parallel.tp", str(tp)]), Path(folder), backend, groups, load=False
    )
    read, peak, plain = 0, 0, hf_checkpoint.SafetensorsFolder.read
    pieces = weight_map.shard_pieces
    weight_map.PIECE_BYTES = 1 << 20  # as small beside this model as the real size is beside a real one
    share = sum(weight.parameter.numel() * weight.parameter.element_size() for weight in policy.weights)

    def counted(self: Any, *arguments: Any) -> torch.Tensor:
        nonlocal read
        tensor = plain(self, *arguments)
        read += tensor.numel() * tensor.element_size()
        return tensor

    def measured(*arguments: Any) -> Iterator[Any]:
        nonlocal peak
        for each in pieces(*arguments):
            peak = max(peak, anonymous_bytes())  # with all that was put together for this piece
            yield each

    hf_checkpoint.SafetensorsFolder.read = counted  # type: ignore[method-assign]
    hf_checkpoint.shard_pieces = measured  # type: ignore[attr-defined]
    resident = anonymous_bytes()
    hf_checkpoint.load_weights(
        policy.weights, policy.architecture, Path(folder), groups.tp_rank, groups.tp_size
    )
    source = load_file(Path(folder) / "model.safetensors")
    exported = dict(export_weights(policy.weights, policy.architecture, groups.tp_group, tp))
    different = [name for name, tensor in source.items() if not torch.equal(exported[name], tensor)]
    return {
        "read": read,
        "share": share,
        "beside": peak - resident,
        "different": different,
        "complete": exported.keys() == source.keys(),
    }


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_rank_reads_its_share_and_holds_little_beside_it(tmp_path: Path, tp: int, tied: bool) -> None:
    # Large enough that the weights stand out of the noise: 100 MB, the vocabulary a third of it.
    folder = str(make_model_folder(tmp_path / "model", tied=tied, head_dim=256, vocab_size=8192))
    for rank in run_ranks(tp, load, folder, tp):
        assert rank["complete"] and rank["different"] == []
        assert 0.97 * rank["share"] <= rank["read"] <= rank["share"]  # padded vocabulary rows are not read
        # The parameters themselves are resident already: together below 1.3 x the share.
        assert rank["beside"] < 0.3 * rank["share"]


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_export_is_bit_equal_for_tp_4(tmp_path: Path, architecture: str) -> None:
    folder = str(make_model_folder(tmp_path / "model", architecture=architecture, num_kv_heads=4))
    for rank in run_ranks(4, load, folder, 4):
        assert rank["complete"] and rank["different"] == []
        assert rank["read"] <= rank["share"]
