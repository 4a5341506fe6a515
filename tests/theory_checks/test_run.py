"""The run, its report and the command line, on a registry of three small claims; and what every claim of the paper owes."""

import html.parser
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from theory_checks import __main__ as command_line
from theory_checks import claim as claim_module
from theory_checks import figures, page, readme, report, run, show
from theory_checks.claim import PRESETS, Claim, Finding, Measurement, Preset, Setting

ROOT = Path(__file__).parents[2]


# ---- The claims of the paper -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def claims():
    return run.load()


def test_every_claim_has_an_expectation_and_every_expectation_a_claim(claims):
    assert report.Expectations.read().mismatches(claims, list(PRESETS)) == []


def test_a_missing_expectation_and_a_missing_claim_are_found():
    lone = Claim("lone", "Eq. (1)", "x", _sound, True, None, "")
    expectations = report.Expectations({("lone", "paper"): "holds", ("ghost", ""): "fails"}, {})
    assert expectations.mismatches({"lone": lone}, ["paper", "asymptotic"]) == [
        "no expectation for lone (asymptotic)",
        "no claim for the expectation ghost ()",
    ]


def test_expected_verdicts_are_verdicts():
    assert set(report.Expectations.read().verdicts.values()) <= {"holds", "fails"}


def test_every_equation_is_named_by_a_claim_or_listed_as_a_step(claims):
    named = set().union(*(report.equations(claim.source) for claim in claims.values()))
    steps = [report.equations(which) for which in tomllib.loads((ROOT / "theory_checks/proof_steps.toml").read_text(encoding="utf-8"))]
    listed = set().union(*steps)
    assert sum(map(len, steps)) == len(listed)  # none twice
    assert named & listed == set()
    assert named | listed == set(range(1, 99))


def test_every_claim_of_the_paper_has_a_section(claims):
    lost = [claim.name for claim in claims.values() if report.section(claim.source) is None and "beyond the paper" not in claim.source]
    assert lost == []


def test_every_module_that_registers_claims_is_imported():
    registering = {path.stem for path in (ROOT / "theory_checks").glob("*.py") if re.search(r"^@claim\(", path.read_text(), re.MULTILINE)}
    assert registering == set(run.MODULES)


def test_the_readme_names_the_claims_as_they_are(claims):
    rows = readme.table_in(ROOT / "README.md").splitlines()[2:]
    expected = [f"| `{claim.name}`<br>{readme._escape(claim.statement)} | {readme._escape(claim.source)} | " for claim in claims.values()]
    assert [row[: len(start)] for row, start in zip(rows, expected, strict=True)] == expected


@pytest.mark.slow
def test_a_fresh_run_gives_the_readme_s_table(tmp_path):
    subprocess.run([sys.executable, "-m", "theory_checks", "--out", str(tmp_path)], cwd=ROOT, check=True)
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert found["complete"]
    assert found["warnings"] == []
    assert readme.render(found) == readme.table_in(ROOT / "README.md")


# ---- Three small claims ------------------------------------------------------------------------------------------------


def _sound(setting: Setting) -> Finding:
    return Finding([Measurement("twice two", 4.0, "<=", 4.0, 1e-6)], {"x": [1, 10, 100], "y": [1e-9, 1e-5, None]}, "A note on 1 < 2 & 3.")


def _unsound(setting: Setting) -> Finding:
    return Finding([Measurement("one", 1.0, "<=", 2.0), Measurement(setting.preset.name, float("nan"), ">=", 0.0)])


def _raising(setting: Setting) -> Finding:
    raise ZeroDivisionError("two\nlines")


def _draw(series, figure):
    axes = figure.subplots()
    for values in series.values():
        axes.loglog(values["x"], [float("nan") if y is None else y for y in values["y"]], label="y")
    axes.legend()


