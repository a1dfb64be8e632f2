"""Read a run's folder with pandas: `python examples/read_run.py RUN`."""

import sys
from pathlib import Path

import pandas


def main() -> None:
    """Print the course of the training and the accuracy of the evaluated answers by temperature."""
    run = Path(sys.argv[1])
    metrics = pandas.read_json(run / "metrics.jsonl", lines=True)
    print(
        metrics[["step", "loss", "f_estimate", "mean_length", "distinct_share", "grad_norm"]].to_string(
            index=False
        )
    )
    for name in ("before", "after"):
        file = run / "evaluation" / f"{name}.answers.jsonl"
        if file.is_file():
            answers = pandas.read_json(file, lines=True)
            print(f"\n{name}:")
            print(
                answers.groupby("temperature")[["strict", "lenient", "boxed", "tokens"]]
                .mean()
                .round(3)
                .to_string()
            )


if __name__ == "__main__":
    main()
