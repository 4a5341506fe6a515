"""What is found in a table whose truth is known, and the page that shows it."""

import base64
import html.parser
import io
import json

import numpy as np
import pytest
from PIL import Image
from scipy.stats import spearmanr

from diffusion import findings, report
from diffusion.claims import NONE
from diffusion.statistics import Bootstrap
from hopjax.cli.table import Table
from hopjax.data import Images

SAMPLES, SEEDS = 200, 3
INTERVAL = Bootstrap(resamples=200)


@pytest.fixture(scope="module")
def table():
    """Energies 0 … 1; forgetting grows with them; high replay saves half at the top, low replay a little at the bottom, random in all."""
    random = np.random.default_rng(0)
    energy = np.linspace(0, 1, SAMPLES)
    hard = random.normal(1, 0.2, SAMPLES)  # how hard an image is has nothing to do with its energy here
    columns: dict[str, list[np.ndarray]] = {}

    def noise():
        return random.normal(0, 0.01, SAMPLES)

    for seed in range(SEEDS):
        before = hard + noise()
        rise = 0.1 + 0.5 * energy
        found = {
            "seed": np.full(SAMPLES, seed),
            "place": np.arange(SAMPLES),
            "index": np.arange(SAMPLES) + 7,
            "odds": -energy,
            "png_bytes": random.integers(100, 200, SAMPLES),
            "total_variation": random.random(SAMPLES),
            "before@500": before,
            "control@500": hard + noise(),
            "none@500": before + rise + noise(),
            "high@500": before + rise - 0.4 * (energy > 0.8) + noise(),
            "random@500": before + rise - 0.05 + noise(),
            "low@500": before + rise - 0.03 * (energy < 0.2) + noise(),
        }
        for name, column in found.items():
            columns.setdefault(name, []).append(column)
    settings = {
        "plan": {"policies": [NONE, "high", "random", "low"], "timesteps": [500], "buffer": 20, "seeds": [0, 1, 2]},
        "task1": {"source": "made up", "classes": None},
        "task2": {"source": "made up too"},
        "warnings": [],
    }
    return Table({name: np.concatenate(parts) for name, parts in columns.items()}, settings)


@pytest.fixture(scope="module")
def found(table):
    return findings.findings(table, bins=10, interval=INTERVAL)


def test_numbers_are_those_of_the_table(table, found):
    main = found["timesteps"]["500"]
    assert (found["samples"], found["seeds"]) == (SAMPLES, SEEDS)
    seeds = findings.seeds_of(table, 500)
    rises = [float(np.mean(seed.after[NONE] - seed.before)) for seed in seeds]
    assert main["rise"][NONE]["seeds"] == pytest.approx(rises, rel=1e-12)
    assert main["rise"][NONE]["value"] == pytest.approx(np.mean(rises), rel=1e-12)
    assert main["rise"][NONE]["low"] < 0.35 < main["rise"][NONE]["high"]
    assert main["saved"]["high"]["high"]["value"] == pytest.approx(0.4, abs=0.01)
    assert main["saved"]["high"]["low"]["value"] == pytest.approx(0, abs=0.01)
    each = [spearmanr(seed.energy, seed.rise()).statistic for seed in seeds]
    correlation = main["correlations"]["energy and rise"]
    assert correlation["seeds"] == pytest.approx(each, rel=1e-9)
    assert correlation["value"] == pytest.approx(np.tanh(np.mean(np.arctanh(each))), rel=1e-9)
    assert min(each) - 0.01 < correlation["low"] < correlation["value"] < correlation["high"] < 1
    assert abs(main["correlations"]["energy and error before"]["value"]) < 0.2
    bins = main["bins"]["rise"][NONE]
    assert bins["counts"] == [20] * 10
    assert np.all(np.diff(bins["values"]) > 0)


def test_verdicts_follow_from_what_was_put_in(found):
    holds = [row["holds"] for row in found["timesteps"]["500"]["verdicts"]]
    assert holds[:3] == [True, True, True]
    assert len(holds) == 5


def test_findings_are_json_and_a_single_seed_has_an_interval(table):
    rows = table["seed"] == 0
    one = Table({name: table[name][rows] for name in table.columns}, table.settings)
    found = findings.findings(one, bins=5, interval=INTERVAL)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    row = found["timesteps"]["500"]["correlations"]["energy and rise"]
    assert row["low"] < row["value"] < row["high"]


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.pictures, self.words = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.pictures.append(dict(attributes)["src"])
        assert tag != "script"

    def handle_data(self, data):
        self.words += data


def test_the_page_says_the_verdicts_and_shows_pictures(table, found):
    pixels = np.random.default_rng(0).integers(0, 256, (SAMPLES, 6, 6, 1)).astype(np.uint8)
    page = Page(report.page(table, found, Images(pixels, None, None, "made up")).decode())
    for row in found["timesteps"]["500"]["verdicts"]:
        assert row["claim"] in page.words
    assert page.words.count("✓ holds") == sum(row["holds"] is True for row in found["timesteps"]["500"]["verdicts"])
    assert len(page.pictures) == 2 + 2 * report.GALLERY
    for source in page.pictures:
        picture = Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2])))
        assert np.ptp(np.asarray(picture.convert("L"))) > 0
    without = Page(report.page(table, found).decode())
    assert len(without.pictures) == 2
