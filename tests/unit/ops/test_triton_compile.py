"""The Triton kernels compile to machine code for every GPU generation that is supported, on a machine without
a GPU.

What is asked of the machine code: no spilled registers (they do not show in PTX), 16-byte loads where rows
are aligned, and how many instructions stats_kernel issues per logit. Kernels are compiled for the arguments
that a launch passes.
"""

import importlib.util
import os
import re
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from rlsc_mcore.ops import triton_copy, triton_kl_kernels, triton_rows  # noqa: E402
from rlsc_mcore.ops import triton_kernels as kernels  # noqa: E402

CHECK_SASS = Path(__file__).parents[3] / "csrc" / "check_sass.py"
GENERATIONS = [80, 90, 100, 120]
HOPPER = 90

TYPES = {
    "logits": "*bf16", "out": "*bf16", "targets": "*i64", "cu_seqlens": "*i32", "mask": "*u8", "sums": "*fp64", "table": "*i64",
    "first_tiles": "*i64", "inv_temperature": "fp32", "student": "*bf16", "teacher": "*bf16", "log_beta": "fp32",
    "log_rest": "fp32",
}  # fmt: skip
FLOATS = (
    "stats",
    "log_probs",
    "weights",
    "grad_stats",
    "target_excluded",
    "shares",
    "grad_log_probs",
    "grad_entropy",
    "values",
    "norms",
    "scales",
    "student_kls",
)
TYPES |= dict.fromkeys(FLOATS, "*fp32")
TILE = {"SEARCH_STEPS": 10, "ROWS": triton_copy.ROWS, "COLUMNS": triton_copy.COLUMNS}
ROW = dict(zip(("BLOCK", "REST"), triton_rows.row_tiles(19008), strict=True))
LONGEST = dict(zip(("BLOCK", "REST"), triton_rows.row_tiles(triton_rows.MAX_ROW), strict=True))
KL = {"BLOCK": triton_rows.KL_BLOCK}
JOIN = {"NUM_RANKS": 8, "NUM_STATS": 4, "BLOCK": triton_rows.JOIN_BLOCK}


def stats(width, num_stats, scored=True):
    block, warps = width
    return (
        kernels.stats_kernel,
        {"NUM_STATS": num_stats, "SCORED": scored, "BLOCK": block, "UNROLL": triton_rows.STATS_UNROLL},
        warps,
    )


def row(weighted, tiles, full=True):
    return (
        kernels.row_kernel,
        {"WEIGHTED": weighted, **tiles, "FULL": full},
        triton_rows.row_warps(tiles["BLOCK"] + tiles["REST"]),
    )


# kernel, constants, warps
CASES = {
    "stats": stats(triton_rows.STATS_WIDE, 3),
    "stats, narrow": stats(triton_rows.STATS_NARROW, 3),
    "stats with entropy": stats(triton_rows.STATS_WIDE, 4),
    "stats with entropy, narrow, not scored": stats(triton_rows.STATS_NARROW, 4, False),
    "dlogits": (
        kernels.dlogits_kernel,
        {"NUM_STATS": 3, "BLOCK": triton_rows.DLOGITS_BLOCK},
        triton_rows.DLOGITS_WARPS,
    ),
    "dlogits with entropy": (
        kernels.dlogits_kernel,
        {"NUM_STATS": 4, "BLOCK": triton_rows.DLOGITS_BLOCK},
        triton_rows.DLOGITS_WARPS,
    ),
    "row, weighted": row(True, ROW),
    "row, rest": row(False, ROW),
    "longest row, weighted": row(True, LONGEST),
    "longest row, rest": row(False, LONGEST),
    "two equal tiles": row(True, {"BLOCK": 8192, "REST": 8192}),
    "row, mostly padding": row(True, ROW, False),
    "join": (kernels.join_kernel, JOIN, 4),
    "join backward": (kernels.join_backward_kernel, {**JOIN, "HAS_LOG_PROBS": True, "HAS_ENTROPY": True}, 4),
    "sums": (kernels.sums_kernel, {"BLOCK": triton_rows.SUMS_BLOCK}, triton_rows.SUMS_WARPS),
    "kl stats": (triton_kl_kernels.kl_stats_kernel, KL, triton_rows.KL_WARPS),
    "jsd stats": (triton_kl_kernels.jsd_stats_kernel, KL, triton_rows.KL_WARPS),
    "kl dlogits": (triton_kl_kernels.kl_dlogits_kernel, {"MIXED": False, **KL}, triton_rows.KL_WARPS),
    "jsd dlogits": (triton_kl_kernels.kl_dlogits_kernel, {"MIXED": True, **KL}, triton_rows.KL_WARPS),
    "copy": (
        triton_copy.copy_kernel,
        {"SOURCE": tl.bfloat16, "TARGET": tl.bfloat16, "ALIGNED": True, "VECTOR": 8, **TILE},
        triton_copy.WARPS,
    ),
    "copy and convert": (
        triton_copy.copy_kernel,
        {"SOURCE": tl.float32, "TARGET": tl.bfloat16, "ALIGNED": False, "VECTOR": 8, **TILE},
        triton_copy.WARPS,
    ),
    "checksum": (
        triton_copy.checksum_kernel,
        {"SOURCE": tl.bfloat16, "TYPE": tl.bfloat16, "BITS": tl.int16, "BLOCK": 1024},
        triton_copy.CHECKSUM_WARPS,
    ),
}
TABLE_SUMS = {"checksum": {"sums": "*i64"}, "jsd stats": {"sums": "*fp32"}}
STRIDES = {"row_stride", "out_stride", "student_stride", "teacher_stride"}
WIDTHS = {"num_columns", "row_columns"}


