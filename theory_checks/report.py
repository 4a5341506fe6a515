"""The report: everything that a run found, as one JSON document that nothing but the setting decides, and the page made from it.

No times, paths, hosts or dates: two runs with one seed and one set of library versions give the same bytes.
"""

import importlib.metadata
import json
import math
import platform
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hopjax
from theory_checks.claim import Claim, Preset
from theory_checks.run import Outcome

# What a whole run may add up to: at 1e-3, one false alarm in a thousand seeds.
FALSE_ALARM_LIMIT = 1e-3
# Above this displacement ε√(d−1)σ the second order in ε is no longer the leading one.
LARGE_DISPLACEMENT = 0.3

_HERE = Path(__file__).parent
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

# The paper's sections, each with the equations that belong to it and what else a source may name.
SECTIONS: tuple[tuple[str, tuple[tuple[int, int], ...], str], ...] = (
    ("Energy, density, forgetting: Sections 3–4", ((1, 4),), r"Sections? [34]\b(?!\.[1-9])|§3|§4(?!\.)"),
    ("Cluster plus outlier, rotations: Section 4.1, Appendix B.1", ((5, 9), (16, 17), (55, 55), (59, 59)), r"Lemma B\.5"),
    ("Fixed points: Appendix B.2–B.3.1", ((18, 34),), ""),
    ("Localisation: Appendix B.3.2–B.4", ((35, 54),), r"Assumption B\.1|Propositions? B\.[23]|Remark B\.4"),
    ("Theorem 4.1: Appendix B.5–B.6", ((10, 11), (56, 58), (60, 73)), r"Theorem 4\.1|Remark B\.6"),
    ("Energy and sharpness: Appendix C", ((74, 84),), r"Appendix C"),
    ("Replay and Theorem 5.1: Section 5, Appendix D", ((13, 15), (85, 98)), r"Theorem 5\.1|Remark D\.1|Appendix D|Section 5|§5"),
    ("Diffusion and the Hopfield energy: Appendix A", (), r"Appendix A|Section 3\.3|§3\.3"),
    ("Learned memories: Section 3.2, Figures 3(a) and 4", (), r"Figures? [34]\b|Section 3\.2|Sections 3\.1|[Ll]imitation"),
    ("Experiments: Section 4.2–4.3, Appendix E", ((12, 12),), r"Appendix [EFGH]|Section 4\.[23]|§4\.[23]"),
)
BEYOND = "Beyond the paper"


def equations(text: str) -> set[int]:
    """The numbers of the equations that a source names: "Eqs. (10), (76)-(77)" gives 10, 76 and 77."""
    numbers: set[int] = set()
    for first, last in re.findall(r"\((\d+)\)(?:\s*[-–]\s*\((\d+)\))?", text):
        numbers |= set(range(int(first), int(last or first) + 1))
    return numbers


def section(source: str) -> str | None:
    """The title of the section that a source's first reference belongs to; None if it names nothing of the paper."""
    found: list[tuple[int, int, str]] = []
    for order, (title, ranges, pattern) in enumerate(SECTIONS):
        matches = list(re.finditer(pattern, source)) if pattern else []
        matches += [match for match in re.finditer(r"\((\d+)\)", source) if any(low <= int(match.group(1)) <= high for low, high in ranges)]
        found += [(match.start(), order, title) for match in matches]
    return min(found)[2] if found else None


# ---- Expectations ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expectations:
    """The verdicts written down beforehand, and explanations of those that came out otherwise.

    Attributes:
        verdicts: "holds" or "fails" by (claim, preset), preset "" for claims that are run once.
        explanations: by the same, or by (claim, "") for all presets.
    """

    verdicts: Mapping[tuple[str, str], str]
    explanations: Mapping[tuple[str, str], str]

    @classmethod
    def read(cls, path: Path = _HERE / "expected.toml") -> "Expectations":
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        notes = tables.pop("explanations", {})
        verdicts = {
            (name, "" if preset == "once" else preset): verdict for preset, table in tables.items() for name, verdict in table.items()
        }
        # name = "…" explains every preset, name.preset = "…" one.
        explanations = {
            (name, preset): text
            for name, entry in notes.items()
            for preset, text in ({"": entry} if isinstance(entry, str) else entry).items()
        }
        return cls(verdicts, explanations)

    def explanation(self, claim: str, preset: str) -> str:
        return self.explanations.get((claim, preset)) or self.explanations.get((claim, ""), "")

    def mismatches(self, claims: Mapping[str, Claim], presets: Sequence[str]) -> list[str]:
        """Claims without an expectation and expectations without a claim, in words."""
        wanted = {(claim.name, preset) for claim in claims.values() for preset in (presets if claim.per_preset else ("",))}
        called = "{0[0]} ({0[1]})".format
        return [f"no expectation for {called(key)}" for key in sorted(wanted - set(self.verdicts))] + [
            f"no claim for the expectation {called(key)}" for key in sorted(set(self.verdicts) - wanted)
        ]


# ---- The document ------------------------------------------------------------------------------------------------------


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinities: null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return value


