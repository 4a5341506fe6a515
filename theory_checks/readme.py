"""The table of claims in the README: what holds, in words that do not change with the seed."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hopjax.cli.output import write
from theory_checks.claim import PRESETS

START, END = "<!-- claims:start -->", "<!-- claims:end -->"

_WORDS = {
    ("holds", False): "✓ holds",
    ("fails", False): "✗ fails, as expected",
    ("holds", True): "✓ holds, unexpected",
    ("fails", True): "✗ fails, unexpected",
}


def _escape(text: str) -> str:
    """Plain text as Markdown that shows it, in a table's cell."""
    return re.sub(r"([\\`*_|\[\]<>~])", r"\\\1", text)


def render(report: Mapping[str, Any]) -> str:
    """The table, without the markers.

    A claim that does not depend on the model's parameters is checked once, and has that verdict in both columns.
    """
    lines = ["| Claim | Paper | " + " | ".join(f"`{name}`" for name in PRESETS) + " |", "|---|---|" + "---|" * len(PRESETS)]
    for entry in report["claims"]:
        verdicts = {result["preset"]: _WORDS[result["verdict"], result["surprise"]] for result in entry["results"]}
        cells = [verdicts.get(name) or verdicts[None] for name in PRESETS]
        lines.append(f"| `{entry['name']}`<br>{_escape(entry['statement'])} | {_escape(entry['source'])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _split(text: str, path: Path) -> tuple[str, str, str]:
    """What is before, between and after the markers."""
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"--readme {path} lacks a place for the table: put the lines {START} and {END} into it, once each")
    head, rest = text.split(START)
    table, tail = rest.split(END)
    return head, table.strip("\n"), tail


def table_in(path: Path) -> str:
    """The table that a README holds. Raises: ValueError if it has no place for one or cannot be read."""
    try:
        return _split(path.read_text(encoding="utf-8"), path)[1]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--readme {path} cannot be read ({error}): give the path of a text file") from None


check_markers = table_in


def update(path: Path, report: Mapping[str, Any]) -> str:
    """Brings the table up to date if the run was complete; says in one line what was done."""
    if not report["complete"]:
        return f"{path} is left alone: this run did not check everything"
    if report["summary"]["errors"]:
        return f"{path} is left alone: {report['summary']['errors']} checks raised"
    head, before, tail = _split(path.read_text(encoding="utf-8"), path)
    table = render(report)
    if table == before:
        return f"{path} is up to date"
    write(path, f"{head}{START}\n{table}\n{END}{tail}".encode())
    return f"{path} is brought up to date"
