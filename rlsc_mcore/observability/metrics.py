"""Write one row per step to metrics.jsonl, TensorBoard and trackers; check the rows for alarms."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import time
from typing import Any

from rlsc_mcore.observability.step_metrics import DESCRIPTIONS, numbers
from rlsc_mcore.observability.trackers import Tracker
from rlsc_mcore.run.files import row_from_json, row_to_json
from rlsc_mcore.run.folder import METRICS_FILE

LENGTH_COLLAPSE_SHARE = 0.5  # alarm if the mean length is below this fraction of the first step's
DIVERSITY_LOSS_SHARE = 0.5  # alarm: distinct answers below this fraction of the first step's while F doubled
TRUNCATED_ALARM_SHARE = 0.9


class MetricsWriter:
    """Append steps to metrics.jsonl, TensorBoard and trackers on the main rank; keep the rows in memory."""

    def __init__(
        self,
        run_dir: Path,
        *,
        first_step: int,
        enabled: bool,
        tensorboard: bool,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        """Keep the rows of steps before `first_step`; rewrite the file atomically without later rows.

        Later rows come from an interrupted attempt; TensorBoard drops its events of those steps too.
        `trackers` (from `open_trackers`) receive the same numbers, and `close` finishes them.
        """
        self.file = run_dir / METRICS_FILE
        self.rows = [row for row in read_metrics(run_dir) if row["step"] < first_step]
        self._enabled = enabled
        self._events: Any = None
        self._trackers = trackers
        if not enabled:
            return
        partial = self.file.with_suffix(".partial")
        partial.write_text("".join(row_to_json(row) + "\n" for row in self.rows), encoding="utf-8")
        os.replace(partial, self.file)
        if tensorboard:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.summary.writer.event_file_writer import EventFileWriter

            self._events, self._event_type = EventFileWriter(str(run_dir / "tensorboard")), Event
            start = SessionLog(status=SessionLog.START)
            self._events.add_event(Event(step=first_step, wall_time=time(), session_log=start))
            self._events.flush()

    def write(self, row: dict[str, Any]) -> None:
        """Append the row of one step, made by `StepMetrics.row`."""
        self.rows.append(row)
        if not self._enabled:
            return
        with self.file.open("a", encoding="utf-8") as out:
            out.write(row_to_json(row) + "\n")
        if self._events is not None:
            self._write_events(row)
        for tracker in self._trackers:
            tracker.log(dict(numbers(row)), step=row["step"])

    def close(self) -> None:
        """Flush the TensorBoard events and end the runs of the trackers."""
        if self._events is not None:
            self._events.close()
        for tracker in self._trackers:
            tracker.finish()

    def _write_events(self, row: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=name, simple_value=value, metadata=_metadata(name))
            for name, value in numbers(row)
        ]
        self._events.add_event(self._event_type(step=row["step"], summary=Summary(value=values)))
        self._events.flush()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Read the rows of a run up to the first line that is not JSON (an incomplete last line)."""
    file = run_dir / METRICS_FILE
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            rows.append(row_from_json(line))
        except ValueError:
            break
    return rows


def alarms(row: Mapping[str, Any], first: Mapping[str, Any], *, ends: bool = True) -> list[str]:
    """Return a message for each alarm of a step: length collapse, diversity loss, truncated answers.

    `first` is the run's first row. `ends`: whether the model has a known end-of-answer token.
    """
    found = []
    if row["mean_length"] < LENGTH_COLLAPSE_SHARE * first["mean_length"]:
        found.append(
            f"length collapse: answers average {row['mean_length']:.1f} tokens, {first['mean_length']:.1f} "
            "at the first step"
        )
    if (
        None not in (row["f_estimate"], first["f_estimate"])
        and row["f_estimate"] > 2 * first["f_estimate"]
        and row["distinct_share"] < DIVERSITY_LOSS_SHARE * first["distinct_share"]
    ):
        found.append(
            f"diversity loss: F rose from {first['f_estimate']:.3g} to {row['f_estimate']:.3g} while "
            "distinct answers fell "
            f"from {first['distinct_share']:.0%} to {row['distinct_share']:.0%}"
        )
    if row["truncated_share"] > TRUNCATED_ALARM_SHARE:
        cut = f"{row['truncated_share']:.0%} of the answers were cut at rollout.max_new_tokens: "
        unended = "no token is known to end an answer, name it as eos_token_id in generation_config.json"
        found.append(cut + ("raise it" if ends else unended))
    return found


def signal_warnings(row: Mapping[str, Any], *, reads_boxes: bool, has_advantages: bool) -> list[str]:
    """Return a message if a step taught nothing: no answer is boxed, or no answer carries a weight.

    `reads_boxes`: whether the objective compares boxed answers only. `has_advantages`: whether its weights
    are advantages, so that `effective_samples` 0 means that nothing was trained.
    """
    if has_advantages and row["effective_samples"]:
        return []
    if reads_boxes and not row["boxed_share"]:
        return [
            "nothing to learn: no answer has a \\boxed{}, so no answer can be compared or rewarded; ask for a box "
            "(data.template), or set algorithm.rewards to any"
        ]
    if not has_advantages:
        return []
    return [
        "nothing to learn: all answers to each question earn the same reward; raise rollout.num_samples or "
        "rollout.temperature, or take other questions"
    ]


def _metadata(name: str) -> Any:
    """Return the label and help text that TensorBoard shows for a curve, or None."""
    from tensorboard.compat.proto.summary_pb2 import SummaryMetadata

    description = DESCRIPTIONS.get(name)
    if description is None:
        return None
    return SummaryMetadata(display_name=description.label, summary_description=description.help)
