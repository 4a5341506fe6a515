"""What `run` changes of a preset's settings: each option, for both tasks, and nothing else."""

import dataclasses
from typing import Any

import pytest

from diffusion.cli.learning import Learning
from diffusion.layout import Layout
from diffusion.optimiser import Adafactor, AdamW
from diffusion.settings import Length, Network, Noise, Settings, SettingsError, difference
from hopjax.cli.options import UsageError

PRESET = Settings(Network("digits-8"), Noise("cosine"), AdamW(2e-3, 7, 0.3, 0.05), Length(600, 64, ema=0.99))
ASKED: dict[str, tuple[Any, str]] = {
    "batch_size": (32, "length.batch_size: 64, now 32"),
    "ema": (0.0, "length.ema: 0.99, now 0.0"),
    "replay_ratio": (0.25, "length.replay_ratio: null, now 0.25"),
    "learning_rate": (1e-5, "optimiser.learning_rate: 0.002, now 1e-05"),
    "warmup": (0, "optimiser.warmup: 7, now 0"),
    "decay": (0.0, "optimiser.decay: 0.3, now 0.0"),
    "weight_decay": (0.0, "optimiser.weight_decay: 0.05, now 0.0"),
    "first_moments": ("bfloat16", 'optimiser.first_moments: "float32", now "bfloat16"'),
    "network": ("digits", 'network.network: "digits-8", now "digits"'),
    "dropout": (0.1, "network.dropout: 0.0, now 0.1"),
    "dtype": ("bfloat16", 'network.dtype: "float32", now "bfloat16"'),
    "remat": (True, "network.remat: false, now true"),
}


def changes(learning):
    return [difference(PRESET.to_json(), changed(PRESET, Layout()).to_json()) for changed in (learning.first, learning.later)]


def test_every_option_is_known_here():
    assert {field.name for field in dataclasses.fields(Learning)} == {*ASKED, "steps1", "steps2", "optimiser"}


@pytest.mark.parametrize("name", ASKED)
def test_an_option_changes_its_setting_of_both_tasks_and_no_other(name):
    value, line = ASKED[name]
    assert changes(Learning(**{name: value})) == [[line], [line]]


def test_what_is_not_asked_for_stays():
    assert changes(Learning()) == [[], []]
    assert Learning().first(PRESET, Layout(fsdp=2)).layout == Layout(fsdp=2)


def test_each_task_has_its_steps():
    assert changes(Learning(steps1=5, steps2=3)) == [["length.steps: 600, now 5"], ["length.steps: 600, now 3"]]


def test_another_optimiser_keeps_rate_and_decay():
    found = Learning(optimiser="adafactor", learning_rate=1e-4).first(PRESET, Layout()).optimiser
    assert found == Adafactor(1e-4, 7, 0.3, 0.05)
    assert Learning(optimiser="adamw").first(dataclasses.replace(PRESET, optimiser=found), Layout()).optimiser == AdamW(1e-4, 7, 0.3, 0.05)


@pytest.mark.parametrize(
    ("learning", "error", "words"),
    [
        (Learning(steps1=0), UsageError, "--steps1 0 is out of range: need steps1 ≥ 1; take --steps1 600"),
        (Learning(optimiser="adafactor", first_moments="bfloat16"), UsageError, "--first-moments bfloat16: Adafactor has none"),
        (Learning(network="digit"), SettingsError, "network = 'digit' is not known: did you mean 'digits'"),
        (Learning(ema=1.0), SettingsError, "ema = 1.0 is out of range: need 0 ≤ ema < 1"),
        (Learning(learning_rate=0.0), ValueError, "learning_rate = 0.0 is out of range"),
    ],
)
def test_what_gives_no_settings_is_refused(learning, error, words):
    with pytest.raises(error, match=words.replace("?", r"\?")):
        learning.first(PRESET, Layout())