def compile_case(case, capability, multiples_of_16):
    """Compile as a launch does that finds these integers, and every pointer, to be multiples of 16."""
    kernel, constants, warps = CASES[case]
    types = TYPES | TABLE_SUMS.get(case, {})
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names
    }
    divisible = {name for name, kind in signature.items() if kind.startswith("*")} | multiples_of_16
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name in divisible
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def machine_code(compiled, tmp_path):
    """Disassemble with the reader of csrc/check_sass.py."""
    spec = importlib.util.spec_from_file_location("check_sass", CHECK_SASS)
    check_sass = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check_sass)
    if check_sass.find_tool("nvdisasm") is None:
        pytest.skip("nvdisasm is not installed, neither with Triton nor with CUDA")
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    return check_sass.read_kernels(tmp_path / "kernel.cubin")[0]


@pytest.mark.parametrize(
    ("case", "capability", "aligned"),
    [(case, HOPPER, aligned) for case in CASES for aligned in (True, False)]
    + [
        (case, other, False)
        for case in ("stats", "longest row, rest", "dlogits")
        for other in GENERATIONS
        if other != HOPPER
    ],
)
def test_no_register_spills(case, capability, aligned, tmp_path):
    code = machine_code(compile_case(case, capability, STRIDES | WIDTHS if aligned else set()), tmp_path)
    assert len(code.instructions) > 30
    assert code.spills() == []


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("stats")])
def test_no_loop_loads_two_bytes_at_a_time_whatever_the_number_of_columns(case, tmp_path):
    """The rows are aligned; 151665 columns of 151936 must not make every load of the row a narrow one."""
    code = machine_code(compile_case(case, HOPPER, STRIDES), tmp_path)
    assert code.narrow_loads() == []
    assert any(i.opcode.startswith("LDG") and ".128" in i.opcode for i in code.instructions)


@pytest.mark.parametrize("case", ["dlogits", "dlogits with entropy", "row, weighted", "row, rest"])
def test_full_tiles_are_read_and_written_by_vectors(case, tmp_path):
    code = machine_code(compile_case(case, HOPPER, STRIDES), tmp_path)
    for kind in ("LDG", "STG"):
        assert any(i.opcode.startswith(kind) and ".128" in i.opcode for i in code.instructions), kind


@pytest.mark.parametrize(
    ("case", "num_columns", "most"),
    [("stats", 152064, 8.0), ("stats, narrow", 19008, 8.5)],
    ids=["V", "an eighth of V"],
)
def test_instructions_per_logit(case, num_columns, most, tmp_path):
    """All that a thread issues for a row, its beginning and end included, over the logits it has read
    (Hopper)."""
    _, constants, warps = CASES[case]
    code = machine_code(compile_case(case, HOPPER, STRIDES | WIDTHS), tmp_path)
    per_block, per_step = sorted(code.loops(), key=len)[-2:]
    assert {i.opcode for i in code.instructions[per_step.start : per_step.stop]} >= {"MUFU.EX2"}
    step = constants["BLOCK"] * constants["UNROLL"]
    steps, blocks = num_columns // step, num_columns % step // constants["BLOCK"]
    once = len(code.instructions) - len(per_step) - len(per_block)
    issued = steps * code.common_path(per_step) + blocks * len(per_block) + once
    assert issued / (num_columns / (warps * 32)) <= most


@pytest.mark.parametrize("capability", GENERATIONS)
def test_aligned_copies_use_16_byte_loads_and_stores(capability):
    compiled = compile_case("copy", capability, set())
    assert re.search(r"ld\.global\.v4\.b32|ld\.global\.v2\.b64", compiled.asm["ptx"])
    assert re.search(r"st\.global\.v4\.b32|st\.global\.v2\.b64", compiled.asm["ptx"])
