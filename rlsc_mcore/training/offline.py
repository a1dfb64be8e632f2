"""Take the answers of a step from a file, with their log-probs by the starting weights (the reference
policy).

The reference is computed in one pass over the file before training and written to RUN/reference.jsonl, one
line per record. A resumed run reads that file, so it continues bit for bit.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlsc_mcore.config import ConfigError
from rlsc_mcore.data.packing import pack
from rlsc_mcore.data.questions import Asked
from rlsc_mcore.parallel.groups import Groups
from rlsc_mcore.run.files import write_atomically
from rlsc_mcore.run.folder import REFERENCE_FILE
from rlsc_mcore.training.inputs import RunInputs
from rlsc_mcore.training.step import Trainer
from rlsc_mcore.types import Rollout, UniqueSequence

LogProbs = list[list[list[float]]]  # [record][answer][token]


@dataclass(frozen=True)
class OfflineSource:
    """Hold the answers of an offline objective and their reference log-probs."""

    inputs: RunInputs
    references: LogProbs

    def rollouts(
        self, asked: Sequence[Asked], samples: Sequence[range], policy_version: int
    ) -> list[Rollout]:
        """Return the given answers of each question (`samples`: their positions in the record) as rollouts.

        `engine_log_probs` holds the reference log-probs.
        """
        found = []
        for (index, repeat), share in zip(asked, samples, strict=True):
            record = self.inputs.offline[index]
            found += [
                Rollout(
                    question_index=index,
                    sample_index=repeat * len(record) + position,
                    prompt_ids=tuple(self.inputs.prompts[index]),
                    response_ids=self.inputs.offline_ids[index][position],
                    engine_log_probs=tuple(self.references[index][position]),
                    finish_reason="stop",
                    policy_version=policy_version,
                    text=record[position].text,
                )
                for position in share
            ]
        return found


def open_offline(
    inputs: RunInputs, trainer: Trainer, groups: Groups, run_dir: Path, resume_from: Path | None
) -> OfflineSource | None:
    """Return the source of the run's answers; None for an objective that samples.

    Scores all answers with the trainer's weights and writes the reference, unless the run is resumed.
    Collective over the world. Raises `ConfigError` if the reference of a resumed run is missing or does not
    fit the file of answers.
    """
    if not inputs.offline:
        return None
    if resume_from is None:
        references = _score(inputs, trainer, groups)
    else:
        references = _read(_find(run_dir, resume_from), inputs)
    if groups.is_main:
        lines = "".join(json.dumps(record) + "\n" for record in references)
        write_atomically(run_dir / REFERENCE_FILE, lines)
    return OfflineSource(inputs, references)


def _score(inputs: RunInputs, trainer: Trainer, groups: Groups) -> LogProbs:
    """Score every answer with the current weights; each data-parallel rank scores a part of the records."""
    numbers = [
        (record, position)
        for record, ids in enumerate(inputs.offline_ids)
        for position in range(len(ids))
        if record % groups.dp_size == groups.dp_rank
    ]
    sequences = []
    for record, position in numbers:
        ids = inputs.offline_ids[record][position]
        prompt = tuple(inputs.prompts[record])
        rollout = Rollout(record, position, prompt, ids, (0.0,) * len(ids), "stop", 0)
        sequences.append(UniqueSequence(rollout, record, 1, (True,) * len(ids)))
    options = trainer.config.training
    batches = pack(sequences, options.tokens_per_micro_batch, multiple_of=trainer.token_multiple)
    scored = trainer.token_log_probs(batches)
    found: dict[tuple[int, int], list[float]] = {}
    for batch, log_probs in zip(batches, scored, strict=False):  # only the last pipeline stage has scores
        parts = log_probs[batch.response_mask.to(log_probs.device)].split(list(batch.trained_lengths))
        for sequence, values in zip(batch.sequence_ids.tolist(), parts, strict=True):
            if sequence >= 0:
                found[numbers[sequence]] = values.tolist()
    parts_of_ranks = groups.gather_objects_over_dp(groups.from_last_stage(found))
    everything = {key: values for part in parts_of_ranks for key, values in part.items()}
    return [
        [everything[record, position] for position in range(len(ids))]
        for record, ids in enumerate(inputs.offline_ids)
    ]


def _find(run_dir: Path, checkpoint: Path) -> Path:
    """Return the reference of the run, or of the run that the checkpoint belongs to."""
    files = [run_dir / REFERENCE_FILE, checkpoint.parent.parent / REFERENCE_FILE]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ConfigError(
            f"{files[0]}: no such file: it holds the log-probs of the starting weights, without which an "
            "offline objective cannot go on; bring it back or start a new run"
        )
    return file


def _read(file: Path, inputs: RunInputs) -> LogProbs:
    try:
        references = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        lengths = [[len(values) for values in record] for record in references]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); bring it back or start a new run") from None
    if lengths != [[len(ids) for ids in record] for record in inputs.offline_ids]:
        raise ConfigError(f"{file}: does not fit the answers of data.path; bring back the file of answers")
    return references
