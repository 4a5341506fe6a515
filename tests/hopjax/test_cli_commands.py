"""What the commands write: numbers against formulas written out here, pages parsed, pictures decoded."""

import base64
import html.parser
import io
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.special import logsumexp
from scipy.stats import kendalltau, spearmanr

from hopjax import data
from hopjax.__main__ import main
from hopjax.cli import app, figures, heights, table
from hopjax.cli import buffer as replay
from hopjax.cli.page import number as for_people

LABELS = np.arange(60) % 4
PICTURE = figures.picture


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder of its own with a small labelled data set, and commands that leave JAX as it is: in double precision, for once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(app, "configure", lambda machine: None)
    monkeypatch.setattr(figures, "picture", lambda draw, *size: b"not drawn")
    # Four prototypes and noise, so that samples have neighbours.
    random = np.random.default_rng(0)
    prototypes = random.integers(40, 216, (4, 6, 6, 1))
    pixels = prototypes[LABELS] + random.integers(-40, 40, (60, 6, 6, 1))
    np.savez("data.npz", images=pixels.astype(np.uint8), labels=LABELS)


@pytest.fixture
def drawn(here, monkeypatch):
    """Drawing takes longer than all the rest: only where it is looked at."""
    monkeypatch.setattr(figures, "picture", PICTURE)


def run(*arguments):
    assert main(list(arguments)) == 0


def energies(*arguments, out="t.npz"):
    run("energies", "data.npz", *arguments, "--out", out)
    return table.read(Path(out))


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def vectors():
    return data.read("data.npz").vectors().astype(np.float64)


class Page(html.parser.HTMLParser):
    """A page's text and pictures; nothing in it may run or be fetched."""

    def __init__(self, path):
        super().__init__()
        self.pictures: list[Image.Image] = []
        self.headings: list[str] = []
        self._within = ""
        text = Path(path).read_text(encoding="utf-8")
        self.text = " ".join(text.split())
        assert "url(" not in text
        assert "@import" not in text
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        self._within = tag
        for name, value in attrs:
            assert not name.startswith("on")
            assert name not in ("href", "srcset", "action", "data", "poster")
            if name == "src":
                head, content = value.split(",", 1)
                assert head == "data:image/png;base64"
                picture = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
                picture.load()
                self.pictures.append(picture)

    def handle_data(self, data):
        if self._within in ("h1", "h2", "h3") and data.strip():
            self.headings.append(data.strip())

    @property
    def charts(self):
        return [picture for picture in self.pictures if picture.width > 500]

    @property
    def thumbnails(self):
        return [picture for picture in self.pictures if picture.width <= 500]

    def check_pictures(self, charts, thumbnails):
        assert len(self.charts) == charts
        assert len(self.thumbnails) == thumbnails
        for picture in self.charts:
            colours = picture.convert("RGB").getcolors(1 << 24)
            assert colours is not None
            assert len(colours) > 20  # something is drawn
        for picture in self.thumbnails:
            assert np.ptp(np.asarray(picture)) > 0


# ---- energies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_the_columns_are_the_theory_s_numbers(precision):
    found = energies("--beta", "40", "--precision", precision, "--epsilon", "0.03", "--sigma", "0.2")
    assert list(found.columns) == [
        *("index", "label", "energy", "excess", "log_leakage", "sharpness", "rise", "log_odds", "log_self_weight"),
        *("nearest", "distance", "sample"),
    ]
    x = unit(vectors())
    logits = 40 * x @ x.T
    others = np.where(np.eye(60, dtype=bool), -np.inf, logits)
    weights = np.exp(logits - logsumexp(logits, axis=1, keepdims=True))
    spread = weights @ np.sum(x**2, axis=1) - np.sum((weights @ x) ** 2, axis=1)
    radial = np.sum(weights * (x @ x.T) ** 2, axis=1) - np.sum(weights * (x @ x.T), axis=1) ** 2
    sharpness = 35 - 40 * (spread - radial)
    slope = 1 - np.sum(x * (weights @ x), axis=1)
    energy = 0.5 - logsumexp(logits, axis=1) / 40
    distances = np.where(np.eye(60, dtype=bool), np.inf, np.linalg.norm(x[:, None] - x[None], axis=2))
    # Images are normalised in single precision. Exponents then carry a few eps·β = 1e-5 of it, and everything is a smooth function of them;
    # a distance is the root of a difference of numbers of order one.
    expected = {
        "energy": (energy, 1e-5),
        "excess": (energy + 0.5, 1e-5),
        "log_leakage": (logsumexp(others, axis=1) - logsumexp(logits, axis=1), 1e-4),
        "log_odds": (logsumexp(others, axis=1) - np.diag(logits), 1e-4),
        "log_self_weight": (np.diag(logits) - logsumexp(logits, axis=1), 1e-4),
        "sharpness": (sharpness, 1e-3),
        "rise": (0.5 * (0.03 * 0.2) ** 2 * (sharpness - 35 * slope), 1e-3 * 0.5 * 0.006**2),
        "distance": (distances.min(axis=1), 1e-5),
    }
    for name, (value, tolerance) in expected.items():
        assert found[name].dtype == precision
        np.testing.assert_allclose(found[name], value, rtol=0, atol=tolerance, err_msg=name)
    assert found["index"].tolist() == list(range(60))
    assert found["label"].tolist() == LABELS.tolist()
    assert found["nearest"].tolist() == distances.argmin(axis=1).tolist()
    assert len(set(found["sample"].tolist())) == 60


