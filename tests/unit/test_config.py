"""The configuration: what goes in comes out, and every wrong value is refused by its field's name."""

import ast
import contextlib
import dataclasses
import io
import math
import re
import string
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rlsc_mcore
from rlsc_mcore.config import LORA_TARGETS, Config, ConfigError
from rlsc_mcore.config_file import changed_fields, dump_config, load_config, parse_config, read_flags
from rlsc_mcore.data.packing import trains_truncated

REQUIRED = ["--run-dir", "run", "--model.path", "model", "--data.path", "data"]
PACKAGE = Path(rlsc_mcore.__file__).parent
OPTION_NAMES = Path(__file__).with_name("option_names.txt")
# Ranges that `Config` itself refuses; everything else is drawn from a field's declared type.
RANGES: dict[str, st.SearchStrategy[Any]] = {
    "rollout.temperature": st.floats(1e-2, 10),
    "rollout.top_p": st.floats(0.01, 1),
    "rollout.tp": st.none(),  # must fit parallel.tp: see the combinations below
    "rollout.kv_cache_gib": st.none() | st.floats(1e-3, 100),
    "algorithm.alpha": st.floats(0, 100),
    "algorithm.clip_low": st.floats(0.01, 1),
    "algorithm.clip_high": st.floats(0.01, 10),
    "algorithm.kl": st.floats(0, 10),
    "algorithm.reward_function": st.none(),  # only with an objective that has a reward
    "algorithm.dpo_beta": st.floats(0.001, 10),
    "algorithm.dpo_nll": st.floats(0, 10),
    "algorithm.objective": st.sampled_from(["rlsc", "self_sft", "rlvr"]),  # entropy refuses several updates
    "rollout.num_samples": st.integers(2, 100),  # rlvr compares samples
    "rollout.num_trained": st.none(),  # at most num_samples
    "training.keep_best": st.sampled_from(["none", "boxed_share"]),  # f_estimate is null for some
    "lora.rank": st.just(0),  # wants other options with it: see tests/distributed/test_lora.py
    "lora.alpha": st.floats(1e-3, 1e3),
    "lora.targets": st.lists(st.sampled_from(LORA_TARGETS), min_size=1, unique=True).map(tuple),
    "optimizer.lr": st.floats(1e-12, 1),
    "optimizer.min_lr": st.just(0.0) | st.just(1e-12),
    "optimizer.beta1": st.floats(0, 0.9999),
    "optimizer.beta2": st.floats(0, 0.9999),
    "optimizer.eps": st.floats(1e-12, 1),
    "optimizer.weight_decay": st.floats(0, 1),
    "optimizer.clip_grad": st.floats(0, 10),
    "parallel.hang_timeout_s": st.floats(1e-3, 1e6),
    "algorithm.kl_start": st.just(0.0),  # the next three want an objective with a reward
    "algorithm.overlong_tokens": st.just(0),
    "algorithm.drop_groups": st.just(False),
    "algorithm.nsd_kl": st.floats(0, 10),
    "algorithm.careless_prompt": st.sampled_from(["{question}", "Guess: '{question}' # now"]),
    "distill.min_share": st.floats(0, 1),
    "distill.clip": st.floats(1e-3, 1e3),
    "distill.penalty": st.just(0.0),
    "distill.prompt": st.sampled_from(["{question}\n\n{solution}", "# {solution}: '{question}'"]),
    "training.stop_on": st.lists(st.sampled_from(["loss<0.5x", "same_answer_share>0.5"]), max_size=2).map(
        tuple
    ),
    "optimizer.grad_dtype": st.just("float32"),
    "optimizer.cpu_offload": st.just(0.0),
    "optimizer.precision_aware": st.just(
        False
    ),  # what wants another option with it: see the combinations below
    "parallel.overlap_param_gather": st.just(False),
    "parallel.stage_layers": st.none(),
    "data.template": st.sampled_from(["chat", "none", "qwen25-math", "mine.jinja"]),
    "rollout.max_model_len": st.none() | st.integers(2, 10**6),
    "evaluation.temperatures": st.lists(st.floats(1e-2, 10), max_size=3, unique=True).map(tuple),
    "evaluation.top_p": st.floats(0.01, 1),
    "evaluation.stop": st.lists(st.sampled_from(["\n\n", "Question:", "</s>"]), max_size=2).map(tuple),
    "evaluation.max_questions": st.none() | st.integers(1, 10**6),
    "observability.max_log_prob_gap": st.none() | st.floats(1e-9, 10),
}
# Text that a YAML reader would take for something else, and text with every kind of character.
TEXT = st.sampled_from(
    [
        "null",
        "true",
        "no",
        "1e-5",
        "0x10",
        "~",
        "- a",
        "a: b",
        "# x",
        "'",
        '"',
        "--tp",
        "a b",
        "ä\u2028",
        "{x}",
        "*",
    ]
) | st.text(string.ascii_letters + string.digits + "/._- :#'\"\\", min_size=1, max_size=20)


