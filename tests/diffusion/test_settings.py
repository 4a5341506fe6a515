"""Settings: there and back through JSON, and one line for each mistake."""

import dataclasses
import json
import typing

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion.config import PRESETS as NETWORKS
from diffusion.layout import Layout
from diffusion.objective import Denoising
from diffusion.optimiser import Adafactor, AdamW
from diffusion.schedules import CosineSchedule, LinearSchedule, Prediction, ScaledLinearSchedule
from diffusion.settings import PRESETS, Length, Network, Noise, Settings, difference

fractions = st.floats(0, 0.99)
positive = st.floats(1e-6, 1e3)

settings = st.builds(
    Settings,
    st.builds(Network, st.sampled_from(list(NETWORKS)), fractions, st.sampled_from(["float32", "bfloat16"]), st.booleans()),
    st.builds(
        Noise,
        st.sampled_from(["linear", "scaled-linear", "cosine"]),
        st.integers(2, 4000),
        st.sampled_from([kind.value for kind in Prediction]),
    ),
    st.builds(AdamW, positive, st.integers(0, 9999), fractions, fractions, positive, st.sampled_from(["float32", "bfloat16"]))
    | st.builds(Adafactor, positive, st.integers(0, 9999), fractions, fractions, positive),
    st.builds(
        Length,
        st.integers(1, 10**7),
        st.integers(1, 9999),
        fractions,
        st.integers(0, 2**60),
        st.none() | st.floats(0.01, 0.99),
    ),
    st.builds(Layout, st.none() | st.integers(1, 64), st.integers(1, 64)),
)


@given(settings)
def test_settings_go_through_json_and_back(chosen):
    there = json.loads(json.dumps(chosen.to_json()))
    assert Settings.from_json(there) == chosen
    assert difference(there, chosen.to_json()) == []


@given(settings, settings)
def test_differences_name_what_differs_and_nothing_else(one, other):
    lines = difference(one.to_json(), other.to_json())
    expected = {
        f"{group.name}.{field.name}"
        for group in dataclasses.fields(Settings)
        for side in (one, other)
        for field in dataclasses.fields(getattr(side, group.name))
        if getattr(getattr(one, group.name), field.name, None) != getattr(getattr(other, group.name), field.name, None)
    }
    if type(one.optimiser) is not type(other.optimiser):
        expected.add("optimiser.kind")
    assert sorted(line.partition(":")[0] for line in lines) == sorted(expected)


def test_the_usual_kind_is_written_as_it_was_before_there_were_others():
    assert "kind" not in Settings().to_json()["optimiser"]
    assert Settings(optimiser=Adafactor(1e-3)).to_json()["optimiser"] == {"kind": "adafactor", **dataclasses.asdict(Adafactor(1e-3))}
    before = {"learning_rate": 2e-4, "warmup": 500, "decay": 0.0, "weight_decay": 0.01, "clip": 1.0}
    assert Settings.from_json({"optimiser": before}) == Settings()


def test_a_difference_shows_both_values():
    before, now = Settings().to_json(), Settings(length=Length(steps=7), noise=Noise("cosine")).to_json()
    assert difference(before, now) == ['noise.schedule: "linear", now "cosine"', "length.steps: 20000, now 7"]
    assert difference({"a": {"b": 1}}, {"a": None, "c": [2]}) == ['a: {"b": 1}, now null', "c: null, now [2]"]


