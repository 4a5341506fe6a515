"""The page of an experiment: all that is known is on it, and nothing that is not."""

import base64
import html.parser
import io
import time

import numpy as np
import pytest
from PIL import Image

from diffusion import findings, report
from diffusion.claims import NONE
from diffusion.statistics import Bootstrap
from hopjax.cli.page import number
from hopjax.data import Images
from tests.diffusion import made_up

SAMPLES = 120
INTERVAL = Bootstrap(resamples=100)


class Page(html.parser.HTMLParser):
    """Words, and pictures by what they show, all of which hold more than one colour."""

    def __init__(self, page):
        super().__init__()
        self.charts: list[str] = []
        self.images: list[tuple[str, tuple[int, ...]]] = []
        self.words = ""
        self.open: list[str] = []
        self.feed(page.decode())
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        assert tag != "script"
        if tag not in ("img", "meta"):
            self.open.append(tag)
        if tag != "img":
            return
        known = dict(attributes)
        kind, _, data = known["src"].partition("base64,")
        assert kind == "data:image/png;"
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L"))
        assert np.ptp(pixels) > 0
        if known["alt"].startswith("sample "):
            self.images.append((known["alt"].removeprefix("sample "), pixels.shape))
        else:
            self.charts.append(known["alt"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def drawn(samples, *, task1=None, sheets=None, **tables):
    return Page(report.page(samples, findings.findings(samples, **tables, bins=5, interval=INTERVAL), task1, sheets))


def pictures():
    return Images(np.random.default_rng(0).integers(0, 256, (SAMPLES, 6, 6, 1)).astype(np.uint8), None, None, "made up")


@pytest.fixture(scope="module")
def whole():
    samples = made_up.samples(SAMPLES, densities=40)
    found = findings.findings(samples, tasks=made_up.tasks(), generated=made_up.generated(), bins=5, interval=INTERVAL)
    return found, Page(report.page(samples, found, pictures(), made_up.sheets()))


def test_the_page_has_all_that_is_there(whole):
    found, page = whole
    assert len(page.charts) == 5
    names = [name for name, _ in page.images]
    assert names[:9] == ["before Task 2", "no replay", "high"] * 3
    assert len(names) == 9 + 2 * report.GALLERY
    assert {shape for name, shape in page.images if name == "no replay"} == {(6 * 7 - 1, 6 * 6 - 1)}  # 36 of 40 images, 6 × 5 each
    for words in (
        "Figures 3(c) and S.4",
        "Figure S.1",
        "Figures 6 and S.5",
        "Three ways",
        "Task by task",
        "What the models generate",
        "Seed 2",
    ):
        assert words in page.words
    for row in found["timesteps"]["500"]["verdicts"]:
        assert page.words.count(row["claim"]) == 2  # in the table, and where the figure is
    assert page.words.count("✓ holds") == sum(row["holds"] is True for row in found["timesteps"]["500"]["verdicts"])
    assert "INCONCLUSIVE" not in page.words
    assert "less than 0.25 of what it saves of one of low energy" in page.words  # verdicts are by rules that are told


def test_numbers_on_the_page_are_those_found(whole):
    found, page = whole
    words = " ".join(page.words.split())
    predicted = found["intrinsic"]["predictors"]["perturbation sharpness"]["flow"]
    for row in (predicted, found["tasks"]["policies"][NONE]["forgetting"], found["generated"]["policies"][NONE]["accepted"]):
        assert f"{number(row['value'])} [{number(row['low'])}, {number(row['high'])}]" in words
    assert "Backward transfer 0.51" in words
    assert "a buffer of 20" in words
    assert "3 tasks in all" in words


def test_what_has_no_data_is_left_out():
    page = drawn(made_up.samples(SAMPLES))
    assert page.images == []
    assert len(page.charts) == 3
    for words in ("Three ways", "Task by task", "What the models generate", "Which images", "tasks in all"):
        assert words not in page.words


def test_the_least_table_and_a_single_policy_have_a_page():
    samples = made_up.samples(SAMPLES, 1, (NONE,))
    for name in ("perturbation", "energy@10", "rise", "sharpness", "energy"):
        del samples.columns[name]
    page = drawn(samples, task1=pictures())
    assert page.charts == ["error and rise by energy"]
    assert len(page.images) == report.GALLERY
    assert "say nothing about another training" in page.words
    assert "What replay saved" in page.words
    assert "Figures 6" not in page.words


@pytest.mark.parametrize(
    ("part", "words", "charts"),
    [
        ({"tasks": made_up.tasks()}, "Task by task", 3),
        ({"tasks": made_up.tasks(1)}, "Backward transfer 0.5;", 3),
        ({"generated": made_up.generated()}, "Was Task 1 learnt at all?", 4),
        ({"sheets": made_up.sheets(1, channels=3)}, "Samples of each model, seed 0", 3),
    ],
)
def test_each_part_comes_alone(part, words, charts):
    page = drawn(made_up.samples(SAMPLES), **part)
    assert words in page.words
    assert len(page.charts) == charts
    assert page.words.count("What the models generate") == ("generated" in part or "sheets" in part)


def test_few_densities_are_shown_without_correlations():
    page = drawn(made_up.samples(SAMPLES, 2, densities=5))
    assert "5 samples have all" in page.words
    assert len(page.charts) == 4
    assert "5 samples</th>" not in page.words


def test_the_page_says_at_its_top_that_it_is_inconclusive_and_why():
    page = drawn(made_up.samples(SAMPLES, forgotten=0), generated=made_up.generated(before=[45, 45, 20]))
    top = page.words[: page.words.index("The paper’s claims")]
    assert "INCONCLUSIVE" in top
    assert "seed 2: before Task 2 generated images are recognised at 0.40" in top
    assert "no forgetting to explain" in top
    assert "✗ not learnt" in page.words


def test_claims_that_do_not_show_are_said_not_to():
    samples = made_up.samples(SAMPLES)
    samples.columns["odds"] = -samples["odds"]  # now low energies are forgotten most
    page = drawn(samples)
    assert "✗ The paper’s claim does not show: the higher the energy, the sharper" in page.words
    assert "✗ The paper’s claim does not show: energy tells what is forgotten" in page.words
    assert "✓ The paper’s claim shows: the sharper, the more is forgotten" in page.words


def test_names_of_data_are_escaped():
    samples = made_up.samples(SAMPLES)
    samples.settings["task1"]["source"] = "<script>alert(1)</script>"
    assert "<script>alert(1)</script>" in drawn(samples).words  # as words


@pytest.mark.slow
def test_a_large_experiment_is_drawn_in_seconds():
    """25,000 samples, five policies, three seeds: 20 s at most, of processors, since what else runs is not the page's fault."""
    samples = made_up.samples(25_000, 3, (NONE, "high", "random", "low", "coverage"), densities=500, spread=0.05)
    task1 = Images(np.random.default_rng(0).integers(0, 256, (25_000, 8, 8, 1)).astype(np.uint8), None, None, "made up")
    tasks, generated = made_up.tasks(), made_up.generated(count=1000)
    began = time.process_time()
    found = findings.findings(samples, tasks=tasks, generated=generated)
    page = report.page(samples, found, task1, made_up.sheets())
    assert time.process_time() - began < 20
    assert len(Page(page).charts) == 5