GIVEN = ("model.path", "data.path", "data.split", "run_dir")  # texts that must not be blank


def leaves(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every option as (dotted name, type)."""
    hints = typing.get_type_hints(kind)
    for entry in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[entry.name]):
            yield from leaves(hints[entry.name], f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, hints[entry.name]


def values_of(name: str, kind: Any) -> st.SearchStrategy[Any]:
    if name in RANGES:
        return RANGES[name]
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(typing.get_args(kind))
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return st.none() | values_of(
            name, next(option for option in kind.__args__ if option is not type(None))
        )
    text = TEXT.filter(lambda text: text != "None")
    if name in GIVEN:
        text = text.filter(lambda text: bool(text.strip()))
    return {bool: st.booleans(), int: st.integers(1, 10**9), str: text}[kind]


@st.composite
def configs(draw: Any) -> Config:
    def build(kind: Any, prefix: str) -> Any:
        hints = typing.get_type_hints(kind)
        values = {}
        for entry in dataclasses.fields(kind):
            hint, name = hints[entry.name], prefix + entry.name
            values[entry.name] = (
                build(hint, name + ".") if dataclasses.is_dataclass(hint) else draw(values_of(name, hint))
            )
        return kind(**values)

    return build(Config, "")


@settings(max_examples=25, deadline=None)
@given(config=configs())
def test_a_dumped_configuration_loads_back_equal(
    config: Config, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(file) == config


GATHER = ["--parallel.overlap-param-gather", "True"]
REDUCE = ["--parallel.overlap-grad-reduce", "True"]
PRECISE = ["--optimizer.precision-aware", "True"]


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        (GATHER, "parallel.overlap_param_gather: expected parallel.overlap_grad_reduce with it"),
        ([*GATHER, *REDUCE], None),
        (
            [*GATHER, *REDUCE, "--optimizer.distributed", "False"],
            "parallel.overlap_param_gather: expected optimizer.distributed with it",
        ),
        (PRECISE, None),
        (
            [*PRECISE, "--optimizer.distributed", "False"],
            "optimizer.precision_aware: expected optimizer.distributed with it",
        ),
        (
            [*PRECISE, "--model.dtype", "float32"],
            "optimizer.precision_aware: expected model.dtype bfloat16 with it",
        ),
        (
            ["--parallel.tp", "4", "--rollout.tp", "3"],
            "rollout.tp: expected a divisor or a multiple of parallel.tp = 4 (1, 2, 4, 8, ...), got 3",
        ),
        (["--parallel.pp", "2", "--parallel.stage-layers", "3", "5"], None),
        (
            ["--parallel.pp", "3", "--parallel.stage-layers", "3", "5"],
            "parallel.stage_layers: expected parallel.pp = 3 numbers",
        ),
        (
            ["--parallel.pp", "2", "--parallel.stage-layers", "8", "0"],
            "parallel.stage_layers: expected parallel.pp = 2 numbers",
        ),
        (["--parallel.pp", "0"], "parallel.pp: expected at least 1, got 0"),
    ],
)
def test_options_that_want_another_with_them(flags: list[str], refused: str | None) -> None:
    if refused is None:
        parse_config([*REQUIRED, *flags])
        return
    with pytest.raises(ConfigError, match="^" + re.escape(refused)):
        parse_config([*REQUIRED, *flags])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--algorithm.objective", "majority_vote"], 64),
        (["--algorithm.objective=majority_vote"], 64),
        (["--algorithm.objective", "majority_vote", "--rollout.num-samples", "8"], 8),
        (["--rollout.num-samples", "8", "--algorithm.objective", "majority_vote"], 8),
        (["--algorithm.objective", "majority_vote", "--algorithm.objective", "rlsc"], 16),
        ([], 16),
    ],
)
def test_ttrl_votes_with_its_authors_number_unless_told_otherwise(flags: list[str], expected: int) -> None:
    config = parse_config([*REQUIRED, *flags])
    assert config.rollout.num_samples == expected
    assert parse_config([*REQUIRED, *flags]) == config


def test_option_names_are_frozen() -> None:
    """A renamed option breaks every user's file: change the list on purpose or not at all."""
    names = sorted(name for name, _ in leaves(Config))
    assert names == OPTION_NAMES.read_text(encoding="utf-8").split()


def test_every_option_is_read_outside_the_configuration() -> None:
    """An option that nothing reads would change nothing."""
    read = set()
    for file in PACKAGE.rglob("*.py"):
        if file.parent != PACKAGE / "config":
            read |= {
                node.attr
                for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
                if isinstance(node, ast.Attribute)
            }
    assert {name for name, _ in leaves(Config) if name.split(".")[-1] not in read} == set()


def test_every_option_has_a_flag_and_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_config(["--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    documented = set()
    sources = [file.read_text(encoding="utf-8") for file in (PACKAGE / "config").glob("*.py")]
    for node in [node for source in sources for node in ast.walk(ast.parse(source))]:
        if isinstance(node, ast.ClassDef):
            for field, text in zip(node.body, node.body[1:], strict=False):
                if (
                    isinstance(field, ast.AnnAssign)
                    and isinstance(text, ast.Expr)
                    and isinstance(field.target, ast.Name)
                ):
                    documented.add(field.target.id)
    for name, _ in leaves(Config):
        assert "--" + name.replace("_", "-") in shown
        assert name.split(".")[-1] in documented, f"{name} has no docstring"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run_dir", ""),
        ("run_dir", "None"),
        ("model.path", ""),
        ("model.path", "None"),
        ("data.path", ""),
        ("data.path", " "),
        ("data.split", "None"),
        ("data.questions_per_step", "0"),
        ("rollout.num_samples", "0"),
        ("rollout.temperature", "0"),
        ("rollout.temperature", "-0.5"),
        ("rollout.temperature", "0.002"),
        ("rollout.temperature", "0.00999"),
        ("rollout.temperature", "nan"),
        ("rollout.temperature", "inf"),
        ("rollout.top_p", "0"),
        ("rollout.top_p", "1.01"),
        ("rollout.max_new_tokens", "0"),
        ("rollout.max_model_len", "1"),
        ("rollout.max_num_seqs", "0"),
        ("rollout.max_num_batched_tokens", "0"),
        ("rollout.kv_cache_gib", "0"),
        ("algorithm.alpha", "-0.1"),
        ("algorithm.alpha", "nan"),
        ("algorithm.alpha", "inf"),
        ("optimizer.lr", "0"),
        ("optimizer.lr", "inf"),
        ("optimizer.beta1", "1"),
        ("optimizer.beta2", "-0.1"),
        ("optimizer.eps", "0"),
        ("optimizer.weight_decay", "-1"),
        ("optimizer.clip_grad", "-1"),
        ("optimizer.warmup_steps", "-1"),
        ("optimizer.min_lr", "1"),
        ("parallel.tp", "0"),
        ("training.num_steps", "0"),
        ("training.seed", "-1"),
        ("training.tokens_per_micro_batch", "0"),
        ("training.save_every", "-1"),
        ("training.keep_last", "0"),
        ("evaluation.num_samples", "0"),
        ("evaluation.temperatures", "0"),
        ("evaluation.temperatures", "0.001"),
        ("evaluation.temperatures", "nan"),
        ("evaluation.max_questions", "0"),
        ("observability.max_log_prob_gap", "-1"),
        ("observability.max_mismatched_steps", "-1"),
    ],
)
def test_a_value_out_of_range_names_its_field(field: str, value: str) -> None:
    flag = "--" + field.replace("_", "-")
    with pytest.raises(ConfigError, match=rf"^{field.replace('.', '[.]')}: expected .*, got ") as error:
        parse_config([*REQUIRED, f"{flag}={value}"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--optimzer.lr", "1"], "--optimzer.lr"),
        (["--optimizer.lr", "fast"], "--optimizer.lr"),
        (["--data.questions-per-step", "1.5"], "--data.questions-per-step"),
        (["--algorithm.confidence", "entropy"], "--algorithm.confidence"),
        (["--data.shuffle", "maybe"], "--data.shuffle"),
        (["--ops.backend"], "--ops.backend"),
    ],
)
def test_a_flag_that_does_not_parse_is_named_in_one_line(flags: list[str], named: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config([*REQUIRED, *flags])
    assert named in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_flag_suggests_the_known_one() -> None:
    with pytest.raises(ConfigError, match=r"perhaps you meant --optimizer\.lr$"):
        parse_config([*REQUIRED, "--optimzer.lr", "1"])


@pytest.mark.parametrize("missing", ["--run-dir", "--model.path", "--data.path"])
def test_a_missing_field_is_named(missing: str) -> None:
    position = REQUIRED.index(missing)
    with pytest.raises(ConfigError, match=f"^missing {missing}$"):
        parse_config(REQUIRED[:position] + REQUIRED[position + 2 :])


def test_refusals_read_the_same_where_output_is_not_utf8() -> None:
    """tyro then draws its frame in ASCII."""
    for flags, named in (
        (
            [*REQUIRED, "--optimzer.lr", "1"],
            "Unrecognized options: --optimzer.lr, 1; perhaps you meant --optimizer.lr",
        ),
        (
            [*REQUIRED, "--optimizer.lr", "fast"],
            "Error parsing --optimizer.lr: could not convert string to float: 'fast'",
        ),
        (REQUIRED[2:], "missing --run-dir"),
    ):
        with contextlib.redirect_stdout(io.StringIO()), pytest.raises(ConfigError) as error:
            parse_config(flags)
        assert str(error.value) == named


def test_a_later_flag_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "run_dir: a\nmodel: {path: m}\ndata: {path: d, questions_per_step: 3}\noptimizer:\n  lr: 1e-5\n",
        encoding="utf-8",
    )
    config = load_config(file, ["--optimizer.lr", "2e-5", "--optimizer.lr", "3e-5"])
    assert (config.optimizer.lr, config.data.questions_per_step, config.run_dir) == (3e-5, 3, "a")
    assert load_config(file).optimizer.lr == 1e-5  # PyYAML alone reads 1e-5 as text


def test_defaults_are_the_papers() -> None:
    config = parse_config(REQUIRED)
    assert (config.rollout.num_samples, config.rollout.temperature, config.rollout.max_new_tokens) == (
        16,
        0.5,
        3072,
    )
    assert (config.algorithm.alpha, config.algorithm.confidence, config.algorithm.objective) == (
        0.1,
        "sequence",
        "rlsc",
    )
    assert config.optimizer.lr == 1e-5


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("model: {path: m\n", "line 2"),
        ("- a\n- b\n", "expected a mapping"),
        ("just words\n", "expected a mapping"),
        ("", "expected a mapping"),
        (b"\xff\xfe\x00", "not a YAML file"),
        ("a: !!python/object/apply:os.system [ls]\nb: [", "not a YAML file"),
    ],
)
def test_a_bad_file_is_named_with_its_reason(tmp_path: Path, text: str | bytes, reason: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=reason) as error:
        read_flags(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


WHOLE = "run_dir: a\nmodel: {path: m}\ndata: {path: d}\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("optimizer:\n  eps: 1e-3\noptimizer:\n  lr: 1e-4\n", "line 6: optimizer stands on line 4 already"),
        (
            "optimizer:\n  lr: 1e-3\n  eps: 1e-6\n  lr: 1e-4\n",
            "line 7: optimizer.lr stands on line 5 already",
        ),
        ("training: {num_steps: 3, num-steps: 4}\n", "line 4: training.num_steps stands on line 4 already"),
        ("optimizer: {lr: 1e-3}\noptimizer.lr: 1e-4\n", "line 5: optimizer.lr stands on line 4 already"),
        ("run_dir: b\n", "line 4: run_dir stands on line 1 already"),
        ("optimizer: {<<: {lr: 1e-3}}\n", "line 4: merge keys (<<) are not read"),
        ("optimizer: &o {lr: 1e-3, x: *o}\n", "line 4: x: nested too deeply for an option"),
        ("evaluation: {temperatures: [[0.5], 1.0]}\n", "line 4: temperatures: expected a list of values"),
        ("? [a, b]\n: 1\n", "line 4: expected the name of an option, got a sequence"),
        ("--- \nrun_dir: b\n", "expected a single document"),
    ],
)
def test_what_is_written_twice_or_is_no_option_is_refused_with_its_line(
    tmp_path: Path, text: str, reason: str
) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text(WHOLE + text, encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(reason)) as error:
        load_config(file)
    assert str(error.value).startswith(f"--config {file}") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["run_dir: null\n", "run_dir: ~\n", "run_dir:\n", "run_dir: Null\n", 'run_dir: ""\n']
)
def test_a_required_text_that_is_null_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "null.yaml"
    file.write_text(text + "model: {path: m}\ndata: {path: d}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^run_dir: expected a folder for the run"):
        load_config(file)


