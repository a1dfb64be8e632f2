"""Write the table of the claims about one GPU: `python -m benchmarks.acceptance [FOLDER]`. Each row has the
claim, its floor, the measured value, the best peer, and whether the claim holds.

Collects the claims' rows from the result files of the benchmarks in FOLDER (default:
benchmarks/results/h200), writes acceptance.json and acceptance.md beside them, and prints the table. A claim
without a row is "not measured". The folder `cpu` has the claims that need no GPU. Imports no torch.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.claims import CLAIMS, Claim, NotMeasuredError

RESULTS = Path(__file__).parent / "results"
REACHED, MISSED, NOT_MEASURED = "reached", "MISSED", "not measured"
OUTCOMES = {True: REACHED, False: MISSED, None: NOT_MEASURED}
COLUMNS = ("part", "claim", "floor", "measured", "peer", "outcome")


def claims_of(folder: Path) -> list[Claim]:
    """Return the claims that the results of a folder can support."""
    return [claim for claim in CLAIMS if (claim.part == "cpu") == (folder.name == "cpu")]


def judge(folder: Path) -> list[dict[str, Any]]:
    """Return one row per claim, with its outcome."""
    lines = []
    for claim in claims_of(folder):
        try:
            line = written_row(claim, folder)
        except NotMeasuredError as missing:
            line = claim.row(f"- ({missing})", None)
        lines.append({**line, "outcome": OUTCOMES[line["holds"]]})
    return lines


def written_row(claim: Claim, folder: Path) -> dict[str, Any]:
    """Return the row that the claim's benchmark wrote; NotMeasuredError with the reason if there is none."""
    file = f"{claim.file}.json"
    try:
        result = json.loads((folder / file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotMeasuredError(f"no {file}") from None
    except (OSError, ValueError) as error:
        raise NotMeasuredError(f"{file} cannot be read: {error}") from None
    if not isinstance(result, dict):
        raise NotMeasuredError(f"{file} holds no object")
    if (reason := claim.why_not(result)) is not None:
        raise NotMeasuredError(reason)
    for line in result.get("claims", []):
        if line["claim"] == claim.text:
            return line
    raise NotMeasuredError(f"{file} has no row of this claim")


def table(lines: list[dict[str, Any]]) -> str:
    """Format the rows as a Markdown table, followed by the count of each outcome."""
    rows = ["| " + " | ".join(line[name].replace("|", "/") for name in COLUMNS) + " |" for line in lines]
    outcomes = [line["outcome"] for line in lines]
    count = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in (REACHED, MISSED, NOT_MEASURED))
    return "\n".join(["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS), *rows, "", count])


def main() -> None:
    """Print the table and write it beside the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", default=RESULTS / "h200", help="folder of the result files"
    )
    folder = parser.parse_args().folder
    lines = judge(folder)
    text = table(lines)
    print(text)
    if not folder.is_dir():
        return
    sources = {
        path.stem: _source(path) for path in sorted(folder.glob("*.json")) if path.stem != "acceptance"
    }
    content = {"claims": lines, "sources": sources}
    (folder / "acceptance.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / "acceptance.md").write_text(text + "\n", encoding="utf-8")


def _source(path: Path) -> dict[str, Any]:
    """Return command, commit and device of a result file."""
    try:
        about = json.loads(path.read_text(encoding="utf-8")).get("about", {})
    except (OSError, ValueError, AttributeError):
        return {}
    return {name: about[name] for name in ("command", "commit", "device") if name in about}


if __name__ == "__main__":
    main()
