"""The report as one page to read: self-contained, without scripts, made from the JSON and its figures."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hopjax.cli.page import templates
from theory_checks.figures import Drawn
from theory_checks.report import BEYOND, SECTIONS, number
from theory_checks.show import summary_line


def render(report: Mapping[str, Any], drawn: Drawn) -> str:
    """The page's HTML."""
    environment = templates(Path(__file__).parent)
    environment.filters["number"] = number
    environment.tests["all_true"] = all
    titles = [title for title, *_ in SECTIONS] + [BEYOND]
    sections = [(title, [entry for entry in report["claims"] if entry["section"] == title]) for title in titles]
    # As images, not inline: the ids inside two figures may be the same.
    pictures = {name: "data:image/svg+xml;base64," + base64.b64encode(svg).decode() for name, svg in drawn.svg.items()}
    return environment.get_template("report.html.jinja").render(
        report=report,
        sections=[(title, entries) for title, entries in sections if entries],
        pictures=pictures,
        summary=summary_line(report),
    )
