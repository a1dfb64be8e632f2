"""Calls into TransformerEngine's FusedAdam fit its published signatures, and so does the stand-in that tests
use."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from rlsc_mcore.rehearsal.fused_adam import FusedAdam

TABLE = json.loads((Path(__file__).parents[1] / "helpers" / "te_signatures.json").read_text(encoding="utf-8"))


def signature_of(function: Any) -> dict[str, list[str]]:
    parameters = inspect.signature(function).parameters.values()
    required = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    optional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty]
    return {
        "positional": required,
        "with_default": optional,
        "keyword_only": [p.name for p in parameters if p.kind is p.KEYWORD_ONLY],
    }


@pytest.mark.parametrize("method", list(TABLE["2.11"]["FusedAdam"]))
def test_the_stand_in_has_the_signatures_of_2_11(method: str) -> None:
    assert signature_of(getattr(FusedAdam, method)) == TABLE["2.11"]["FusedAdam"][method]


@pytest.mark.parametrize("version", list(TABLE))
def test_every_version_takes_what_is_passed(version: str) -> None:
    """`initialize_state(parameter, store_param_remainders=False)`, and Megatron's keywords of the
    constructor."""
    signatures = TABLE[version]["FusedAdam"]
    assert signatures["initialize_state"] == {
        "positional": ["self", "param", "store_param_remainders"],
        "with_default": [],
        "keyword_only": [],
    }
    taken = {*signatures["__init__"]["with_default"], *signatures["__init__"]["keyword_only"]}
    passed = {
        "lr",
        "weight_decay",
        "betas",
        "eps",
        "adam_w_mode",
        "exp_avg_dtype",
        "exp_avg_sq_dtype",
        "master_weights",
    }
    assert passed | {"use_decoupled_grad", "master_weight_dtype", "store_param_remainders"} <= taken
    # An update in parts is needed exactly where the kernel cannot read bfloat16 moments.
    assert TABLE[version]["fuse_unscale"] == (version not in ("2.11", "2.12"))