def test_a_section_whose_options_are_all_commented_out_is_empty(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("\ufeff" + WHOLE + "optimizer:\n  # lr: 1\nevaluation: null\n", encoding="utf-8")
    assert load_config(file) == parse_config(["--run-dir", "a", "--model.path", "m", "--data.path", "d"])


def test_an_anchor_of_a_value_is_read(tmp_path: Path) -> None:
    file = tmp_path / "anchor.yaml"
    file.write_text(WHOLE + "optimizer: {lr: &rate 1e-4, min_lr: *rate}\n", encoding="utf-8")
    config = load_config(file)
    assert config.optimizer.lr == config.optimizer.min_lr == 1e-4


def test_temperatures_that_repeat_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^evaluation\.temperatures: expected different ones, got \(0\.5, 0\.5\)"
    ):
        parse_config([*REQUIRED, "--evaluation.temperatures", "0.5", "0.5"])


def test_the_coldest_temperature_is_the_engines() -> None:
    from rlsc_mcore.config import LOWEST_TEMPERATURE

    sampling_params = pytest.importorskip("vllm.sampling_params")
    kept = sampling_params.SamplingParams(temperature=LOWEST_TEMPERATURE).temperature
    raised = sampling_params.SamplingParams(temperature=0.9 * LOWEST_TEMPERATURE).temperature
    assert (
        kept
        == raised
        == LOWEST_TEMPERATURE
        == parse_config([*REQUIRED, "--rollout.temperature", "0.01"]).rollout.temperature
    )


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such file"):
        load_config(tmp_path / "absent.yaml")


