"""The Triton kernels compile to machine code for every GPU generation that is supported, on a machine without a GPU."""

import os
import re

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from rlsc_mcore.ops import triton_copy  # noqa: E402
from rlsc_mcore.ops import triton_kernels as kernels  # noqa: E402

ROW = {"row_stride": "i64", "targets": "*i64", "inv_temperature": "fp32", "vocab_start": "i32", "num_columns": "i32"}
COPY = {"table": "*i64", "first_tiles": "*i64", "num_blocks": "i32", "num_tiles": "i32"}
TILE = {"SEARCH_STEPS": 10, "ROWS": triton_copy.ROWS, "COLUMNS": triton_copy.COLUMNS}
CASES = {
    "stats": (kernels.stats_kernel, {"logits": "*bf16", "stats": "*fp32", **ROW}, {"NUM_STATS": 3, "BLOCK": 2048, "UNROLL": 4}),
    "stats with entropy": (
        kernels.stats_kernel,
        {"logits": "*fp16", "stats": "*fp32", **ROW},
        {"NUM_STATS": 4, "BLOCK": 2048, "UNROLL": 4},
    ),
    "dlogits": (
        kernels.dlogits_kernel,
        {"grad_stats": "*fp32", "stats": "*fp32", "logits": "*bf16", "out": "*bf16", "out_stride": "i64", "row_columns": "i32", **ROW},
        {"NUM_STATS": 4, "BLOCK": 4096},
    ),
    "row": (
        kernels.row_kernel,
        {"logits": "*bf16", "weights": "*fp32", "stats": "*fp32", "log_probs": "*fp32", "row_columns": "i32", **ROW},
        {"WEIGHTED": True, "BLOCK": 32768},
    ),
    "join": (
        kernels.join_kernel,
        {
            "stats": "*fp32",
            "log_probs": "*fp32",
            "target_excluded": "*fp32",
            "shares": "*fp32",
            "num_tokens": "i32",
            "inv_temperature": "fp32",
        },
        {"NUM_RANKS": 8, "NUM_STATS": 3, "BLOCK": 256},
    ),
    "sums": (kernels.sums_kernel, {"values": "*fp32", "mask": "*u8", "cu_seqlens": "*i32", "sums": "*fp64"}, {"BLOCK": 256}),
    "copy": (triton_copy.copy_kernel, COPY, {"SOURCE": tl.bfloat16, "TARGET": tl.bfloat16, "ALIGNED": True, "VECTOR": 8, **TILE}),
    "copy and convert": (
        triton_copy.copy_kernel,
        COPY,
        {"SOURCE": tl.float32, "TARGET": tl.bfloat16, "ALIGNED": False, "VECTOR": 8, **TILE},
    ),
    "checksum": (
        triton_copy.checksum_kernel,
        {"table": "*i64", "sums": "*i64"},
        {"SOURCE": tl.bfloat16, "TYPE": tl.bfloat16, "BITS": tl.int16, "BLOCK": 1024},
    ),
}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("case", CASES)
def test_compiles_without_spilling(case, capability):
    kernel, types, constants = CASES[case]
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": 16 if case == "row" else 8}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert len(compiled.asm["cubin"]) > 1000
    assert ".local" not in compiled.asm["ptx"], "local memory: registers spill or an array is indexed"


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_aligned_copies_use_16_byte_loads_and_stores(capability):
    kernel, types, constants = CASES["copy"]
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": triton_copy.WARPS})
    assert re.search(r"ld\.global\.v4\.b32|ld\.global\.v2\.b64", compiled.asm["ptx"])
    assert re.search(r"st\.global\.v4\.b32|st\.global\.v2\.b64", compiled.asm["ptx"])