def _result(outcome: Outcome, expectations: Expectations) -> dict[str, Any]:
    claim, preset, finding = outcome.job.claim, outcome.job.preset, outcome.finding
    expected = expectations.verdicts.get((claim, preset))
    surprise = outcome.verdict != expected
    return {
        "preset": preset or None,
        "expected": expected,
        "verdict": outcome.verdict,
        "surprise": surprise,
        "explanation": expectations.explanation(claim, preset) if surprise else "",
        "error": outcome.error,
        "measurements": [measurement._asdict() | {"passed": measurement.passed} for measurement in finding.measurements] if finding else [],
        "note": finding.note if finding else "",
        "series": dict(finding.series) if finding else {},
    }


def _warnings(presets: Sequence[Preset]) -> list[str]:
    displacements = {preset.name: hopjax.displacement(preset.dim, preset.epsilon, preset.sigma) for preset in presets}
    return [
        f"preset {name}: a rotation moves a state by ε√(d−1)σ = {moved:.3g} of its length, above {LARGE_DISPLACEMENT}: "
        "what is said of the second order in ε means little there"
        for name, moved in displacements.items()
        if moved > LARGE_DISPLACEMENT
    ]


def assemble(
    outcomes: Sequence[Outcome],
    claims: Mapping[str, Claim],
    expectations: Expectations,
    *,
    presets: Sequence[Preset],
    seed: int,
    rotations: int,
    complete: bool,
) -> dict[str, Any]:
    """The report of a run: plain data, ready for JSON.

    Args:
        outcomes: in any order; the report has the claims' order.
        complete: whether every claim was run with every preset.
    """
    by_claim: dict[str, list[Outcome]] = {name: [] for name in claims}
    for outcome in outcomes:
        by_claim[outcome.job.claim].append(outcome)
    order = [preset.name for preset in presets]
    entries: list[dict[str, Any]] = [
        {
            "name": name,
            "source": claims[name].source,
            "section": section(claims[name].source) or BEYOND,
            "statement": claims[name].statement,
            "caption": claims[name].caption,
            "results": [
                _result(outcome, expectations)
                for outcome in sorted(found, key=lambda outcome: order.index(outcome.job.preset) if outcome.job.preset else -1)
            ],
        }
        for name, found in by_claim.items()
        if found
    ]
    results = [result for entry in entries for result in entry["results"]]
    report: dict[str, Any] = {
        "paper": "arXiv:2605.27975",
        "complete": complete,
        "seed": seed,
        "rotations": rotations,
        "presets": {preset.name: asdict(preset) for preset in presets},
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("hopjax", "jax", "numpy", "scipy")},
        "false_alarm": sum(measurement["false_alarm"] for result in results for measurement in result["measurements"]),
        "false_alarm_limit": FALSE_ALARM_LIMIT,
        "summary": {
            "holds": sum(result["verdict"] == "holds" for result in results),
            "fails": sum(result["verdict"] == "fails" for result in results),
            "errors": sum(result["verdict"] == "error" for result in results),
            "fails_as_expected": sum(result["verdict"] == "fails" and not result["surprise"] for result in results),
            "surprises": sum(result["surprise"] for result in results),
        },
        "warnings": _warnings(presets),
        "claims": entries,
        "proof_steps": tomllib.loads((_HERE / "proof_steps.toml").read_text(encoding="utf-8")),
    }
    return _finite(report)


def problems(report: Mapping[str, Any]) -> list[str]:
    """Why the run did not succeed, a line each: nothing if all is as it should be."""
    lines = []
    for entry in report["claims"]:
        for result in entry["results"]:
            name = title(entry, result)
            if result["verdict"] == "error":
                lines.append(f"{name} could not be checked: {result['error']}")
            elif result["verdict"] == "fails" and result["expected"] != "fails":
                lines.append(f"{name} was expected to hold and fails")
    if report["false_alarm"] > report["false_alarm_limit"]:
        lines.append(
            f"a run in which every claim is true may fail by chance with probability {number(report['false_alarm'])}, "
            f"above {number(report['false_alarm_limit'])}: the checks' levels are too high"
        )
    return lines


def to_json(report: Mapping[str, Any]) -> bytes:
    """The same bytes for the same report; floats with all their digits."""
    return (json.dumps(report, ensure_ascii=False, allow_nan=False, indent=1) + "\n").encode()


def title(entry: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """What to call one of a claim's results."""
    return f"{entry['name']} ({result['preset']})" if result["preset"] else str(entry["name"])


def headline(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The measurement to show in a table: the first, or the first that fails."""
    measurements = result["measurements"]
    return next((measurement for measurement in measurements if not measurement["passed"]), measurements[0] if measurements else None)


def power(exponent: int) -> str:
    """An exponent in raised digits."""
    return str(exponent).translate(_RAISED)


def number(value: float | None) -> str:
    """A number for people; the report has all digits."""
    if value is None:
        return "not finite"
    mantissa, _, exponent = f"{value:.4g}".partition("e")
    return f"{mantissa}·10{power(int(exponent))}" if exponent else mantissa
