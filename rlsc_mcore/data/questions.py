"""Read questions from a file, an embedded set or the hub, and select the questions of each step."""

import codecs
import hashlib
import importlib.resources
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlsc_mcore.config import ConfigError
from rlsc_mcore.data.records import read_question
from rlsc_mcore.types import Question

Asked = tuple[int, int]  # question index, number of its earlier occurrences in the step
EMBEDDED_PREFIX = "embedded:"
EMBEDDED_SETS = ("train", "validation", "test")

_FILE_SUFFIXES = (
    ".jsonl",
    ".json",
    ".ndjson",
    ".txt",
    ".parquet",
    ".csv",
    ".tsv",
    ".gz",
    ".zip",
    ".zst",
    ".xz",
    ".bz2",
    ".arrow",
)
_PANDAS = "python -c \"import pandas; pandas.read_parquet('IN').to_json('OUT.jsonl', orient='records', lines=True)\""
# First bytes of files that are not JSONL -> their format, and how to convert them to JSONL.
_OTHER_FORMATS = (
    (b"PAR1", "a Parquet file", f"convert it: {_PANDAS}"),
    (b"\x1f\x8b", "gzip-compressed", "unpack it: gunzip --keep IN"),
    (b"PK\x03\x04", "a zip archive (or an Excel workbook)", "unpack it: unzip IN, or save the sheet as JSON"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed", "unpack it: zstd --decompress IN"),
    (b"\xfd7zXZ", "xz-compressed", "unpack it: xz --decompress --keep IN"),
    (b"BZh", "bzip2-compressed", "unpack it: bunzip2 --keep IN"),
    (b"ARROW1", "an Arrow file", "convert it with datasets: Dataset.from_file('IN').to_json('OUT.jsonl')"),
    (
        b"\xff\xff\xff\xff",
        "an Arrow stream",
        "convert it with datasets: Dataset.from_file('IN').to_json('OUT.jsonl')",
    ),
    (b"SQLite format 3", "an SQLite data base", "write its rows as JSON, one object per line"),
    (b"\x89HDF", "an HDF5 file", "write its rows as JSON, one object per line"),
    (b"version https://git-lfs", "a Git LFS pointer, not the data", "fetch the file itself: git lfs pull"),
    (b"<!DOCTYPE", "a web page", "download the file itself"),
    (b"<!doctype", "a web page", "download the file itself"),
    (b"<html", "a web page", "download the file itself"),
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def read_questions(path: str, *, split: str = "train", field: str = "data.path") -> list[Question]:
    """Read every question of a JSONL file, a JSON list, `embedded:train|validation|test`, or the `split` of a
    hub data set.

    Records are parsed by `read_question`; the answer is optional. A byte order mark, CRLF line ends and blank
    lines are accepted. Other errors raise ConfigError naming `field`, the file and the line.
    """
    questions = [
        read_question(index, record, place)
        for index, (place, record) in enumerate(read_records(path, split=split, field=field))
    ]
    if not questions:
        raise ConfigError(
            f"{field}: {path} holds no questions; write one JSON object per line with `problem` or `question`"
        )
    return questions


def read_records(
    path: str, *, split: str = "train", subset: str | None = None, field: str = "data.path"
) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) for every record of a question set, unparsed; error messages name the place.

    Raises ConfigError as `read_questions` does. `subset` is the configuration of a hub data set.
    """
    if path.startswith(EMBEDDED_PREFIX):
        name = path.removeprefix(EMBEDDED_PREFIX)
        if name not in EMBEDDED_SETS:
            raise ConfigError(
                f"{field}: expected one of {', '.join(EMBEDDED_PREFIX + known for known in EMBEDDED_SETS)}, "
                f"got {path!r}"
            )
        content = (
            importlib.resources.files("rlsc_mcore")
            .joinpath("assets", "questions", f"{name}.jsonl")
            .read_bytes()
        )
        yield from _parse_lines(content, f"{field}: {path}")
    elif Path(path).expanduser().exists() or path.endswith(_FILE_SUFFIXES) or not _HUB_NAME.fullmatch(path):
        yield from _parse_file(_read_file(path, field), f"{field}: {path}")
    else:
        yield from _read_hub(path, split, field, subset)


def questions_fingerprint(questions: Sequence[Question]) -> str:
    """Return the sha256 hash (hex) of the questions and answers in order. A run can only be resumed with
    equal questions."""
    digest = hashlib.sha256()
    for question in questions:
        facts: list[Any] = [question.index, question.text, question.answer]
        if question.answer_format != "math" or question.tolerance is not None:
            facts += [question.answer_format, question.tolerance]
        digest.update(json.dumps(facts).encode() + b"\n")
    return digest.hexdigest()


class QuestionSampler:
    """Selects the questions of a step as a pure function of seed and step, so there is no state to save.

    Each epoch is a permutation of all questions, and steps go through the epochs in order. A step that spans
    two epochs still has distinct questions if `questions_per_step` <= `num_questions`. If it is larger, a
    step covers more than one epoch.
    """

    def __init__(self, num_questions: int, questions_per_step: int, shuffle: bool, seed: int) -> None:
        assert num_questions >= 1 and questions_per_step >= 1
        self.num_questions = num_questions
        self.questions_per_step = questions_per_step
        self.shuffle = shuffle
        self.seed = seed
        # The number of epochs after which an epoch starts at the first question of a step again. The order of
        # such an epoch does not depend on earlier ones.
        chained = shuffle and questions_per_step <= num_questions
        self._aligned_every = (
            questions_per_step // math.gcd(num_questions, questions_per_step) if chained else 1
        )
        self._orders: dict[int, list[int]] = {}

    def step_indices(self, step: int) -> list[int]:
        """Return the question indices of step `step` (from 0), in order."""
        start = step * self.questions_per_step
        indices: list[int] = []
        while len(indices) < self.questions_per_step:
            epoch, offset = divmod(start + len(indices), self.num_questions)
            indices += self._order(epoch)[offset : offset + self.questions_per_step - len(indices)]
        return indices

    def step_questions(self, step: int) -> list[Asked]:
        """Return the questions of step `step` in order, each with the number of its earlier occurrences."""
        occurrences: Counter[int] = Counter()
        asked: list[Asked] = []
        for index in self.step_indices(step):
            asked.append((index, occurrences[index]))
            occurrences[index] += 1
        return asked

    def _order(self, epoch: int) -> list[int]:
        first = epoch
        while first not in self._orders and first % self._aligned_every:
            first -= 1
        for current in range(first, epoch + 1):
            if current not in self._orders:
                self._orders = {
                    number: order for number, order in self._orders.items() if number == current - 1
                }
                self._orders[current] = self._make_order(current)
        return self._orders[epoch]

    def _make_order(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.num_questions))
        # Python guarantees the same stream across versions and machines only for random() with a string seed.
        stream = random.Random(f"question order/{self.seed}/{epoch}")
        keys = [stream.random() for _ in range(self.num_questions)]
        order = sorted(range(self.num_questions), key=keys.__getitem__)
        if epoch % self._aligned_every == 0:
            return order
        num_carried = (
            epoch * self.num_questions % self.questions_per_step
        )  # questions of the spanning step from the previous epoch
        carried = set(self._orders[epoch - 1][-num_carried:])
        head = [index for index in order if index not in carried][: self.questions_per_step - num_carried]
        asked = set(head)
        return head + [index for index in order if index not in asked]


def _read_file(path: str, field: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{field}: no such file: {path}") from None
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: unknown user in ~user
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{field}: cannot read {path!r}: {reason}; expected a JSONL file") from None


def _parse_file(content: bytes, source: str) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) for a file with one JSON object per line, a list of objects, or one object over
    several lines."""
    content = content.removeprefix(codecs.BOM_UTF8)
    other = next(
        ((kind, remedy) for start, kind, remedy in _OTHER_FORMATS if content.startswith(start)), None
    )
    if other is not None:
        kind, remedy = other
        raise ConfigError(f"{source}: {kind}; expected JSONL, one JSON object per line: {remedy}")
    if source.endswith((".csv", ".tsv")):
        raise ConfigError(
            f"{source}: a table of separated values; expected JSONL, one JSON object per line: convert it: "
            f"{_PANDAS.replace('read_parquet', 'read_csv')}"
        )
    whole = _parse_whole(content, source)
    if isinstance(whole, list):
        yield from ((f"{source}, item {number}", record) for number, record in enumerate(whole, start=1))
    elif whole is not None:
        yield source, whole
    else:
        yield from _parse_lines(content, source)


def _parse_whole(content: bytes, source: str) -> list[Any] | dict[str, Any] | None:
    """Parse a file that is one list, or one object over several lines; None for any other file.

    Raises ConfigError if a list over several lines is malformed.
    """
    first_line, _, rest = content.strip().partition(b"\n")
    is_list = first_line.startswith(b"[")
    if not is_list and (not first_line.startswith(b"{") or not rest.strip() or _is_json(first_line)):
        return None
    try:
        whole = _load(content.decode("utf-8"))
    except json.JSONDecodeError as error:
        if not is_list or _is_json(first_line) or not rest.strip():
            return None
        raise ConfigError(
            f"{source}, line {error.lineno}: malformed JSON ({error.msg} at column {error.colno}); expected "
            "a list of JSON "
            "objects, or one object per line"
        ) from None
    except (ValueError, RecursionError):  # the error of parsing by line is more specific
        return None
    return whole if isinstance(whole, list | dict) else None


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _load(text: str) -> Any:
    """Parse JSON; raises ValueError if an object contains a name twice, because json would keep only the
    last."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) != len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(
                f"{next(name for name in names if names.count(name) > 1)!r} stands twice in one object"
            )
        return record

    return json.loads(text, object_pairs_hook=unique)


def _parse_lines(content: bytes, source: str) -> Iterator[tuple[str, Any]]:
    # Split before decoding: a JSON string may contain U+2028, which str.splitlines treats as the end of a
    # line.
    for number, line in enumerate(content.split(b"\n"), start=1):
        place = f"{source}, line {number}"
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{place}: not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8"
            ) from None
        try:
            yield place, _load(text)
        except (ValueError, RecursionError) as error:
            reason = (
                f"{error.msg} at column {error.colno}"
                if isinstance(error, json.JSONDecodeError)
                else str(error)
            )
            raise ConfigError(
                f"{place}: malformed JSON ({reason}); each line must be one whole JSON object"
            ) from None


def _read_hub(name: str, split: str, field: str, subset: str | None) -> Iterator[tuple[str, Any]]:
    instead = "or bring the questions as a JSONL file (one object per line with `problem` or `question`, and `answer`)"
    try:
        import datasets  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ConfigError(
            f'{field}: there is no file {name!r}; to read a hub data set of that name run `pip install "rlsc_mcore[hub]"`, {instead}'
        ) from None
    try:
        rows = _load_hub(datasets.load_dataset, name, [] if subset is None else [subset], split)
    except Exception as error:  # errors of the library, the network or the file format
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{field}: there is no file {name!r} and the hub data set of that name, split {split!r}, did not "
            f"load ({reason}); "
            f"check name, data.split and network, {instead}"
        ) from None
    for number, row in enumerate(rows):
        yield f"{field}: {name}, split {split}, row {number}", row


def _load_hub(
    load_dataset: Callable[..., Iterable[Any]], name: str, subset: Sequence[str], split: str
) -> Iterable[Any]:
    """Load from the hub, else from the hub's cache: after `hf download --repo-type dataset NAME` no network
    is needed."""
    try:
        return load_dataset(name, *subset, split=split)
    except Exception:
        folder = _cached_snapshot(name)
        if folder is None:
            raise
        return load_dataset(folder, *subset, split=split)


def _cached_snapshot(name: str) -> str | None:
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(name, repo_type="dataset", local_files_only=True))
    except Exception:  # never downloaded, or not a valid hub name
        return None