def test_the_settings_are_in_the_table():
    settings = energies("--self-weight", "0.6", "--normalise", "centred", "--variant", "mean", "--rotate", "10").settings
    assert settings["command"] == "energies"
    assert settings["beta_rule"] == "a sample's own softmax weight is 0.6 on average (--self-weight)"
    assert [settings[name] for name in ("normalise", "variant", "epsilon", "precision", "device")] == [
        "centred",
        "mean",
        0.05,
        "float32",
        "cpu",
    ]
    assert settings["sigma"] == 35**-0.5
    assert settings["read"]["data"] == "data.npz"
    assert settings["read"]["rotate"] == 10.0
    assert settings["task1"]["samples"] == 60
    assert settings["task1"]["shape"] == [6, 6, 1]
    assert re.fullmatch("[0-9a-f]{64}", settings["task1"]["sha256"])
    assert settings["task1"]["sha256"] != settings["task2"]["sha256"]
    assert set(settings["versions"]) == {"python", "hopjax", "jax", "numpy"}
    assert settings["warnings"] == []
    assert "½ε²σ²" in settings["columns"]["rise"]


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ([], "about 20 of the other samples weigh in on average: perplexity (the default)"),
        (["--perplexity", "5"], "about 5 of the other samples weigh in on average: perplexity (--perplexity)"),
        (["--self-weight", "0.5"], "a sample's own softmax weight is 0.5 on average (--self-weight)"),
        (["--beta", "12"], "given by --beta"),
        (
            ["--timestep", "300", "--model-scale", "3"],
            "signal-to-noise ratio of timestep 300 (--timestep), pixels times 3 being the model's",
        ),
    ],
)
def test_rules_for_beta(rule, words, capsys):
    found = energies(*rule)
    beta = found.settings["beta"]
    assert found.settings["beta_rule"] == words
    assert f"β = {beta:.5g}: {words}" in capsys.readouterr().out
    x = vectors()
    logits = beta * unit(x) @ unit(x).T
    others = np.where(np.eye(60, dtype=bool), -np.inf, logits)
    if "perplexity" in words:
        p = np.exp(others - logsumexp(others, axis=1, keepdims=True))
        entropy = -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=1)
        # The root is found to 1e-4 in log β, of which the mean entropy is a function with a slope of order one.
        assert np.exp(entropy.mean()) == pytest.approx(20 if not rule else 5, rel=1e-3)
    elif rule[0] == "--self-weight":
        assert np.exp(found["log_self_weight"]).mean() == pytest.approx(0.5, rel=1e-3)
    elif rule[0] == "--beta":
        assert beta == 12
    else:
        alphas = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
        ratio = alphas[300] / (1 - alphas[300])
        # A model whose pixels are 3 times these sees norms of 3·|x| where they were divided out.
        assert beta == pytest.approx(ratio * 9 * np.mean(np.sum(x**2, axis=1)), rel=1e-5)


@pytest.mark.parametrize("variant", ["mean", "density"])
def test_variants_of_the_energy(variant):
    found = energies("--beta", "1.5", "--normalise", "none", "--variant", variant)
    x, others = vectors(), vectors()[LABELS == 0]

    def energy(states, memories):
        if variant == "mean":
            return 0.5 * np.sum(states**2, axis=1) - (logsumexp(1.5 * states @ memories.T, axis=1) - np.log(len(memories))) / 1.5
        return -logsumexp(-0.75 * np.sum((states[:, None] - memories[None]) ** 2, axis=2), axis=1) / 1.5

    # |x|² is about 9: a few eps of it.
    np.testing.assert_allclose(found["energy"], energy(x, x), rtol=0, atol=1e-5)
    found = energies("--beta", "1.5", "--normalise", "none", "--variant", variant, "--task2-classes", "0")
    x = x[LABELS != 0]
    np.testing.assert_allclose(found["energy_change"], energy(x, others) - energy(x, x), rtol=0, atol=2e-5)


