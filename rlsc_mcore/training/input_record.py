"""Record the inputs of a run, and compare them when the run is resumed.

RUN/inputs.json holds the date that prompts may show and one digest per kind of input. A run is resumed only
with the inputs that it started with: other questions, prompts, stop tokens or model files would train and
evaluate something else under the same name. The digests depend on contents only, not on the location of the
files.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rlsc_mcore.config import ConfigError
from rlsc_mcore.data.questions import questions_fingerprint
from rlsc_mcore.model.hf_checkpoint import weight_files
from rlsc_mcore.parallel.groups import Groups
from rlsc_mcore.run.files import write_atomically
from rlsc_mcore.run.folder import INPUTS_FILE
from rlsc_mcore.types import OfflineAnswer, Question

WHOLE_FILE_BYTES = 64 << 20  # of all weight files together; larger ones are sampled
SAMPLE_BYTES = 4096
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
# The option behind each digest, and the kind of input that it sets.
MEANINGS = {
    "questions": "data.path (questions)",
    "answers": "data.path (answers of an offline objective)",
    "reward_function": "algorithm.reward_function (contents of the file)",
    "prompts": "data.template (prompts of the questions)",
    "evaluation_questions": "evaluation.path (questions)",
    "evaluation_prompts": "data.template (prompts of the evaluation)",
    "tokenizer": "model.path (tokenizer files)",
    "stop_token_ids": "model.path (tokens that end an answer)",
    "model_config": "model.path (config.json)",
    "weights": "model.path (weights)",
}


@dataclass(frozen=True)
class InputRecord:
    """Hold the date and the digests of a run's inputs; `digests` has one SHA-256 per name of `MEANINGS`."""

    date: str  # ISO format; the day that a chat template may show
    digests: dict[str, str]


def prompt_date(run_dir: Path | None) -> datetime:
    """Return the day on which the run in `run_dir` started, or today at midnight if there is no run yet.

    Chat templates may show the day. A run that is resumed on another day keeps the day on which it started.
    """
    record = None if run_dir is None else read_record(run_dir)
    if record is not None:
        return datetime.fromisoformat(record.date)
    return datetime.now().replace(hour=0, minute=0, second=0, microsecond=0)


def digest_inputs(
    folder: Path,
    questions: Sequence[Question],
    prompts: Sequence[Sequence[int]],
    evaluation_questions: Sequence[Question],
    evaluation_prompts: Sequence[Sequence[int]],
    stop_token_ids: Sequence[int],
    answers: Sequence[Sequence[OfflineAnswer]] = (),
    reward_function: str = "",
) -> dict[str, str]:
    """Return one digest per name of `MEANINGS`.

    `folder` is the model's folder, `reward_function` the result of `check_reward_function`.
    """
    return {
        "questions": questions_fingerprint(questions),
        "answers": _hash_json([[[one.text, one.advantage] for one in record] for record in answers]),
        "reward_function": _hash_json(reward_function),
        "prompts": _hash_json(list(map(list, prompts))),
        "evaluation_questions": questions_fingerprint(evaluation_questions),
        "evaluation_prompts": _hash_json(list(map(list, evaluation_prompts))),
        "tokenizer": _hash_tokenizer(folder),
        "stop_token_ids": _hash_json(sorted(stop_token_ids)),
        "model_config": _hash_json(json.loads((folder / "config.json").read_text(encoding="utf-8"))),
        "weights": _hash_weights(folder),
    }


def check_unchanged(run_dir: Path, digests: Mapping[str, str]) -> None:
    """Raise `ConfigError` naming every input of the run in `run_dir` that differs from the record."""
    record = read_record(run_dir)
    if record is None:
        return
    changed = [
        meaning
        for name, meaning in MEANINGS.items()
        if record.digests.get(name, digests[name]) != digests[name]
    ]
    if changed:
        raise ConfigError(
            f"{', '.join(changed)} has changed since the run was started: {run_dir} continues only with the "
            "inputs that it "
            "began with; bring them back, or choose another run_dir"
        )


def claim_inputs(run_dir: Path, record: InputRecord, groups: Groups) -> None:
    """Write the record of a new run on the main rank; collective over the world.

    Raises `ConfigError` on every rank if the ranks read different inputs, for example if a file differs
    between nodes.
    """
    first, *others = groups.gather_objects(record)
    differ = next(((rank, other) for rank, other in enumerate(others, start=1) if other != first), None)
    if differ is not None:
        rank, other = differ
        names = [meaning for name, meaning in MEANINGS.items() if other.digests[name] != first.digests[name]]
        raise ConfigError(
            f"{', '.join(names) or 'the date'}: ranks 0 and {rank} read different ones; give every node the "
            "same files"
        )
    if groups.is_main and read_record(run_dir) is None:
        write_atomically(run_dir / INPUTS_FILE, json.dumps(asdict(record), indent=1) + "\n")


def read_record(run_dir: Path) -> InputRecord | None:
    """Read RUN/inputs.json; return None if the file does not exist. Raises `ConfigError` if it is damaged."""
    file = run_dir / INPUTS_FILE
    if not file.is_file():
        return None
    try:
        record = InputRecord(**json.loads(file.read_text(encoding="utf-8")))
        datetime.fromisoformat(record.date)
        return InputRecord(record.date, dict(record.digests))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{file}: not the record of a run's inputs ({error}); restore it or choose another run_dir"
        ) from None


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _hash_tokenizer(folder: Path) -> str:
    """Hash the tokenizer's files without their chat templates, whose effect the prompts show."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        file = folder / name
        if not file.is_file():
            continue
        content = file.read_bytes()
        if name == "tokenizer_config.json":
            settings = json.loads(content)
            settings.pop("chat_template", None)
            content = json.dumps(settings, sort_keys=True).encode()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _hash_weights(folder: Path) -> str:
    """Hash the weight files: whole if they are small together, else header and samples of every tensor."""
    digest = hashlib.sha256()
    files = weight_files(folder)
    whole = sum(file.stat().st_size for file in files) <= WHOLE_FILE_BYTES
    for file in files:
        digest.update(f"{file.stat().st_size}\n".encode())
        for part in _whole(file) if whole else _samples(file):
            digest.update(part)
    return digest.hexdigest()


def _whole(file: Path) -> Iterable[bytes]:
    yield file.read_bytes()


def _samples(file: Path) -> Iterable[bytes]:
    """Yield the header, then `SAMPLE_BYTES` at the start, middle and end of every tensor."""
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        header = content.read(length)
        yield header
        for name, entry in sorted(json.loads(header).items()):
            if name == "__metadata__":
                continue
            start, stop = entry["data_offsets"]
            for place in (start, (start + stop) // 2, max(start, stop - SAMPLE_BYTES)):
                content.seek(8 + length + place)
                yield content.read(min(SAMPLE_BYTES, stop - place))