def test_yaml_never_runs_code(tmp_path: Path) -> None:
    file, witness = tmp_path / "code.yaml", tmp_path / "witness"
    file.write_text(f"run_dir: !!python/object/apply:os.mkdir ['{witness}']\n", encoding="utf-8")
    flags = read_flags(file)
    assert not witness.exists()
    assert flags == ["--run-dir", str(witness)]  # plain text to us


def test_an_unknown_key_of_a_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "unknown.yaml"
    file.write_text(
        "run_dir: a\nmodel: {path: m}\ndata: {path: d}\nrollout: {temprature: 0.5}\n", encoding="utf-8"
    )
    with pytest.raises(ConfigError, match=r"--rollout\.temprature"):
        load_config(file)


def test_changed_fields_names_each_difference() -> None:
    old = parse_config(REQUIRED)
    new = parse_config(
        [*REQUIRED, "--optimizer.lr", "2e-5", "--evaluation.temperatures", "0.7", "--run-dir", "b"]
    )
    assert changed_fields(old, old) == []
    assert changed_fields(old, new) == [
        "run_dir: 'run' -> 'b'",
        "optimizer.lr: 1e-05 -> 2e-05",
        "evaluation.temperatures: (0.5, 1.0) -> (0.7,)",
    ]


def test_a_configuration_cannot_be_changed_in_place() -> None:
    config = parse_config(REQUIRED)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.optimizer.lr = math.pi  # type: ignore[misc]