class House:
    """A registry of its own, its expectations, and the command line run on both in this process."""

    def __init__(self, monkeypatch, folder):
        self.out = folder / "out"
        self.claims: dict[str, Claim] = {}
        self.verdicts: dict[tuple[str, str], str] = {}
        self.explanations: dict[tuple[str, str], str] = {}
        monkeypatch.setattr(run, "load", lambda: self.claims)
        monkeypatch.setattr(figures, "load", lambda: self.claims)
        monkeypatch.setattr(report.Expectations, "read", lambda: report.Expectations(self.verdicts, self.explanations))
        monkeypatch.setattr(command_line, "configure", lambda: None)

    def add(self, name, check, *, verdict="holds", per_preset=False, draw=None):
        self.claims[name] = Claim(name, "Eq. (17)", f"About {name} <b>|x| & y*</b>.", check, per_preset, draw, f"A figure of {name}.")
        self.verdicts |= {(name, preset): verdict for preset in (PRESETS if per_preset else ("",))}

    def run(self, *arguments):
        # A pattern keeps the run in this process.
        return command_line.main(["--only", "*", "--out", str(self.out), *arguments])

    def report(self):
        return json.loads((self.out / "report.json").read_text(encoding="utf-8"))

    def files(self):
        return {path.relative_to(self.out).as_posix(): path.read_bytes() for path in sorted(self.out.rglob("*")) if path.is_file()}


@pytest.fixture
def house(monkeypatch, tmp_path):
    made = House(monkeypatch, tmp_path)
    made.add("sound", _sound, draw=_draw)
    return made


def test_a_run_in_which_all_is_as_expected(house, capsys):
    house.add("unsound", _unsound, verdict="fails", per_preset=True)
    assert house.run() == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    assert "3 verdicts: 1 hold, 2 fail; all as expected. Chance of a false alarm in the whole run: at most 1·10⁻⁶." in output
    assert set(house.files()) == {"report.json", "report.html", "figures/sound.svg", "figures/sound.png"}
    found = house.report()
    assert found["complete"]
    assert found["summary"] == {"holds": 1, "fails": 2, "errors": 0, "fails_as_expected": 2, "surprises": 0}
    assert found["false_alarm"] == 1e-6
    sound, unsound = found["claims"]
    assert sound["results"][0]["measurements"] == [
        {"what": "twice two", "value": 4.0, "relation": "<=", "bound": 4.0, "false_alarm": 1e-6, "passed": True}
    ]
    assert [result["preset"] for result in unsound["results"]] == ["paper", "asymptotic"]
    assert unsound["results"][1]["measurements"][1]["value"] is None  # NaN


def test_a_claim_that_should_hold_and_fails(house, capsys):
    house.add("unsound", _unsound)
    house.explanations[("unsound", "")] = "because of the weather"
    assert house.run() == 1
    output, errors = capsys.readouterr()
    assert errors == "error: unsound was expected to hold and fails\n"
    assert "surprise: unsound fails, expected holds: because of the weather" in output
    assert house.report()["claims"][1]["results"][0]["explanation"] == "because of the weather"
    assert "because of the weather" in (house.out / "report.html").read_text(encoding="utf-8")


def test_a_claim_that_should_fail_and_holds_is_a_surprise(house, capsys):
    house.verdicts["sound", ""] = "fails"
    assert house.run() == 0
    assert "surprise: sound holds, expected fails" in capsys.readouterr().out
    assert house.report()["summary"]["surprises"] == 1


def test_a_check_that_raises_is_reported_and_the_others_go_on(house, capsys):
    house.add("raising", _raising, verdict="fails")
    house.add("later", _sound)
    assert house.run() == 1
    assert capsys.readouterr().err == "error: raising could not be checked: ZeroDivisionError: two lines\n"
    assert [entry["results"][0]["verdict"] for entry in house.report()["claims"]] == ["holds", "error", "holds"]


@pytest.mark.parametrize(
    "check",
    [
        lambda setting: Finding([]),
        lambda setting: Finding([Measurement("x", 1.0, "<=", 2.0)], {"x": object()}),
        lambda setting: sys.exit(3),
    ],
    ids=["measures nothing", "series that JSON lacks", "exits"],
)
def test_checks_that_are_not_checks(house, check):
    house.add("odd", check)
    assert house.run() == 1
    assert house.report()["claims"][1]["results"][0]["verdict"] == "error"


def test_a_figure_that_cannot_be_drawn(house, capsys):
    house.add("shy", _sound, draw=lambda series, figure: series["paper"])
    assert house.run() == 1
    assert capsys.readouterr().err == "error: the figure of shy could not be drawn: KeyError: 'paper'\n"
    assert house.report()["claims"][1]["results"][0]["verdict"] == "holds"


def test_too_many_chances_of_a_false_alarm(house, capsys):
    house.add("lucky", lambda setting: Finding([Measurement("x", 1.0, "<=", 2.0, 0.01)]))
    assert house.run() == 1
    assert "may fail by chance with probability 0.01, above 0.001" in capsys.readouterr().err


