"""Where pipelines are looked for: folders without the hub, names through it, and what is said when there is neither."""

import fnmatch
import subprocess
import sys
import types
from pathlib import Path

import pytest

from diffusion.stable.hub import resolve

NAME = "stable-diffusion-v1-5/stable-diffusion-v1-5"
# Files of that repository: those of a pipeline, and others.
WANTED = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]
UNWANTED = [
    "README.md",
    "v1-5-pruned.ckpt",
    "v1-5-pruned.safetensors",
    "v1-inference.yaml",
    "safety_checker/model.safetensors",
    "feature_extractor/preprocessor_config.json",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "vae/diffusion_pytorch_model.bin",
    "vae/model.py",
]


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What the hub is asked for; it gives a folder, or raises what is put first."""
    calls: list = []

    def snapshot_download(name, **options):
        if calls and isinstance(calls[0], Exception):
            raise calls[0]
        calls.append((name, options))
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    monkeypatch.chdir(tmp_path)
    return calls


def test_a_name_is_asked_for_with_the_files_of_a_pipeline_alone(asked, tmp_path):
    assert resolve(NAME) == tmp_path
    ((name, options),) = asked
    assert name == NAME

    def given(file):
        """As `snapshot_download` filters."""
        wanted, unwanted = ([fnmatch.fnmatch(file, one) for one in options[f"{kind}_patterns"]] for kind in ("allow", "ignore"))
        return any(wanted) and not any(unwanted)

    assert [file for file in WANTED + UNWANTED if given(file)] == WANTED
    assert options.keys() == {"allow_patterns", "ignore_patterns"}  # else as the user's environment says: cache, token, endpoint


def test_a_folder_of_that_name_comes_first(asked, tmp_path):
    (tmp_path / NAME).mkdir(parents=True)
    assert resolve(NAME) == Path(NAME)
    assert resolve(tmp_path) == tmp_path
    assert not asked


@pytest.mark.parametrize("place", ["nowhere", "./some/where", "/no/where", "a/b/c", "some where/else", "../no/where", Path(NAME)])
def test_what_is_no_name_is_not_asked_for(asked, place):
    with pytest.raises(ValueError, match=r"does not exist$"):
        resolve(place)
    assert not asked


def test_a_misspelt_path_is_not_asked_for(asked, tmp_path):
    (tmp_path / "models" / "sd15").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"^models/sd51 does not exist; did you mean models/sd15\?$"):
        resolve("models/sd51")
    assert not asked


def test_the_name_that_is_gone_leads_to_the_living_one(asked):
    with pytest.raises(ValueError, match=f"^runwayml/stable-diffusion-v1-5 is gone from the hub: its files are now at {NAME}$"):
        resolve("runwayml/stable-diffusion-v1-5")
    assert not asked


def test_without_the_extra_it_is_said_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"install the extra: pip install 'hopjax\[hub\]'$"):
        resolve(NAME)


def test_what_the_hub_says_is_one_line(asked):
    asked.append(OSError("401 Client Error.\n\nRepository Not Found for url: https://huggingface.co/api/models/nobody/nothing\n"))
    with pytest.raises(
        ValueError, match=r"^nobody/nothing is not a folder here, and the Hugging Face hub does not give it: 401 Client Error\.$"
    ):
        resolve("nobody/nothing")
    asked[0] = RuntimeError()
    with pytest.raises(ValueError, match=r"does not give it: RuntimeError$"):
        resolve("nobody/nothing")


def test_a_folder_is_read_without_the_hub(tmp_path):
    code = "import sys; from diffusion.stable.hub import resolve; resolve(sys.argv[1]); assert 'huggingface_hub' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)
