"""Which run is which: what is written down of one, by this version or an earlier one."""

import copy
import dataclasses
import json

import numpy as np
import pytest

from diffusion.optimiser import Adafactor, AdamW
from diffusion.run import RUN, RunError, Task, check, held_out, identity
from diffusion.settings import Network, Settings
from hopjax.cli.options import Reading
from hopjax.data import Images

TASK = Task(Images(np.arange(512, dtype=np.uint8).reshape(8, 8, 8, 1), None, None, "ramps"))
SETTINGS = Settings(Network("digits-8"))


def test_a_run_from_before_there_was_a_setting_had_its_default(tmp_path):
    known = json.loads(json.dumps(identity(TASK, SETTINGS)))
    older = copy.deepcopy(known)
    del older["settings"]["optimiser"]["first_moments"]
    (tmp_path / RUN).write_text(json.dumps(older))
    check(tmp_path, known)
    for optimiser, message in (
        (AdamW(first_moments="bfloat16"), r"settings: settings.optimiser.first_moments: \"float32\", now \"bfloat16\"\."),
        (
            Adafactor(),
            r"settings: settings.optimiser.first_moments: \"float32\", now null; settings.optimiser.kind: null, now \"adafactor\"\.",
        ),
    ):
        with pytest.raises(RunError, match=message):
            check(tmp_path, identity(TASK, dataclasses.replace(SETTINGS, optimiser=optimiser)))


def test_settings_that_no_version_wrote_are_told(tmp_path):
    known = json.loads(json.dumps(identity(TASK, SETTINGS)))
    known["settings"]["optimiser"]["momentum"] = 0.9
    (tmp_path / RUN).write_text(json.dumps(known))
    with pytest.raises(RunError, match=r"run.json was not written by this version: settings.optimiser = 'momentum' is not known"):
        check(tmp_path, identity(TASK, SETTINGS))


def test_images_held_out_are_read_again(tmp_path):
    images = np.arange(30 * 16, dtype=np.uint8).reshape(30, 4, 4, 1)
    np.save(tmp_path / "ramps.npy", images)
    source = {"data": str(tmp_path / "ramps.npy"), "classes": None, "hold_out": 5, **dataclasses.asdict(Reading(size=(2, 4)))}
    (tmp_path / RUN).write_text(json.dumps({"source": source}))
    found = held_out(tmp_path)
    assert found.pixels.shape == (5, 2, 4, 1)
    assert found.pixels[-1].mean() > found.pixels[0].mean()
    (tmp_path / RUN).write_text(json.dumps({"source": source | {"hold_out": 0}}))
    with pytest.raises(RunError, match="held no images out"):
        held_out(tmp_path)