def test_two_runs_give_the_same_bytes(house):
    house.run()
    first = house.files()
    house.run()
    assert house.files() == first
    house.run("--seed", "1")
    assert house.files() != first


def test_nothing_of_the_machine_is_in_the_report(house):
    house.run()
    text = (house.out / "report.json").read_text(encoding="utf-8") + (house.out / "figures/sound.svg").read_text(encoding="utf-8")
    assert str(house.out) not in text
    assert os.uname().nodename not in text
    assert not re.search(r"\d{4}-\d\d-\d\d|seconds", text)


def test_a_failing_write_leaves_the_old_report(house, capsys, monkeypatch):
    house.run()
    before = house.files()
    capsys.readouterr()

    def full(source, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(os, "replace", full)
    assert house.run("--seed", "1") == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert house.files() == before  # and no temporary file is left


def test_an_interrupted_run_leaves_the_old_report_and_says_what_was_done(house, capsys):
    house.run()
    before = house.files()

    def interrupting(setting):
        raise KeyboardInterrupt

    house.add("slow", interrupting)
    capsys.readouterr()
    assert house.run() == 130
    assert house.files() == before
    output, errors = capsys.readouterr()
    assert "interrupted after 1 of 2 checks (sound)" in output
    assert errors == ""


def test_a_narrowed_run_says_so(house):
    house.add("other", _unsound, verdict="fails", per_preset=True)
    house.run()
    assert "narrowed run" not in (house.out / "report.html").read_text(encoding="utf-8")
    house.run("--preset", "paper")
    assert not house.report()["complete"]
    assert list(house.report()["presets"]) == ["paper"]
    assert "narrowed run" in (house.out / "report.html").read_text(encoding="utf-8")
    assert command_line.main(["--only", "other", "--out", str(house.out)]) == 0
    assert [entry["name"] for entry in house.report()["claims"]] == ["other"]
    assert set(house.files()) == {"report.json", "report.html"}  # the old figure is gone with the old report


def test_a_large_rotation_is_warned_of(house, capsys, monkeypatch):
    monkeypatch.setitem(PRESETS, "paper", Preset("paper", members=12, dim=50, cosine=0.35, beta=8.0, epsilon=0.1, sigma=1.0))
    assert house.run() == 0
    assert "preset paper: a rotation moves a state by ε√(d−1)σ = 0.7 of its length" in capsys.readouterr().out
    assert len(house.report()["warnings"]) == 1


# ---- Figures and the page ----------------------------------------------------------------------------------------------


def test_figures_are_drawn_from_the_json_alone(house, monkeypatch):
    house.run()
    before = house.files()
    monkeypatch.setattr(run, "measure", None)
    drawn = figures.draw_all(house.report(), house.claims, run.Pool(0, lambda: None))
    assert dict(drawn.files()) == {name.removeprefix("figures/"): part for name, part in before.items() if name.startswith("figures/")}
    assert page.render(house.report(), drawn).encode() == before["report.html"]
    assert b"<dc:date>" not in drawn.svg["sound"]


class _References(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "srcset", "action", "data", "poster"):
                self.targets.append(value)


def test_the_page_is_self_contained_and_shows_everything(house):
    house.add("unsound", _unsound, verdict="fails", per_preset=True)
    house.add("raising", _raising)
    house.run()
    text = (house.out / "report.html").read_text(encoding="utf-8")
    parsed = _References()
    parsed.feed(text)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(parsed.tags)
    assert "url(" not in text
    assert "@import" not in text
    assert len(parsed.ids) == len(set(parsed.ids))
    for target in parsed.targets:
        assert target.startswith("data:image/svg+xml;base64,") or target[1:] in parsed.ids
    for name in ("sound", "unsound", "raising"):
        assert f"About {name} &lt;b&gt;|x| &amp; y*&lt;/b&gt;." in text
        assert name in parsed.ids
    assert "A figure of sound." in text
    assert "A note on 1 &lt; 2 &amp; 3." in text
    assert "ZeroDivisionError: two lines" in text
    assert "not finite" in text
    for which in tomllib.loads((ROOT / "theory_checks/proof_steps.toml").read_text(encoding="utf-8")):
        assert f"<dt>{which}</dt>" in text


# ---- The README's table ------------------------------------------------------------------------------------------------


def test_the_readme_s_table(house, tmp_path, capsys):
    house.add("unsound", _unsound, verdict="fails", per_preset=True)
    path = tmp_path / "README.md"
    path.write_text(f"before\n{readme.START}\n{readme.END}\nafter\n", encoding="utf-8")
    house.run("--readme", str(path), "--preset", "paper")
    assert path.read_text(encoding="utf-8") == f"before\n{readme.START}\n{readme.END}\nafter\n"
    assert "is left alone: this run did not check everything" in capsys.readouterr().out
    house.run("--readme", str(path))
    assert path.read_text(encoding="utf-8").splitlines() == [
        "before",
        readme.START,
        "| Claim | Paper | `paper` | `asymptotic` |",
        "|---|---|---|---|",
        r"| `sound`<br>About sound \<b\>\|x\| & y\*\</b\>. | Eq. (17) | ✓ holds | ✓ holds |",
        r"| `unsound`<br>About unsound \<b\>\|x\| & y\*\</b\>. | Eq. (17) | ✗ fails, as expected | ✗ fails, as expected |",
        readme.END,
        "after",
    ]
    capsys.readouterr()
    house.run("--readme", str(path))
    assert "is up to date" in capsys.readouterr().out
    house.add("raising", _raising)
    before = path.read_bytes()
    house.run("--readme", str(path))
    assert "is left alone: 1 checks raised" in capsys.readouterr().out
    assert path.read_bytes() == before


def test_a_readme_without_a_place_for_the_table(house, tmp_path, capsys):
    path = tmp_path / "README.md"
    path.write_text("nothing", encoding="utf-8")
    assert house.run("--readme", str(path)) == 2
    assert "put the lines <!-- claims:start --> and <!-- claims:end --> into it" in capsys.readouterr().err
    assert not (house.out / "report.json").exists()


# ---- The command line --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--only", "soun"], ("'soun'", "did you mean sound?")),
        (["--only", "sound,zzz*"], ("'zzz*'", "--list")),
        (["--seed", "-1"], ("--seed -1", "0 ≤ seed", "--seed 0")),
        (["--seed", str(2**32)], ("--seed 4294967296", "4294967295", "--seed 0")),
        (["--rotations", "2"], ("--rotations 2", "4 ≤ rotations", "--rotations 2000")),
        (["--rotations", "101"], ("--rotations 101", "odd", "--rotations 102")),
        (["--rotations", "1000000000"], ("--rotations 1000000000", "≤ 100000", "--rotations 2000")),
        (["--rotations", "7.5"], ("--rotations 7.5", "whole number")),
        (["--preset", "both of them"], ("both of them", "asymptotic")),
        (["--out", "/dev/null/x"], ("--out /dev/null/x", "cannot be written")),
        (["--nonsense"], ("--nonsense", "--help")),
        (["nonsense"], ("nonsense", "--help")),
        (["point", "--K", "12.5", "--cosine", "0.35", "--beta", "8", "--dim", "50"], ("--K 12.5", "whole number")),
        (["point", "--K", "12", "--cosine", "x", "--beta", "8", "--dim", "50"], ("--cosine x", "not a number")),
        (["point", "--K", "12", "--cosine", "0.35", "--beta", "-8", "--dim", "50"], ("--beta -8.0", "0 < β", "take β = 8")),
        (["point", "--K", "12", "--cosine", "0.35", "--beta", "8"], ("--dim",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_misuse_is_one_line_and_status_2(house, capsys, arguments, names):
    assert command_line.main(arguments if "--out" in arguments or "point" in arguments else [*arguments, "--out", str(house.out)]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    for name in names:
        assert name in errors
    assert not (house.out / "report.json").exists()


def test_patterns_select_and_keep_the_order():
    names = ["one", "two-a", "two-b", "three"]
    assert run.select(names, []) == names
    assert run.select(names, ["three", "two-?"]) == ["two-a", "two-b", "three"]


def test_the_list_of_claims(house, capsys):
    house.add("unsound", _unsound, verdict="fails", per_preset=True)
    assert command_line.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["sound", "Eq.", "(17)", "any", "holds"] for line in lines)
    assert any(line.split() == ["unsound", "Eq.", "(17)", "paper,", "asymptotic", "fails,", "fails"] for line in lines)


def test_help_shows_an_example(capsys):
    assert command_line.main(["--help"]) == 0
    assert "python -m theory_checks --only 'theorem-4-1*' --out /tmp/t41\n" in capsys.readouterr().out


def test_a_process_of_its_own_prints_a_point_as_json():
    command = [sys.executable, "-X", "importtime", "-W", "error", "-m", "theory_checks", "point"]
    finished = subprocess.run(
        [*command, "--K", "12", "--cosine", "0.35", "--beta", "8", "--dim", "50", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(finished.stdout, parse_constant=pytest.fail)["K"] == 12
    imported = {line.rsplit("|", 1)[-1].strip() for line in finished.stderr.splitlines()}
    assert all(line.startswith("import time:") for line in finished.stderr.splitlines())  # and nothing else
    assert not imported & {"matplotlib", "sklearn", "theory_checks.run"}


# ---- Processes ---------------------------------------------------------------------------------------------------------


def _square(number: int) -> int:
    if number == 3:
        os._exit(7)
    return number * number


def test_without_processes_tasks_run_here_in_order():
    begun: list[int] = []
    assert list(run.Pool(0, lambda: None).map(_square, [1, 2, 4], begun.append)) == [(1, 1), (2, 4), (4, 16)]
    assert begun == [1, 2, 4]


def test_a_process_keeps_to_its_family_and_leaves_others_theirs():
    assert run.choose("abac", "b", {"a"}) == 1
    assert run.choose("aacb", "d", {"a"}) == 2
    assert run.choose("aaa", "d", {"a"}) == 0


def test_checks_that_share_work_are_of_one_family_and_come_first(claims):
    listed = [job.family for job in run.jobs(claims.values(), list(PRESETS.values()), 0, 2000)]
    assert set(sum(run.FAMILIES, ())) <= set(run.MODULES)
    assert tuple(dict.fromkeys(listed))[: len(run.FAMILIES)] == run.FAMILIES
    assert sum(map(len, dict.fromkeys(listed))) == len(run.MODULES)


@pytest.mark.slow
def test_a_process_that_ends_loses_its_task_alone():
    with run.Pool(2, command_line.configure) as pool:
        results = dict(pool.map(_square, [1, 2, 3, 4, 5]))
    assert results == {1: 1, 2: 4, 3: run.Lost(7), 4: 16, 5: 25}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_run_and_its_processes(tmp_path, name):
    command = [sys.executable, "-m", "theory_checks", "--out", str(tmp_path)]
    # A shell's background job ignores the signal, and so would what it starts.
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert process.stdout
    process.stdout.readline()  # the first check is done
    os.killpg(process.pid, getattr(signal, name)) if name == "SIGINT" else process.terminate()
    # Its processes write to the same pipes: these end when the last of them is gone.
    output, errors = process.communicate(timeout=60)
    assert errors == ""
    assert not (tmp_path / "report.json").exists()
    if name == "SIGINT":
        assert process.returncode == 130
        assert "interrupted after " in output


def test_progress_is_plain_lines_without_a_terminal(house, capsys):
    house.run()
    assert re.search(r"^1/1  holds  sound  0\.\d s$", capsys.readouterr().out, re.MULTILINE)


def test_verdicts_in_words():
    words = {
        (verdict, surprise): show.verdict_text({"verdict": verdict, "surprise": surprise}).plain
        for verdict in ("holds", "fails", "error")
        for surprise in (False, True)
        if verdict != "error" or surprise
    }
    assert words == {
        ("holds", False): "holds",
        ("holds", True): "holds, unexpected",
        ("fails", False): "fails, as expected",
        ("fails", True): "fails, unexpected",
        ("error", True): "error",
    }


def test_numbers_for_people():
    assert [report.number(value) for value in (None, 0.0, 1.0, 12345.678, 1.23e-9, -3e300)] == [
        "not finite",
        "0",
        "1",
        "1.235·10⁴",
        "1.23·10⁻⁹",
        "-3·10³⁰⁰",
    ]


def test_two_checks_cannot_share_a_name():
    claim_module.claim("twice", "Eq. (1)", "x")(_sound)
    try:
        with pytest.raises(ValueError, match="two checks are named 'twice'"):
            claim_module.claim("twice", "Eq. (1)", "x")(_sound)
    finally:
        del claim_module.REGISTRY["twice"]
