"""Where pipelines are looked for: folders without the hub, names through it, and what is said when there is neither."""

import fnmatch
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from diffusion.stable.hub import resolve
from diffusion.stable.pipeline import StableDiffusion

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
    "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model-00001-of-00002.fp16.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
    "unet/diffusion_pytorch_model.safetensors.fp16.index.json",
    "unet/diffusion_pytorch_model.fp16.bin",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.non_ema-00001-of-00002.safetensors",
    "vae/diffusion_pytorch_model.bin",
    "vae/model.py",
]


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What the hub is asked for; it gives those of the repository's files, or raises what is put first."""
    calls: list = []
    found = tmp_path / "cache"

    def snapshot_download(name, *, allow_patterns, ignore_patterns):
        # No other options: else as the user's environment says: cache, token, endpoint.
        if calls and isinstance(calls[0], Exception):
            raise calls[0]
        files = calls[0] if calls else WANTED + UNWANTED
        for file in files:
            if any(fnmatch.fnmatch(file, one) for one in allow_patterns) and not any(fnmatch.fnmatch(file, one) for one in ignore_patterns):
                (found / file).parent.mkdir(parents=True, exist_ok=True)
                (found / file).touch()
        calls.append(name)
        return str(found)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    monkeypatch.chdir(tmp_path)
    return calls


def given(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def test_a_name_is_asked_for_with_the_files_of_a_pipeline_alone(asked, tmp_path):
    assert resolve(NAME) == tmp_path / "cache"
    assert asked == [NAME]
    assert given(tmp_path / "cache") == sorted(WANTED)


def test_half_precision_is_asked_for_where_there_is_nothing_else(asked, tmp_path):
    halves = [file for file in WANTED + UNWANTED if file.startswith("unet/") and ".fp16" in file and not file.endswith(".bin")]
    asked.append([file for file in WANTED + UNWANTED if not (file in WANTED and file.startswith("unet/") and "model" in file)])
    assert len(halves) == 5
    assert resolve(NAME) == tmp_path / "cache"
    assert given(tmp_path / "cache") == sorted([*(file for file in WANTED if file in asked[0]), *halves])


def test_a_repository_without_a_pipeline_is_refused(asked):
    asked.append(UNWANTED)
    with pytest.raises(ValueError, match=r"^some/where on the Hugging Face hub is no pipeline of diffusers: it has no model_index\.json$"):
        resolve("some/where")


@pytest.mark.parametrize("name", ["v1-5.ckpt", "v1-5.safetensors"])
def test_a_checkpoint_in_one_file_leads_to_its_conversion(asked, tmp_path, name):
    tensors = {"model.diffusion_model.out.2.bias": np.zeros(4, np.float32)}
    Path("lone").mkdir()
    for file in (Path(name), Path("lone", name)):
        save_file(tensors, file)
        with pytest.raises(ValueError, match=rf'^{file} holds all networks in one file .*from_single_file\("{name}"\)'):
            StableDiffusion.from_folder(file if file.parent == Path() else "lone")
    save_file({"a": np.zeros(4, np.float32)}, "lora.safetensors")
    with pytest.raises(ValueError, match=r"^lora\.safetensors is not a folder$"):
        resolve("lora.safetensors")
    assert not asked


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