@pytest.mark.parametrize("variant", ["paper", "mean", "density"])
def test_where_norms_differ_the_energy_itself_ranks(variant, capsys):
    found = energies("--beta", "1.5", "--normalise", "none", "--variant", variant, out="a.csv")
    ranked = np.argsort(-found["energy"], kind="stable")
    # They would rank otherwise where norms count.
    assert (spearmanr(found["log_odds"], -found["energy"])[0] > 0.999) == (variant == "density")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(f"highest energy, forgotten first: {ranked[0]} ")
    assert lines[2].startswith(f"lowest energy, kept longest: {ranked[-1]} ")
    other = energies("--beta", "40", out="b.csv")
    capsys.readouterr()
    run("compare", "a.csv", "b.csv", "--out", "ranks.npz")
    correlation = spearmanr(found["energy"], other["energy"])[0]
    said = float(capsys.readouterr().out.partition("energy: Spearman ")[2][:6])
    assert said == pytest.approx(correlation, abs=2e-3)  # energies tie where log odds do not
    ranks = table.read(Path("ranks.npz"))
    assert ranks["index"][np.argsort(ranks["rank_a"])][:9].tolist() == ranked[:9].tolist()
    if variant == "paper":
        run("buffer", "data.npz", "--beta", "1.5", "--normalise", "none", "--size", "9", "--policy", "highest", "--out", "b.npz")
        assert table.read(Path("b.npz"))["index"].tolist() == ranked[:9].tolist()
        assert "The median of E is" in Path("b.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("drawn")
def test_at_large_beta_the_page_goes_by_log_odds(capsys):
    found = energies("--beta", "1e5")
    x = unit(vectors())
    odds = logsumexp(np.where(np.eye(60, dtype=bool), -np.inf, 1e5 * x @ x.T), axis=1) - 1e5 * np.sum(x**2, axis=1)
    assert odds.max() < -200
    assert not found["excess"].any()
    # Exponents of 1e5 are rounded by about eps of it.
    np.testing.assert_allclose(found["log_odds"], odds, rtol=0, atol=0.1)
    words = "others weigh so little on 100.00% of the samples that their excess has no digits left: log_odds still tells them apart"
    assert words in found.settings["warnings"]
    output, errors = capsys.readouterr()
    assert f"warning: {words}" in errors
    ranked = np.argsort(odds)
    assert output.splitlines()[1].startswith(f"highest energy, forgotten first: {ranked[0]} ")
    text = Page("t.html").text
    for row in (ranked[0], ranked[-1]):
        exponent = (odds[row] - np.log(1e5)) / np.log(10)
        assert f"·10{str(int(np.floor(exponent))).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}" in text
    medians = np.median(odds.reshape(15, 4), axis=0)  # by class
    assert re.findall(r"<td>(\d)</td><td class=\"n\">15</td>", text) == [str(label) for label in np.argsort(medians)]
    assert "they cannot be compared with the energy at so large a β" in text
    assert "rank correlation of energy" not in text


def test_heights_are_numbers_for_people_at_every_beta():
    scores = np.array([-700.0, -3.0, 0.0, 20.0, 40.0])
    shown = heights.Heights("E", scores, 2.0)
    expected = np.logaddexp(0, -scores) / 2
    np.testing.assert_allclose(10 ** shown.places(), expected, rtol=1e-12)
    assert [shown.text(score) for score in scores] == [for_people(-value) for value in expected]
    assert shown.text(5000.0) == "−1.68·10⁻²¹⁷²"  # e⁻⁵⁰⁰⁰/2
    assert heights.Heights("E", scores, None).text(-12.5) == "−12.5"


def change(task1, task2, beta):
    return -(logsumexp(beta * task1 @ task2.T, axis=1) - logsumexp(beta * task1 @ task1.T, axis=1)) / beta


def test_task_2_from_classes_of_the_same_data():
    x = unit(vectors())
    found = energies("--classes", "1,3", "--task2-classes", "0", "--beta", "30")
    places = np.flatnonzero(np.isin(LABELS, [1, 3]))
    assert found["index"].tolist() == places.tolist()
    assert set(LABELS[found["nearest"]]) <= {1, 3}
    nearest = np.linalg.norm(x[found["nearest"]] - x[places], axis=1)
    np.testing.assert_allclose(found["distance"], nearest, atol=1e-5)
    np.testing.assert_allclose(found["energy_change"], change(x[places], x[LABELS == 0], 30), atol=1e-5)
    # All the others are Task 1 where it is not named.
    rest = energies("--task2-classes", "0", "--beta", "30")
    assert rest["index"].tolist() == np.flatnonzero(LABELS != 0).tolist()
    np.testing.assert_allclose(rest["energy_change"], change(x[LABELS != 0], x[LABELS == 0], 30), atol=1e-5)
    # Another data set gives the same, and its classes can be chosen too.
    other = energies("--classes", "1,3", "--task2", "data.npz", "--task2-classes", "0", "--beta", "30")
    assert other["energy_change"].tobytes() == found["energy_change"].tobytes()


def test_task_2_by_rotation():
    images = data.read("data.npz")
    x, turned = unit(vectors()), unit(data.rotated(images, 30).vectors().astype(np.float64))
    found = energies("--rotate", "30", "--beta", "30")
    np.testing.assert_allclose(found["energy_change"], change(x, turned, 30), atol=1e-5)
    assert found.settings["task2"]["source"] == "data.npz, rotated by 30°"


@pytest.mark.usefixtures("drawn")
def test_the_page_of_energies(capsys):
    found = energies("--beta", "40", "--rotate", "30")
    page = Page("t.html")
    # Two charts, one more for Task 2; galleries of the highest and lowest, and of the largest and smallest ΔE.
    page.check_pictures(3, 4 * 24)
    assert page.headings == [
        "Which of these samples will be forgotten first?",
        "Highest energy: these will be forgotten first",
        "Lowest energy: these will be kept longest",
        "How high the samples lie",
        "High energy, sharp basin, large rise",
        "What Task 2 does",
        "Largest ΔE: Task 2 forgets these most",
        "Smallest ΔE: Task 2 forgets these least",
    ]
    pixels = data.read("data.npz").pixels
    ranked = np.argsort(-found["energy"])
    assert np.array_equal(np.asarray(page.thumbnails[0]), pixels[ranked[0], :, :, 0])
    assert np.array_equal(np.asarray(page.thumbnails[24]), pixels[ranked[-1], :, :, 0])
    assert np.array_equal(np.asarray(page.thumbnails[48]), pixels[np.argmax(found["energy_change"]), :, :, 0])
    correlation = spearmanr(found["energy"], found["rise"])[0]
    assert f"rank correlation {correlation:.3g}".replace("-", "−") in page.text
    assert found.settings["task1"]["sha256"] in page.text
    output = capsys.readouterr().out.splitlines()
    assert output[1].startswith(f"highest energy, forgotten first: {ranked[0]} ({LABELS[ranked[0]]})")
    assert output[2].startswith(f"lowest energy, kept longest: {ranked[-1]} ({LABELS[ranked[-1]]})")
    assert output[3:] == ["table: t.npz", "page: t.html"]


@pytest.mark.usefixtures("drawn")
def test_rows_of_numbers_and_data_without_labels():
    np.save("rows.npy", np.random.default_rng(1).normal(size=(30, 5)).astype(np.float32))
    run("energies", "rows.npy", "--out", "rows.csv", "--page", "elsewhere/page.html")
    found = table.read(Path("rows.csv"))
    assert "label" not in found
    page = Page("elsewhere/page.html")
    page.check_pictures(2, 0)
    assert "there is nothing to look at" in page.text


@pytest.mark.usefixtures("drawn")
def test_colours_and_floats_are_shown_as_they_are():
    random = np.random.default_rng(2)
    pixels = random.random((8, 4, 5, 3), dtype=np.float32)
    np.save("colour.npy", pixels)
    run("energies", "colour.npy", "--out", "t.npz")
    page = Page("t.html")
    page.check_pictures(2, 8)  # as many as there are, none twice
    first = np.argmin(table.read(Path("t.npz"))["log_leakage"])
    assert np.array_equal(np.asarray(page.thumbnails[0]), np.rint(255 * pixels[first]).astype(np.uint8))


@pytest.mark.usefixtures("drawn")
def test_warnings_are_in_the_table_on_the_page_and_on_the_screen(capsys):
    folder = Path("pictures")
    folder.mkdir()
    for number, pixels in enumerate(np.random.default_rng(3).integers(1, 256, (9, 4, 4), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "notes.txt").write_text("hello")
    run("energies", "pictures", "--skip-bad", "--epsilon", "2", "--beta", "3e6", "--out", "t.npz")
    found = table.read(Path("t.npz")).settings
    errors = capsys.readouterr().err
    page = Page("t.html")
    words = (
        "passed over what is no picture",
        "moves a sample by 2 of its norm",
        "take --precision float64",
        "left out of pictures: 1",
        "others weigh so little on 100.00% of the samples that their excess has no digits left",
    )
    assert len(found["warnings"]) == len(words)
    for line, part in zip(found["warnings"], words, strict=True):
        assert part in line
        assert f"warning: {line}" in errors
        assert part in page.text
    assert "broken.png" in found["task1"]["skipped"][0]


@pytest.mark.usefixtures("drawn")
def test_classes_of_any_name_are_drawn_and_written():
    names = ["$x_{$", "猫", "no utf-8 \udce9", "a & <b>"]
    random = np.random.default_rng(5)
    for name in names:
        folder = Path("classes") / name
        folder.mkdir(parents=True)
        for number in range(3):
            Image.fromarray(random.integers(1, 256, (4, 4), dtype=np.uint8)).save(folder / f"{number}.png")
    for suffix in ("csv", "npz", "parquet"):
        run("energies", "classes", "--beta", "20", "--out", f"t.{suffix}")
        found = table.read(Path(f"t.{suffix}"))
        assert set(found.settings["task1"]["classes"]) == set(names)
        assert "no utf-8 \\udce9/0.png" in found["file"].tolist()
    run("buffer", "classes", "--beta", "20", "--size", "4", "--policy", "lowest", "--out", "b.csv")
    for file in ("t.html", "b.html"):
        assert "no utf-8 \\udce9" in Page(file).text
    run("compare", "t.csv", "t.npz")
    assert "Without pictures" not in Page("results/compare.html").text


def test_the_table_is_there_if_the_page_cannot_be_drawn(monkeypatch):
    def broken(draw, *size):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(figures, "picture", broken)
    with pytest.raises(RuntimeError, match="no fonts"):
        main(["energies", "data.npz", "--beta", "20", "--out", "t.csv"])
    assert len(table.read(Path("t.csv"))) == 60


def test_what_is_left_out_moves_no_index():
    pixels = np.random.default_rng(4).integers(1, 256, (9, 4, 4, 1), dtype=np.uint8)
    floats = pixels.astype(np.float32)
    floats[2, 0, 0] = np.nan
    np.save("floats.npy", floats)
    folder = Path("pictures")
    folder.mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image[..., 0]).save(folder / f"{number}.png")
    (folder / "2.png").write_bytes(b"")
    kept = [0, 1, 3, 4, 5, 6, 7, 8]
    x = unit(pixels.reshape(9, -1).astype(float))
    nearest = np.argmax(np.where(np.eye(9, dtype=bool) | (np.arange(9) == 2), -1, x @ x.T), axis=1)
    for name in ("floats.npy", "pictures"):
        run("energies", name, "--skip-bad", "--beta", "20", "--out", "t.csv")
        found = table.read(Path("t.csv"))
        assert found["index"].tolist() == kept
        assert found["nearest"].tolist() == nearest[kept].tolist()
        run("buffer", name, "--skip-bad", "--beta", "20", "--size", "100%", "--policy", "lowest", "--out", "b.csv")
        assert sorted(table.read(Path("b.csv"))["index"]) == kept
    assert found["file"].tolist() == [f"{number}.png" for number in kept]
    chosen = table.read(Path("b.csv"))
    assert chosen["file"].tolist() == [f"{number}.png" for number in chosen["index"]]


def test_black_images_are_left_out_and_listed(capsys):
    pixels = np.random.default_rng(6).integers(1, 256, (12, 9, 9, 1), dtype=np.uint8)
    pixels[3] = 0
    pixels[5] = 0
    pixels[5, 0, 0] = 255  # is turned out of the picture
    np.save("black.npy", pixels)
    kept = [row for row in range(12) if row != 3]
    run("energies", "black.npy", "--skip-bad", "--rotate", "45", "--beta", "20", "--out", "t.csv")
    found = table.read(Path("t.csv"))
    assert found["index"].tolist() == kept
    lost = "is black (all zero) and has no direction"
    assert found.settings["task1"]["skipped"] == [f"image 3 of black.npy: {lost}"]
    assert found.settings["task2"]["skipped"] == [f"image {row} of black.npy, rotated by 45°: {lost}" for row in (3, 5)]
    assert "left out of black.npy: 1" in capsys.readouterr().err
    run("buffer", "black.npy", "--skip-bad", "--beta", "20", "--size", "100%", "--policy", "lowest", "--out", "b.csv")
    assert sorted(table.read(Path("b.csv"))["index"]) == kept
    run("sensitivity", "black.npy", "--skip-bad", "--perplexities", "3")
    run("compare", "t.csv", "t.csv")
    assert "Without pictures" not in Path("results/compare.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("suffix", ["csv", "npz", "parquet"])
def test_files_whose_names_are_no_utf_8(suffix):
    name = "data\udce9.npz"
    Path("data.npz").rename(name)
    run("energies", name, "--beta", "20", "--out", f"t\udce9.{suffix}")
    found = table.read(Path(f"t\udce9.{suffix}"))
    assert found.settings["read"]["data"] == name
    assert "data\\udce9.npz" in Path("t\udce9.html").read_text(encoding="utf-8")
    run("compare", f"t\udce9.{suffix}", f"t\udce9.{suffix}")
    assert "Without pictures" not in Path("results/compare.html").read_text(encoding="utf-8")


def test_the_same_run_gives_the_same_bytes():
    energies("--rotate", "10", out="a.parquet")
    energies("--rotate", "10", out="b.parquet")
    assert Path("a.parquet").read_bytes() == Path("b.parquet").read_bytes()
    assert Path("a.html").read_bytes() == Path("b.html").read_bytes()
    assert str(Path.cwd()) not in Path("a.html").read_text(encoding="utf-8")


# ---- buffer --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", list(replay.WORDS))
def test_buffers_are_those_of_the_policies(policy, monkeypatch):
    whole = energies("--beta", "40", "--rotate", "20")
    monkeypatch.setattr(figures, "picture", PICTURE)
    run("buffer", "data.npz", "--beta", "40", "--rotate", "20", "--size", "15%", "--policy", policy, "--seed", "3", "--out", "b.npz")
    found = table.read(Path("b.npz"))
    assert len(found) == 9
    assert found.settings["policy"] == policy
    assert found.settings["seed"] == 3
    assert len(set(found["index"].tolist())) == 9
    for name in ("label", "energy", "energy_change", "sample"):
        assert found[name].tobytes() == whole[name][found["index"]].tobytes()
    ranked = np.argsort(-whole["energy"], kind="stable").tolist()
    chosen = found["index"].tolist()
    if policy == "highest":
        assert chosen == ranked[:9]
    elif policy == "lowest":
        assert chosen == ranked[::-1][:9]
    elif policy == "random":
        assert chosen == np.random.default_rng(3).permutation(60)[:9].tolist()
    elif policy == "stratified":
        assert len({ranked.index(place) // 6 for place in chosen}) == 9
    elif policy == "class-balanced":
        assert sorted(np.bincount(found["label"]).tolist()) == [2, 2, 2, 3]
        assert set(chosen[:4]) == {next(place for place in ranked if LABELS[place] == label) for label in range(4)}
    else:
        # The first place by the formulas written out: Eq. (93), summed over all samples.
        x = unit(vectors())
        log_pi = 40 * x @ x.T - logsumexp(40 * x @ x.T, axis=1, keepdims=True)
        gains = (np.logaddexp(0, log_pi + 40 * whole["energy_change"][:, None]) - np.logaddexp(0, log_pi)) / 40
        totals = gains.sum(axis=0)
        assert totals[chosen[0]] >= totals.max() * (1 - 1e-4)  # single precision
    page = Page("b.html")
    page.check_pictures(2, 9)
    pixels = data.read("data.npz").pixels
    assert all(np.array_equal(np.asarray(shown), pixels[place, :, :, 0]) for shown, place in zip(page.thumbnails, chosen, strict=True))
    assert f"“{policy}”" in page.text


@pytest.mark.parametrize(("task2", "column"), [([], "rise"), (["--rotate", "20"], "energy_change")])
def test_what_a_buffer_saves_is_what_it_says(task2, column, capsys):
    run("buffer", "data.npz", "--beta", "40", *task2, "--size", "6", "--policy", "coverage", "--out", "b.npz")
    line = capsys.readouterr().out.splitlines()[1]
    chosen, random, spread, bound = (float(number) / 100 for number in re.findall(r"([\d.]+)%", line))
    whole = energies("--beta", "40", *task2)
    x = unit(vectors())
    log_sums = logsumexp(40 * x @ x.T, axis=1)

    def saved(places):
        log_pi = logsumexp(40 * x @ x[places].T, axis=1) - log_sums
        rise = whole[column].astype(np.float64)
        return ((np.logaddexp(0, log_pi + 40 * rise) - np.logaddexp(0, log_pi)) / 40).sum() / rise[rise > 0].sum()

    others = [saved(np.random.default_rng(1 + trial).permutation(60)[:6]) for trial in range(8)]
    # Two decimals of a percentage are shown.
    assert chosen == pytest.approx(saved(table.read(Path("b.npz"))["index"]), abs=1e-4)
    assert random == pytest.approx(np.mean(others), abs=1e-4)
    assert spread == pytest.approx(np.std(others, ddof=1), abs=1e-4)
    # With seven degrees of freedom 0.15% of Student's distribution lie above 4.4421; tables give 4.207 for 0.2% and 4.785 for 0.1%.
    assert bound == pytest.approx(4.442125 * (1 + 1 / 8) ** 0.5 * np.std(others, ddof=1), rel=5e-3)  # three digits are shown
    assert ("it is better than chance" in line) == (chosen > random + bound)
    assert line.endswith("away with probability 0.003)")


def test_random_buffers_are_no_better_than_chance():
    random = np.random.default_rng(0)
    draws = random.normal(size=(20_000, 9))
    said = []
    for chosen, *others in draws:
        gained = replay.Gains(np.arange(1), np.array([chosen]), np.array(others)[:, None], np.ones(1))
        said.append("no better than" not in replay.saved(table.Table({"rise": np.ones(1)}, {}), gained))
    # Three standard errors of a binomial proportion; three standard deviations of eight would be exceeded in 2.6%.
    assert abs(np.mean(said) - 0.003) < 3 * (0.003 / 20_000) ** 0.5


def test_without_labels_a_buffer_has_no_classes():
    np.save("rows.npy", np.random.default_rng(7).integers(1, 256, (20, 3, 3, 1), dtype=np.uint8))
    run("buffer", "rows.npy", "--beta", "20", "--size", "4", "--policy", "lowest", "--out", "b.csv")
    run("buffer", "data.npz", "--beta", "20", "--size", "4", "--policy", "lowest", "--out", "c.csv")
    said = [Path(file).read_text(encoding="utf-8").partition("<h1>")[2].partition("<details>")[0] for file in ("b.html", "c.html")]
    assert ["share of each class" in text.lower() for text in said] == [False, True]
    assert not re.search("class(?!=)", said[0])


def test_the_smallest_data():
    with np.load("data.npz") as found:
        np.save("four.npy", found["images"][:4])
    run("energies", "four.npy")
    assert len(table.read(Path("results/energies.parquet"))) == 4
    run("buffer", "four.npy", "--size", "1%", "--policy", "coverage")
    assert len(table.read(Path("results/buffer.parquet"))) == 1


def test_nothing_to_save_is_no_error():
    run("buffer", "data.npz", "--task2", "data.npz", "--size", "5", "--policy", "coverage", "--out", "b.csv")
    assert len(table.read(Path("b.csv"))) == 5


# ---- compare -------------------------------------------------------------------------------------------------------------


def test_two_settings_compared(capsys, monkeypatch):
    a, b = energies("--beta", "40", out="a.csv"), energies("--beta", "5", "--normalise", "centred", out="b.parquet")
    monkeypatch.setattr(figures, "picture", PICTURE)
    capsys.readouterr()
    run("compare", "a.csv", "b.parquet", "--out", "ranks.npz", "--page", "c.html")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "60 samples are in both"
    odds = [table["log_odds"] for table in (a, b)]
    assert lines[1] == f"energy: Spearman {spearmanr(*odds)[0]:.4f}, Kendall {kendalltau(*odds)[0]:.4f}"
    assert (
        lines[2] == f"predicted rise: Spearman {spearmanr(a['rise'], b['rise'])[0]:.4f}, Kendall {kendalltau(a['rise'], b['rise'])[0]:.4f}"
    )
    assert "differs: beta: 40 → 5" in lines
    assert "differs: normalise: unit → centred" in lines
    assert not any("sha256" in line for line in lines)
    ranks = table.read(Path("ranks.npz"))
    for side, found in (("rank_a", a), ("rank_b", b)):
        rank = np.empty(60, int)
        rank[np.argsort(-found["energy"], kind="stable")] = np.arange(1, 61)
        assert ranks[side].tolist() == rank[ranks["index"]].tolist()
    moves = np.abs(ranks["rank_b"] - ranks["rank_a"])
    assert np.all(np.diff(moves) <= 0)
    first = f"{ranks['index'][0]}: {ranks['rank_a'][0]} → {ranks['rank_b'][0]}"
    assert f"moved most: {first}" in lines[3]
    page = Page("c.html")
    higher = int(np.sum(ranks["rank_b"] < ranks["rank_a"]))
    lower = int(np.sum(ranks["rank_b"] > ranks["rank_a"]))
    page.check_pictures(1, min(24, higher) + min(24, lower))
    highest = next(row for row in range(60) if ranks["rank_b"][row] < ranks["rank_a"][row])
    assert np.array_equal(np.asarray(page.thumbnails[0]), data.read("data.npz").pixels[ranks["index"][highest], :, :, 0])


@pytest.mark.usefixtures("drawn")
def test_the_same_table_twice(capsys):
    energies(out="a.csv")
    run("compare", "a.csv", "a.csv")
    lines = capsys.readouterr().out.splitlines()
    assert "energy: Spearman 1.0000, Kendall 1.0000" in lines
    assert not any(line.startswith("differs") for line in lines)
    assert "Nothing: both tables were made with the same settings" in Page("results/compare.html").text


@pytest.mark.usefixtures("drawn")
def test_two_sets_of_memories_are_compared_on_the_samples_in_both(capsys):
    energies("--beta", "40", out="a.csv")
    energies("--beta", "40", "--classes", "1,2", out="b.csv")
    energies("--beta", "40", "--limit", "20", "--classes", "0,1,2", out="c.csv")
    capsys.readouterr()
    run("compare", "a.csv", "b.csv")
    assert capsys.readouterr().out.startswith("30 samples are in both; 30 of A and 0 of B are left out\n")
    assert "30 samples of A and 0 of B are not in the other table" in Page("results/compare.html").text
    run("compare", "b.csv", "c.csv", "--out", "ranks.npz")
    assert capsys.readouterr().out.startswith("10 samples are in both; 20 of A and 5 of B are left out\n")
    ranks = table.read(Path("ranks.npz"))
    assert sorted(ranks["rank_a"]) == list(range(1, 11))
    assert set(LABELS[ranks["index"]]) == {1, 2}
    assert ranks["index"].tolist() == ranks["index_b"].tolist()


def test_copies_of_a_sample_are_told_apart_by_their_order(capsys):
    with np.load("data.npz") as found:
        pixels = found["images"]
    np.save("twice.npy", np.concatenate([pixels[:10], pixels[:10], pixels[:1]]))
    for out in ("a.csv", "b.csv"):
        run("energies", "twice.npy", "--beta", "10", "--out", out)
    capsys.readouterr()
    run("compare", "a.csv", "b.csv", "--out", "ranks.npz")
    assert capsys.readouterr().out.startswith("21 samples are in both\n")
    ranks = table.read(Path("ranks.npz"))
    assert ranks["index"].tolist() == ranks["index_b"].tolist()
    assert sorted(ranks["index"]) == list(range(21))


def test_tables_of_different_samples_are_refused(capsys):
    energies(out="a.csv")
    run("energies", "digits", "--limit", "50", "--out", "b.csv")
    run("buffer", "data.npz", "--size", "5", "--policy", "lowest", "--out", "c.csv")
    capsys.readouterr()
    assert main(["compare", "a.csv", "b.csv"]) == 2
    assert capsys.readouterr().err == (
        "error: a.csv (data.npz) and b.csv (digits) have 0 samples in common, need 3: compare tables of the same images, read alike\n"
    )
    assert main(["compare", "a.csv", "c.csv"]) == 2
    assert (
        capsys.readouterr().err == "error: c.csv: was written by `buffer`, without log odds: compare takes tables that `energies` wrote\n"
    )


def test_the_pictures_of_a_task_are_found_again():
    np.savez("later.npz", images=np.zeros((6, 6, 6, 1), np.uint8) + 9, labels=np.arange(6) % 2)
    energies("--beta", "40", "--classes", "1,2", "--task2", "later.npz", "--task2-classes", "1", out="a.csv")
    energies("--beta", "5", out="b.csv")
    Path("later.npz").unlink()
    run("compare", "a.csv", "b.csv", "--page", "c.html")
    assert "Without pictures" not in Path("c.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("drawn")
def test_how_far_the_ranking_depends_on_the_settings(capsys):
    run("sensitivity", "data.npz", "--perplexities", "12,4", "--out", "s.npz", "--page", "s.html")
    found = table.read(Path("s.npz"))
    views = [line.partition(": β = ") for line in found.settings["views"]]
    assert [name for name, *_ in views] == [f"{name}, perplexity {p}" for name in ("unit", "none", "centred") for p in (4, 12)]
    rows = vectors()
    moved = {"unit": unit(rows), "none": rows, "centred": unit(rows - rows.mean(axis=0))}
    energy = [
        0.5 * np.sum(x**2, axis=1) - logsumexp(beta * x @ x.T, axis=1) / beta
        for name, _, digits in views
        for x, beta in [(moved[name.split(",")[0]], float(digits))]
    ]
    assert len(found) == 15
    for a, b, correlation, shared in zip(found["a"], found["b"], found["spearman"], found["shared"], strict=True):
        # β is shown to four digits: neighbours in rank may change places.
        assert abs(correlation - spearmanr(energy[a], energy[b]).statistic) < 0.01
        highest = [set(np.argsort(-energy[place])[:6]) for place in (a, b)]
        assert abs(shared - len(highest[0] & highest[1]) / 6) < 0.2
    page = Page("s.html")
    assert len(page.pictures) == 1
    assert "against unit, perplexity 12" in page.text.lower()
    said = capsys.readouterr().out
    assert said.count("Spearman down to") == 3
    assert f"{found['spearman'].min():.3f}" in said


@pytest.mark.parametrize("lost", ["gone", "changed"])
def test_without_the_data_there_is_a_page_without_pictures(lost, monkeypatch):
    energies("--beta", "40", out="a.csv")
    energies("--beta", "5", out="b.csv")
    monkeypatch.setattr(figures, "picture", PICTURE)
    with np.load("data.npz") as found:
        pixels, labels = found["images"].copy(), found["labels"]
    Path("data.npz").unlink()
    if lost == "changed":
        pixels[0] ^= 1
        np.savez("data.npz", images=pixels, labels=labels)
    run("compare", "a.csv", "b.csv", "--page", "c.html")
    page = Page("c.html")
    page.check_pictures(1, 0)
    assert ("does not exist" if lost == "gone" else "has changed since") in page.text
    assert "Index: rank in A → rank in B." in page.text


# ---- The screen ----------------------------------------------------------------------------------------------------------


def test_long_runs_tell_how_far_they_are(monkeypatch, capsys):
    from hopjax import tiled
    from hopjax.cli import progress

    monkeypatch.setattr(tiled, "stream", partial(tiled.stream, tile=tiled.Tile(20, 16)))
    monkeypatch.setattr(progress, "QUIET", 0.0)
    energies("--beta", "40")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("energies")]
    assert len(lines) == 2  # nothing is said of the last block: it is done
    for done, line in zip((20, 40), lines, strict=True):
        assert re.fullmatch(rf"energies: {done} of 60, [\d.]+ [kMG]?pairs/s, \d+ s left", line)


def test_terminals_get_a_bar_that_goes_away(monkeypatch):
    from rich.console import Console

    from hopjax.cli import progress

    shown = io.StringIO()
    terminal = partial(Console, file=shown, force_terminal=True, width=120, _environ={"TERM": "xterm"})
    monkeypatch.setattr(progress, "Console", lambda stderr, highlight: terminal(highlight=highlight))
    energies("--perplexity", "5")
    output = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", shown.getvalue())
    for words in ("reading data.npz", "looking for β", "drawing"):
        assert words in output
    assert re.search(r"energies .* 60/60 [\d.]+ [kM]?pairs/s 0:00:00", output)


def test_speeds_and_durations_are_for_people():
    from hopjax.cli.progress import duration, speed

    assert [speed(rate, "pairs") for rate in (0.5, 12.0, 3.21e9)] == ["0.5 pairs/s", "12 pairs/s", "3.21 Gpairs/s"]
    assert [duration(seconds) for seconds in (3.2, 61.0, 7300.0)] == ["3 s", "1 min 1 s", "2 h 1 min"]
