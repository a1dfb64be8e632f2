"""Published results of arXiv 2506.06395, table 2, and the protocol of each column.

The protocol is inferred from the numbers. AMC23 has 40 questions and its values are multiples of 1/320, so
they are means of 8 answers. GPQA is Evalchemy's mean of 3 answers. The other columns use one answer per
question.
"""

from dataclasses import dataclass

# Benchmarks of the paper's table, in its order.
COLUMNS = ("aime24", "math500", "amc23", "gsm8k", "minerva", "olympiad", "mmlu_stem", "gpqa_diamond")
# Accuracy in percent from version 3 of the paper, by size, row and column.
PAPER: dict[str, dict[str, dict[str, float]]] = {
    size: {row: dict(zip(COLUMNS, values, strict=True)) for row, values in rows.items()}
    for size, rows in {
        "1.5b": {
            "base": (3.3, 35.6, 34.7, 73.8, 11.4, 21.6, 34.1, 19.2),
            "rlsc": (6.7, 62.4, 46.2, 74.6, 26.1, 29.9, 48.6, 15.8),
        },
        "7b": {
            "base": (13.3, 51.4, 45.0, 84.3, 10.7, 15.1, 52.3, 21.4),
            "rlsc": (26.7, 72.6, 54.7, 86.3, 32.4, 35.9, 57.6, 24.1),
        },
    }.items()
}
# Benchmarks of our table. AIME25 is not in the paper: unlike AIME24, nothing was trained on it.
SHOWN_COLUMNS = ("aime24", "aime25", *COLUMNS[1:])
# The paper trains on these questions, so their scores do not measure generalization.
TRAINED_ON = ("aime24", "embedded:train")


@dataclass(frozen=True)
class Protocol:
    """The benchmarks and the `rlsc eval` options of one evaluation."""

    name: str
    benchmarks: tuple[str, ...]
    num_samples: int = 0  # answers per question at `temperature`; 0: only one greedy answer
    temperature: float = 0.0
    template: str | None = None  # None: the templates of the size
    few_shot: int = 0
    base_only: bool = False
    column: bool = True  # shown in the main table; False: shown in a separate table
    note: str = ""

    @property
    def options(self) -> tuple[str, ...]:
        """Return the options of `rlsc eval` except benchmarks and templates."""
        sampling = (
            ("--k", str(self.num_samples), "--temperatures", f"{self.temperature:g}")
            if self.num_samples
            else ("--temperatures",)
        )
        return (*sampling, *(("--few-shot", str(self.few_shot)) if self.few_shot else ()))


PASS_AT_K = 64
LOWER_TEMPERATURES = (0.1, 0.25, 0.5, 0.7, 1.0)
PROTOCOLS = (
    Protocol(
        "one_answer",
        ("aime24", "aime25", "math500", "gsm8k", "minerva", "olympiad"),
        note="one greedy answer",
    ),
    Protocol("amc23", ("amc23",), 8, 0.7, note="mean of 8 answers at T = 0.7"),
    Protocol("mmlu_stem", ("mmlu_stem",), few_shot=5, note="one greedy answer after 5 examples"),
    Protocol(
        "gpqa_diamond",
        ("gpqa_diamond",),
        3,
        0.7,
        "chat",
        note="mean of 3 answers at T = 0.7, Evalchemy's prompt",
    ),
    Protocol(
        "pass_at_k",
        ("aime24", "aime25", "amc23", "math500"),
        PASS_AT_K,
        0.5,
        column=False,
        note=f"pass@k to k = {PASS_AT_K} at T = 0.5",
    ),
    *(
        Protocol(
            f"temperature_{t:g}".replace(".", "p"),
            ("aime24", "math500"),
            4,
            t,
            base_only=True,
            column=False,
            note=f"mean of 4 answers at T = {t:g}",
        )
        for t in LOWER_TEMPERATURES
    ),
)
# Small protocols for a trial of the chain on a CPU.
TINY_PROTOCOLS = (
    Protocol("one_answer", ("embedded:train",), note="one greedy answer"),
    Protocol(
        "mean_of_2",
        ("embedded:validation",),
        2,
        0.7,
        "evalchemy-chat",
        note="mean of 2 answers at T = 0.7, Evalchemy's prompt",
    ),
    Protocol("pass_at_k", ("embedded:validation",), 4, 0.5, column=False, note="pass@k to k = 4 at T = 0.5"),
    Protocol(
        "temperature_0p25",
        ("embedded:validation",),
        2,
        0.25,
        base_only=True,
        column=False,
        note="mean of 2 answers at T = 0.25",
    ),
)

# Trained variants: the paper's recipe, ablations of its parts, and controls. Each is trained with every seed.
ARMS: dict[str, tuple[str, ...]] = {
    "rlsc": (),
    # With log p at the sampling temperature, the alpha term has no direction: the expected update with equal
    # weights is 0.
    "rlsc_log_p_at_1": ("--algorithm.log-prob-temperature", "1.0"),
    "rlsc_length_normalized": ("--algorithm.confidence", "length_normalized"),
    "self_sft": ("--algorithm.objective", "self_sft"),
    "self_sft_log_p_at_1": ("--algorithm.objective", "self_sft", "--algorithm.log-prob-temperature", "1.0"),
    "shuffled_weights": ("--algorithm.objective", "rlsc_shuffled", "--algorithm.log-prob-temperature", "1.0"),
    "box_reward": ("--algorithm.objective", "format"),
    "random_reward": ("--algorithm.objective", "random"),
}
STEPS = (10, 20, 40)
SEEDS = (0, 1, 2)
