"""The pages of the experiments say what their findings say, and these are what the tables give."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffusion.findings import findings
from hopjax.cli import table

RESULTS = Path(__file__).parents[2] / "diffusion" / "results"
EXPERIMENTS = ("rotated-mnist", "class-split", "photographs", "latents")
NUMBER = r"([−-]?\d+(?:\.\d+)?(?:e[−-]\d+)?)"
ESTIMATE = re.compile(rf"{NUMBER} \[{NUMBER}, {NUMBER}\]")
WORDS = {"shows": True, "does not show": False, "undecided": None}


def known(experiment: str) -> dict[str, Any]:
    return json.loads((RESULTS / experiment / "findings.json").read_text())


def verdicts(experiment: str) -> list[dict[str, Any]]:
    found = known(experiment)
    return next(iter(found["timesteps"].values()))["verdicts"]


def estimates(found: Any) -> Iterator[tuple[float, ...]]:
    """All that have an interval; of verdicts also those that are only in words."""
    if isinstance(found, dict):
        if found.get("value") is not None and found.get("low") is not None:
            yield found["value"], found["low"], found["high"]
        for value in found.values():
            yield from estimates(value)
    elif isinstance(found, list):
        for value in found:
            yield from estimates(value)
    elif isinstance(found, str):
        for match in ESTIMATE.findall(found):
            yield tuple(float(number.replace("−", "-")) for number in match)


def says(stated: tuple[str, ...], truth: tuple[float, ...]) -> bool:
    """Whether numbers are these, rounded."""
    for words, number in zip(stated, truth, strict=True):
        decimals = len(words.partition(".")[2])
        # A half rounded either way; three digits of a verdict's words may have been rounded before.
        if abs(float(words.replace("−", "-")) - number) > 0.5001 * 10**-decimals:
            return False
    return True


def rows(page: str) -> list[list[str]]:
    """Of all tables, cell by cell."""
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]


def close(one: Any, other: Any) -> bool:
    """Equal but for rounding, as another build of the libraries rounds."""
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(close(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(close, one, other))
    if isinstance(one, float):
        return isinstance(other, float) and math.isclose(one, other, rel_tol=1e-7, abs_tol=1e-12)
    return bool(one == other)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_findings_are_those_of_the_tables(experiment):
    files = [RESULTS / experiment / f"{name}.parquet" for name in ("samples", "tasks", "generated")]
    samples, tasks, generated = (table.read(file) if file.exists() else None for file in files)
    assert samples is not None
    assert close(known(experiment), findings(samples, tasks=tasks, generated=generated))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_pages_state_verdicts_and_what_decides_them(experiment):
    judged = verdicts(experiment)
    stated = [row for row in rows((RESULTS / experiment / "README.md").read_text()) if len(row) == 3][2:]
    assert len(stated) == len(judged) == 5
    for (_, word, words), verdict in zip(stated, judged, strict=True):
        # A run that is inconclusive gets the verdicts that it would have, and says so in its heading.
        would = re.search(r"else (holds|fails|inconclusive):", verdict["reason"])
        holds = {"holds": True, "fails": False, "inconclusive": None}[would[1]] if would else verdict["holds"]
        assert WORDS[word.partition(":")[0]] is holds
        if verdict["statistic"] is not None:
            assert any(says(each, (verdict["statistic"], *verdict["interval"])) for each in ESTIMATE.findall(words)), words
    if not known(experiment)["conclusive"]:
        assert "**Inconclusive by its rule:**" in (RESULTS / experiment / "README.md").read_text()


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_pages_state_no_estimate_that_is_not_found(experiment):
    found = list(estimates(known(experiment)))
    stated = ESTIMATE.findall((RESULTS / experiment / "README.md").read_text().replace("\n", " "))
    assert len(stated) > 15
    for each in stated:
        assert any(says(each, truth) for truth in found), each


def test_the_page_of_all_states_their_verdicts():
    lines = rows((RESULTS / "README.md").read_text())
    assert [re.search(r"\((.*)/README.md\)", cell)[1] for cell in lines[0][1:]] == list(EXPERIMENTS)  # type: ignore[index]
    judged = [row for row in lines if any(cell.partition(":")[0] in WORDS for cell in row)]
    for place, experiment in enumerate(EXPERIMENTS, 1):
        assert lines[2][place] == f"{known(experiment)['samples']:,}, {known(experiment)['seeds']}"
        found = list(estimates(known(experiment)))
        for row in lines[2:]:
            for each in ESTIMATE.findall(row[place]):
                assert any(says(each, truth) for truth in found), each
        for row, verdict in zip(judged, verdicts(experiment), strict=True):
            word, _, words = row[place].partition(": ")
            assert WORDS[word] is verdict["holds"]
            if verdict["statistic"] is None:
                assert not words
            else:
                assert says(ESTIMATE.findall(words)[0], (verdict["statistic"], *verdict["interval"])), words