@pytest.mark.parametrize(
    "file", sorted((PACKAGE.parent / "configs").glob("*.yaml")), ids=lambda file: file.name
)
def test_shipped_configurations_load_and_hold_differences_only(file: Path) -> None:
    config = load_config(file)
    defaults = parse_config(
        ["--run-dir", config.run_dir, "--model.path", config.model.path, "--data.path", config.data.path]
    )
    changed = {line.split(":")[0] for line in changed_fields(defaults, config)}
    written = {flag[2:].split("=")[0].replace("-", "_") for flag in read_flags(file) if flag.startswith("--")}
    # A value that repeats a default may stay where it is the point of the file (it follows another version of
    # the paper).
    assert changed <= written
    assert {"run_dir", "model.path", "data.path"} <= written


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], True),
        (["--algorithm.log-prob-temperature", "1.0"], False),
        (["--algorithm.log-prob-temperature", "1.0", "--rollout.temperature", "1.0"], True),
        (["--rollout.top-p", "0.9"], False),
    ],
)
def test_f_is_estimated_only_from_samples_of_the_trained_softmax(flags: list[str], expected: bool) -> None:
    assert parse_config([*REQUIRED, *flags]).estimates_f == expected
    keep = [*REQUIRED, *flags, "--training.keep-best", "f_estimate"]
    if expected:
        parse_config(keep)
    else:
        with pytest.raises(ConfigError, match=r"training\.keep_best: .*f_estimate is null"):
            parse_config(keep)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], True),
        (["--algorithm.confidence", "token"], False),
        (["--algorithm.confidence", "length_normalized"], False),
        (["--algorithm.confidence", "group_softmax"], True),
        (["--algorithm.confidence", "token", "--algorithm.train-truncated", "True"], True),
        (["--algorithm.train-truncated", "False"], False),
        (["--algorithm.confidence", "token", "--algorithm.objective", "self_sft"], True),
    ],
)
def test_cut_answers_are_not_trained_where_a_loop_has_the_largest_weight(
    flags: list[str], expected: bool
) -> None:
    assert trains_truncated(parse_config([*REQUIRED, *flags]).algorithm) == expected