def test_what_is_left_out_has_its_default():
    assert Settings.from_json({}) == Settings()
    assert Settings.from_json({"length": {"steps": 3}}) == Settings(length=Length(steps=3))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([], r"settings must be an object of named values, got \[\]"),
        ({"lenght": {}}, r"settings = 'lenght' is not known: did you mean 'length'\?"),
        ({"length": {"stesp": 3}}, r"settings.length = 'stesp' is not known: did you mean 'steps'\?"),
        ({"length": {"zzz": 3}}, r"settings.length = 'zzz' is not known: take one of steps, batch_size, ema, seed, replay_ratio"),
        ({"length": 3}, r"settings.length must be an object of named values, got 3"),
        ({"length": {"steps": 3.5}}, r"settings.length.steps = 3.5 must be int"),
        ({"length": {"steps": True}}, r"settings.length.steps = true must be int"),
        ({"length": {"steps": None}}, r"settings.length.steps = null must be int"),
        ({"length": {"ema": "much"}}, r'settings.length.ema = "much" must be float'),
        ({"length": {"replay_ratio": []}}, r"settings.length.replay_ratio = \[\] must be float or None"),
        ({"network": {"remat": 1}}, r"settings.network.remat = 1 must be bool"),
        ({"network": {"dtype": "float16"}}, r"dtype = 'float16' is not known: did you mean 'bfloat16'\?"),
        ({"network": {"network": "digit"}}, r"network = 'digit' is not known: did you mean 'digits'\?"),
        ({"noise": {"schedule": "quartic"}}, r"schedule = 'quartic' is not known: take one of linear, scaled-linear, cosine"),
        ({"noise": {"prediction": "noise"}}, r"prediction = 'noise' is not known"),
        ({"noise": {"timesteps": 1}}, r"timesteps = 1 is out of range: need timesteps ≥ 2"),
        ({"length": {"steps": 0}}, r"steps = 0 is out of range: need steps ≥ 1"),
        ({"length": {"batch_size": 0}}, r"batch_size = 0 is out of range: need batch_size ≥ 1"),
        ({"length": {"seed": -1}}, r"seed = -1 is out of range: need seed ≥ 0"),
        ({"length": {"ema": 1}}, r"ema = 1 is out of range: need 0 ≤ ema < 1"),
        ({"length": {"replay_ratio": 1.5}}, r"replay_ratio = 1.5 is out of range: need 0 < replay_ratio < 1"),
        ({"optimiser": {"learning_rate": -1}}, r"learning_rate = -1 is out of range"),
        ({"layout": {"fsdp": 0}}, r"fsdp = 0 is out of range: need fsdp ≥ 1"),
        ({"optimiser": {"kind": "adafaktor"}}, r"settings.optimiser.kind = 'adafaktor' is not known: did you mean 'adafactor'\?"),
        ({"optimiser": {"kind": 3}}, r"settings.optimiser.kind = '3' is not known: take one of adamw, adafactor"),
        ({"optimiser": {"kind": "adafactor", "first_moments": "float32"}}, r"settings.optimiser = 'first_moments' is not known: take one"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("unchecked")
def test_mistakes_are_one_line_each(found, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        Settings.from_json(found)
    assert "\n" not in str(caught.value)


def test_names_stand_for_what_they_say():
    assert Noise("linear", 30).objective() == Denoising(LinearSchedule(30), Prediction.NOISE)
    assert Noise("scaled-linear", 30, "sample").objective() == Denoising(ScaledLinearSchedule(30), Prediction.CLEAN)
    assert Noise("cosine", 30, "v_prediction").objective() == Denoising(CosineSchedule(30), Prediction.VELOCITY)


def test_noise_that_differs_is_told_as_options():
    there = Noise("cosine", 30, "v_prediction").objective()
    assert Noise("linear", 30).unlike(there) == ("--schedule cosine --prediction v_prediction", "--schedule linear --prediction epsilon")
    assert Noise("cosine", 20, "v_prediction").unlike(there) == ("--timesteps 30", "--timesteps 20")
    other = Denoising(LinearSchedule(30, beta_end=0.5), Prediction.NOISE)  # which no setting says
    assert "beta_end=0.5" in Noise("linear", 30).unlike(other)[0]


def test_networks_take_the_images_shape():
    config = Network("digits-8", dropout=0.1).config(16, 12, 3)
    assert (config.sample_size, config.in_channels, config.out_channels, config.dropout) == ((16, 12), 3, 3, 0.1)
    assert Network("digits-8").config(8, 8, 1).sample_size == 8
    with pytest.raises(ValueError, match="images of 30 × 30 do not fit 3 levels of resolution: height and width must be multiples of 4"):
        Network("digits").config(30, 30, 1)
    with pytest.raises(ValueError, match=r"dropout = 1.5 must be at least 0 and below 1"):
        Network(dropout=1.5).config(28, 28, 1)


def test_each_purpose_has_a_key_of_its_own():
    keys = [
        tuple(jax.random.key_data(Settings(length=Length(seed=seed)).key(purpose)).tolist())
        for seed in (0, 1)
        for purpose in typing.get_args(typing.get_type_hints(Settings.key)["purpose"])
    ]
    assert len(set(keys)) == 6


def test_the_presets_are_what_they_are_said_to_be():
    assert set(PRESETS) == {"quick", "cpu-mnist", "paper-cifar10"}
    assert PRESETS["quick"].data == "digits"
    paper = PRESETS["paper-cifar10"].settings
    # Known from the paper: T, the schedule, the optimiser, batch and EMA.
    assert paper.noise.objective() == Denoising(LinearSchedule(1000, beta_start=1e-4, beta_end=0.02), Prediction.NOISE)
    assert (paper.optimiser.learning_rate, paper.optimiser.weight_decay, paper.optimiser.warmup) == (2e-4, 0.01, 500)
    assert (paper.length.batch_size, paper.length.ema) == (128, 0.9999)
    # 100 epochs of 25,000.
    assert paper.length.steps == 100 * (25_000 // 128)
