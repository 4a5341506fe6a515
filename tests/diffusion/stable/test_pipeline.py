"""The pipeline: diffusers' images (golden files), what images depend on, one compilation, folders both ways, refusals in one line."""

import dataclasses
import functools
import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from diffusion.stable.pipeline import StableDiffusion
from diffusion.weights import CONFIG
from tests.diffusion.stable import tiny_pipeline
from tests.diffusion.stable.tiny_pipeline import GUIDANCE, IMAGES, MODEL, NEGATIVE_PROMPTS, PROMPTS, SIZE, STEPS, STRENGTH, TEXTS

KEY = jax.random.key(0)
CUT = "ch more than sixteen tokens of it"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_pipeline.write(tmp_path_factory.mktemp("golden") / "model")


@pytest.fixture(scope="module")
def golden(folder):
    return StableDiffusion.from_folder(folder)


@pytest.fixture(scope="module")
def small():
    return tiny_pipeline.smallest()


def images(count, size=4):
    return np.random.default_rng(1).integers(0, 256, (count, size, size, 3), np.uint8)


# Both round to float32 (6e-8) a hundred times in each of twenty evaluations, and guidance multiplies that by 7.5.
@pytest.mark.parametrize("case", [*TEXTS, *IMAGES])
def test_images_are_those_of_diffusers(golden, case):
    asked = {"key": KEY, "negative_prompts": NEGATIVE_PROMPTS, "guidance": GUIDANCE, "steps": STEPS}
    if case in TEXTS:
        make = functools.partial(golden.text_to_image, PROMPTS, size=SIZE, scheduler=TEXTS[case], **asked)
    else:
        given = tiny_pipeline.pictures()
        make = functools.partial(golden.image_to_image, given, PROMPTS, strength=STRENGTH, scheduler=IMAGES[case], **asked)
    with pytest.warns(UserWarning, match="prompt 2 is longer than the 14 tokens") as caught:
        found = make()
    latents, pixels = tiny_pipeline.cases()[case]
    assert np.abs(found.latents - latents).max() <= 1e-4 * latents.std()
    assert np.abs(found.pixels - pixels).max() <= 1e-4
    assert [str(one.message).partition("not used: ")[2] for one in caught] == [repr(CUT)]
    assert found.images.dtype == np.uint8
    assert np.abs(found.images - 127.5 * (pixels + 1)).max() <= 0.51


def test_the_folder_s_own_scheduler_is_the_default(golden):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = golden.text_to_image(PROMPTS, key=KEY, negative_prompts=NEGATIVE_PROMPTS, steps=STEPS, size=SIZE)
    np.testing.assert_allclose(found.latents, tiny_pipeline.cases()["pndm"][0], atol=1e-2)


def test_every_network_is_compiled_once_for_a_shape(small, compilations):
    with compilations() as compiled:
        small.text_to_image(["a cat", "the cat"], key=KEY, steps=2)
    for program in ("guided_noise", "encode_text", "decode_image"):
        assert sum(program in name for name in compiled) == 1, program
    other = tiny_pipeline.smallest(seed=7)
    with compilations() as compiled:
        small.text_to_image(["at night"] * 5, key=jax.random.key(1), negative_prompts=["the"] * 5, guidance=3, steps=3, batch=2)
        small.text_to_image(["a cat", "the cat"], key=KEY, steps=4, size=4, scheduler="DDIMScheduler")
        other.text_to_image(["a cat", "the cat"], key=KEY, steps=2)
    assert not [name for name in compiled if any(program in name for program in ("guided_noise", "encode_text", "decode_image"))]


def test_an_image_depends_on_the_key_and_its_number_alone(small):
    prompts = ["a cat", "the cat", "at night"]
    whole = small.text_to_image(prompts, key=KEY, steps=3).latents
    np.testing.assert_allclose(small.text_to_image(prompts, key=KEY, steps=3, batch=2).latents, whole, rtol=1e-4, atol=1e-4)
    fewer = small.text_to_image(prompts[:2], key=KEY, steps=3).latents
    np.testing.assert_allclose(fewer, whole[:2], rtol=1e-4, atol=1e-4)
    same = small.text_to_image(["a cat"] * 3, key=KEY, steps=3).latents
    np.testing.assert_allclose(same[0], whole[0], rtol=1e-4, atol=1e-4)
    apart = [np.abs(a - b).max() for a, b in ((same[0], same[1]), (same[1], same[2]), (same[1], whole[1]), (same[2], whole[2]))]
    other = small.text_to_image(prompts, key=jax.random.key(1), steps=3).latents
    assert min(*apart, np.abs(other - whole).min(axis=(1, 2, 3)).max()) > 1e-3


def test_guidance_leads_from_the_negative_prompt_to_the_prompt(small):
    def found(prompts, **options):
        return small.text_to_image(prompts, key=KEY, steps=1, scheduler="DPMSolverMultistepScheduler", **options).latents

    # One evaluation, and latents that are linear in the noise.
    towards, away = found(["a cat", "night"], guidance=1), found(["the cats", ""], guidance=1)
    for guidance in (0, 0.5, 4):
        guided = found(["a cat", "night"], negative_prompts=["the cats", ""], guidance=guidance)
        np.testing.assert_allclose(guided, away + guidance * (towards - away), atol=1e-4 * np.abs(guided).max())
    assert np.abs(towards - away).max() > 1e-2
    np.testing.assert_array_equal(found(["a cat", "night"], negative_prompts=["the cats", ""], guidance=1), towards)


def alphas_cumprod():
    return np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


@pytest.mark.parametrize(("timestep", "steps"), [(500, 25), (30, 2)])
def test_reconstructions_follow_the_definition(small, timestep, steps):
    """A plain loop: x_t = α x₀ + σ ε, DDIM at equal distances down to 0, the empty prompt, pixels."""
    given = images(3)
    found = small.reconstruct(given, timestep, key=KEY)
    clean = np.asarray(small.encode(given), float)
    keys = [jax.random.split(jax.random.fold_in(jax.random.fold_in(KEY, i), 0))[0] for i in range(3)]
    noise = np.stack([jax.random.normal(key, clean.shape[1:], jnp.float32) for key in keys])
    epsilon = tiny_pipeline.network(small, [""] * 3)
    log_snr = np.log(alphas_cumprod()) - np.log1p(-alphas_cumprod())
    times = np.linspace(timestep, 0, steps)
    products = 1 / (1 + np.exp(-np.interp(times, np.arange(1000), log_snr)))
    x = products[0] ** 0.5 * clean + (1 - products[0]) ** 0.5 * noise
    for i, (time, product) in enumerate(zip(times, products, strict=True)):
        estimate = epsilon(x, time)
        start = (x - (1 - product) ** 0.5 * estimate) / product**0.5
        following = products[i + 1] if i + 1 < steps else 1.0
        x = following**0.5 * start + (1 - following) ** 0.5 * estimate
    np.testing.assert_allclose(found.latents, x, atol=1e-4 * np.abs(x).max())
    np.testing.assert_allclose(found.pixels, small.decode(jnp.asarray(x, jnp.float32)), atol=1e-3)
    assert found.pixels.shape == given.shape
    assert np.abs(small.reconstruct(given, timestep, key=KEY, prompts=["night"] * 3).latents - x).max() > 1e-3


def test_latents_are_scaled_and_pixels_are_those_of_files(small):
    given = images(2, size=7)  # a row and a column are left over
    latents = small.encode(given)
    mean = jax.jit(lambda x: small.vae.encode(x).mean)(jnp.asarray(given / 127.5 - 1, jnp.float32))
    np.testing.assert_allclose(latents, 0.18215 * mean, rtol=1e-5, atol=1e-6)
    assert latents.shape == (2, 3, 3, 3)
    np.testing.assert_allclose(small.encode((given / 255).astype(np.float32)), latents, rtol=1e-4, atol=1e-5)
    pixels = small.decode(20 * latents)
    expected = np.asarray(jax.jit(small.vae.decode)(20 * latents / 0.18215))
    np.testing.assert_allclose(pixels, np.clip(expected, -1, 1), atol=1e-5)
    assert np.abs(expected).max() > 1 == np.abs(pixels).max()


def test_full_strength_keeps_every_step_and_little_strength_the_last(small):
    told = []
    asked = {"key": KEY, "steps": 10, "scheduler": "DDIMScheduler", "progress": lambda *numbers: told.append(numbers)}
    for strength in (1, 0.5, 0.1):
        small.image_to_image(images(2), ["a cat", ""], strength=strength, **asked)
    assert told == [*((i, 10) for i in range(1, 11)), *((i, 5) for i in range(1, 6)), (1, 1)]


@pytest.mark.parametrize(("scheduler", "evaluations"), [(None, 5), ("DDIMScheduler", 4), ("DPMSolverMultistepScheduler", 4)])
def test_progress_is_told_after_each_evaluation(small, scheduler, evaluations):
    told = []
    small.text_to_image([""] * 3, key=KEY, steps=4, batch=2, scheduler=scheduler, progress=lambda *n: told.append(n))
    assert told == [(i, 2 * evaluations) for i in range(1, 2 * evaluations + 1)]


def test_lists_of_arrays_or_pictures_are_images(small):
    given = images(2)
    expected = small.encode(given)
    np.testing.assert_array_equal(small.encode(list(given)), expected)
    np.testing.assert_array_equal(small.encode([Image.fromarray(one) for one in given]), expected)
    asked = {"key": KEY, "steps": 2, "strength": 1}
    found = small.image_to_image([Image.fromarray(one) for one in given], ["a", "b"], **asked)
    np.testing.assert_array_equal(found.latents, small.image_to_image(given, ["a", "b"], **asked).latents)
    np.testing.assert_array_equal(small.decode(np.asarray(expected)), small.decode(expected))


@pytest.mark.parametrize("size", [2, (6, 10), np.int64(4), np.array([4, 6])])
@pytest.mark.usefixtures("unchecked")
def test_images_of_any_size_do(small, size):
    found = small.text_to_image(["a cat"], key=KEY, steps=np.int64(1), size=size, batch=np.int32(2))
    height, width = (size, size) if np.ndim(size) == 0 else size
    assert found.images.shape == (1, height, width, 3)
    assert np.isfinite(found.latents).all()


def test_computing_in_bfloat16(small):
    half = tiny_pipeline.smallest(dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half.unet))} == {jnp.dtype(jnp.float32)}
    exact, found = (pipeline.text_to_image(["a cat"] * 2, key=KEY, steps=4, guidance=2) for pipeline in (small, half))
    assert found.latents.dtype == found.pixels.dtype == np.float32
    assert 0 < np.abs(found.latents - exact.latents).max() < 0.3 * exact.latents.std()


def test_latents_that_are_not_finite_are_named_with_the_step():
    """Outputs of 1e25 are finite; their squares, which the first norm of the next step takes, are not."""
    pipeline = tiny_pipeline.smallest(dtype=jnp.bfloat16)
    pipeline.unet.conv_out.bias.set_value(pipeline.unet.conv_out.bias[...] + jnp.float32(1e25))
    with pytest.raises(ValueError, match=r"^image 1 is not finite at step 2 of 4 \(timestep 501\): compute in float32, not in bfloat16$"):
        pipeline.text_to_image(["a cat"] * 3, key=KEY, steps=4, batch=2, scheduler="DDIMScheduler", guidance=1)


def test_what_is_written_is_read(folder, golden, tmp_path):
    golden.save_folder(tmp_path / "copy")
    same = StableDiffusion.from_folder(tmp_path / "copy")
    for name in ("unet", "vae", "text_encoder"):
        jax.tree.map(np.testing.assert_array_equal, nnx.state(getattr(same, name)), nnx.state(getattr(golden, name)))
        assert getattr(same, name).config == getattr(golden, name).config
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (tmp_path / "copy" / "tokenizer" / name).read_bytes() == (MODEL / "tokenizer" / name).read_bytes()
    scheduler = "scheduler/scheduler_config.json"
    assert json.loads((tmp_path / "copy" / scheduler).read_text()) == json.loads((folder / scheduler).read_text())
    index = json.loads((tmp_path / "copy" / "model_index.json").read_text())
    expected = json.loads((folder / "model_index.json").read_text())
    assert index == expected | {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    with pytest.raises(ValueError, match="copy exists already and is not an empty folder"):
        golden.save_folder(tmp_path / "copy")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(unet=["diffusers", "UNet2DModel"]), r"unet = 'UNet2DModel' is not supported; what is: UNet2DCond"),
        (lambda index: index.pop("vae"), r"model_index\.json names no vae$"),
        (lambda index: index.update(_class_name="DDPMPipeline"), "describes a DDPMPipeline, not a StableDiffusionPipeline"),
        (lambda index: index.update(scheduler=["diffusers", 3]), "scheduler = 3 must be the name of a class"),
        (lambda index: index.update(image_encoder=["transformers", "CLIPVision"]), "image_encoder = 'CLIPVision' is not supported"),
    ],
)
def test_other_pipelines_are_refused_in_one_line(folder, tmp_path, change, message):
    shutil.copytree(folder, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    change(index)
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message) as caught:
        StableDiffusion.from_folder(tmp_path / "model")
    assert "\n" not in str(caught.value)


OTHERS = ("EulerDiscrete", "EulerAncestralDiscrete", "LMSDiscrete", "UniPCMultistep", "DEISMultistep", "DDPM")


@pytest.mark.parametrize("method", [f"{kind}Scheduler" for kind in OTHERS])
def test_a_folder_with_a_scheduler_that_is_not_known_is_read_and_written(folder, tmp_path, method):
    model = shutil.copytree(folder, tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text()) | {"scheduler": ["diffusers", method]}
    (model / "model_index.json").write_text(json.dumps(index))
    fields = json.loads((model / "scheduler" / "scheduler_config.json").read_text()) | {"timestep_spacing": "linspace"}
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps(fields | {"_class_name": method}))
    found = StableDiffusion.from_folder(model)
    found.save_folder(tmp_path / "copy")
    for name, field in (("scheduler/scheduler_config.json", "_class_name"), ("model_index.json", "scheduler")):
        one, other = (json.loads((place / name).read_text()) for place in (model, tmp_path / "copy"))
        assert one[field] == other[field] == (method if field == "_class_name" else ["diffusers", method])
    assert found.scheduler("DPMSolverMultistepScheduler").objective == found.objective
    with pytest.raises(
        ValueError, match=rf'^model_index\.json: scheduler = \'{method}\' is not.*: give scheduler="DPMSolverMultistepS'
    ) as caught:
        found.text_to_image(["a cat"], key=KEY)
    assert "\n" not in str(caught.value)


def test_what_a_scheduler_s_method_needs_is_asked_for_when_it_samples(small):
    for fields, what in (({"prediction_type": "v_prediction"}, "prediction_type"), ({"skip_prk_steps": False}, "skip_prk_steps")):
        other = dataclasses.replace(small, scheduler_config={**small.scheduler_config, **fields})
        with pytest.raises(ValueError, match=rf'^scheduler_config\.json: {what} = .* PNDMScheduler; .*: give scheduler="DDIMScheduler" or'):
            other.text_to_image(["a cat"], key=KEY)
    lost = dataclasses.replace(small, scheduler_config={**small.scheduler_config, "_class_name": "X", "timestep_spacing": "y"})
    with pytest.raises(ValueError, match=r"^model_index\.json: scheduler = 'X' is not supported; what is: DDIMScheduler, .*Multistep\w*$"):
        lost.text_to_image(["a cat"], key=KEY)


def test_noise_that_is_not_known_is_refused_with_the_file(folder, tmp_path):
    model = shutil.copytree(folder, tmp_path / "model")
    file = model / "scheduler" / "scheduler_config.json"
    for fields, message in (
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "beta_schedule is missing, without which the noise"),
        (json.loads(file.read_text()) | {"prediction_type": "flow_prediction"}, "prediction_type = 'flow_prediction' is not supported"),
    ):
        index = json.loads((model / "model_index.json").read_text())
        (model / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", fields["_class_name"]]}))
        file.write_text(json.dumps(fields))
        with pytest.raises(ValueError, match=f"^{file}: {message}"):
            StableDiffusion.from_folder(model)


def test_tokens_that_were_added_are_named_before_what_follows_from_them(folder, tmp_path):
    model = shutil.copytree(folder, tmp_path / "model")
    (model / "tokenizer" / "added_tokens.json").write_text(json.dumps({"<cat-toy>": 521}))
    fields = json.loads((model / "text_encoder" / CONFIG).read_text())
    (model / "text_encoder" / CONFIG).write_text(json.dumps(fields | {"vocab_size": 522, "eos_token_id": 520}))
    with pytest.raises(ValueError, match=r"added_tokens\.json: added tokens are not supported: '<cat-toy>'$"):
        StableDiffusion.from_folder(model)


def test_folders_that_are_not_whole_are_refused_in_one_line(folder, tmp_path):
    model = shutil.copytree(folder, tmp_path / "model")
    with pytest.raises(ValueError, match="unet is the folder of a UNet2DConditionModel, not of a pipeline: give the one with model_index"):
        StableDiffusion.from_folder(model / "unet")
    with pytest.raises(ValueError, match=r"modle does not exist; did you mean .*model\?"):
        StableDiffusion.from_folder(tmp_path / "modle")
    shutil.move(model / "tokenizer", tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"tokenizer is no diffusers folder: cannot read vocab\.json"):
        StableDiffusion.from_folder(model)
    shutil.move(tmp_path / "tokenizer", model / "tokenizer")
    shutil.copy(model / "unet" / CONFIG, model / "vae")
    with pytest.raises(ValueError, match=r"vae.config\.json: config\.json describes a .UNet2DConditionModel., not an AutoencoderKL"):
        StableDiffusion.from_folder(model)
    shutil.rmtree(model / "vae")
    with pytest.raises(ValueError, match=r"vae is no diffusers folder: cannot read config\.json"):
        StableDiffusion.from_folder(model)


def test_parts_of_different_pipelines_are_refused(golden, small):
    for part, message in (
        ("vae", "the autoencoder has 3 latent channels, the U-Net's input 4"),
        ("text_encoder", "the text encoder has 4 features a token, the U-Net 6"),
    ):
        with pytest.raises(ValueError, match=f"parts of different pipelines: {message}"):
            dataclasses.replace(golden, **{part: getattr(small, part)})


def text(pipeline, prompts=("a cat",), **options):
    return pipeline.text_to_image(list(prompts), key=KEY, **options)


def image(pipeline, prompts=("a cat",), given=None, **options):
    return pipeline.image_to_image(images(1) if given is None else given, list(prompts), key=KEY, **options)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda p: image(p, strength=0), "strength = 0 is out of range: need 0 < strength ≤ 1"),
        (lambda p: image(p, strength=1.01), r"strength = 1\.01 is out of range"),
        (lambda p: image(p, strength=float("nan")), "strength = nan is out of range"),
        (lambda p: image(p, strength=0.01, steps=50), r"strength = 0\.01 leaves none of 50 steps: need strength ≥ 0\.02"),
        (lambda p: text(p, guidance=-0.5), r"guidance = -0\.5 is out of range: it must be finite, and 0 or more"),
        (lambda p: text(p, guidance=float("inf")), "guidance = inf is out of range"),
        (lambda p: text(p, guidance=float("nan")), "guidance = nan is out of range"),
        (lambda p: text(p, steps=0), "steps = 0 is out of range: need 1 ≤ steps < 1000"),
        (lambda p: text(p, steps=1000), "steps = 1000 is out of range"),
        (lambda p: image(p, steps=0), "steps = 0 is out of range"),
        (lambda p: text(p, size=1), "an image of 1 × 1 cannot be encoded: height and width must be at least 2"),
        (lambda p: text(p, size=(4, 5)), "images of 4 × 5 are not decoded from latents: height and width must be multiples of 2"),
        (lambda p: image(p, given=images(1, size=5)), "images of 5 × 5 are not decoded"),
        (lambda p: p.reconstruct(images(1, size=1), key=KEY), "an image of 1 × 1 cannot be encoded"),
        (lambda p: p.encode(images(1)[0]), r"images are an array of 3 axes: need 4, \(number, height, width, channels\)"),
        (lambda p: image(p, given=images(1)[0]), "images are an array of 3 axes"),
        (lambda p: p.encode(images(1)[..., :1]), "images have 1 channels, the autoencoder takes 3"),
        (lambda p: p.encode(images(1).astype(np.float32)), "pixels lie between [0-9]+ and 25[0-9]: give bytes, or numbers from 0 to 1"),
        (lambda p: p.encode(np.full((1, 4, 4, 3), np.nan, np.float32)), "pixels lie between nan and nan"),
        (lambda p: text(p, prompts=[]), "0 images in batches of 4: need one or more of each"),
        (lambda p: text(p, batch=0), "1 images in batches of 0"),
        (lambda p: text(p, negative_prompts=["a", "b"]), "2 negative prompts for 1 prompts: give one for each"),
        (lambda p: image(p, prompts=["a", "b"]), "2 prompts for 1 images: give one for each"),
        (lambda p: p.text_to_image("a cat", key=KEY), "prompts must be a sequence of strings, not one string"),
        (lambda p: text(p, scheduler="EulerDiscreteScheduler"), "'EulerDiscreteScheduler' is not supported; what is: DDIMScheduler, PNDM"),
        (lambda p: p.reconstruct(images(1), 1000, key=KEY), "timestep = 1000 is out of range: need 0 < timestep < 1000"),
        (lambda p: p.reconstruct(images(1), 0, key=KEY), "timestep = 0 is out of range"),
        (lambda p: p.decode(jnp.full((2, 2, 2, 3), jnp.nan, jnp.float32)), "latents 1 are decoded to pixels that are not finite: are the"),
        (lambda p: text(p, prompts=[None]), "^prompt 1 is None, not a string$"),
        (lambda p: p.text_to_image(None, key=KEY), "^prompts = None must be a sequence of strings$"),
        (lambda p: p.image_to_image(images(1), None, key=KEY), "^prompts = None must be a sequence of strings$"),
        (lambda p: p.text_to_image(["a"], key=0), r"^key is of type int, not one random key: give jax\.random\.key\(SEED\)$"),
        (lambda p: p.reconstruct(images(1), key=None), "^key is of type NoneType, not one random key"),
        (lambda p: p.image_to_image(images(1), ["a"], key=jax.random.split(KEY)), "^key is of type .*, not one random key"),
        (lambda p: text(p, steps=2.0), r"^steps = 2\.0 must be a whole number$"),
        (lambda p: image(p, steps="2"), "^steps = '2' must be a whole number$"),
        (lambda p: text(p, batch=1.5), r"^batch = 1\.5 must be a whole number$"),
        (lambda p: p.reconstruct(images(1), 500.0, key=KEY), r"^timestep = 500\.0 must be a whole number$"),
        (lambda p: text(p, size=4.0), r"^size = 4\.0 must be a whole number of pixels, or two of them: height and width$"),
        (lambda p: text(p, size=(4,)), r"^size = \(4,\) must be a whole number of pixels, or two"),
        (lambda p: text(p, size=(4, 4, 3)), r"^size = \(4, 4, 3\) must be"),
        (lambda p: text(p, size=(4, 4.5)), r"^size = \(4, 4\.5\) must be"),
        (lambda p: p.encode(images(0)), "^there are no images: give one or more$"),
        (lambda p: image(p, given=[], prompts=[]), "^there are no images: give one or more$"),
        (
            lambda p: p.encode([images(1)[0], images(1, 6)[0]]),
            r"^images are of shapes \(4, 4, 3\) and \(6, 6, 3\): give those of one shape",
        ),
        (lambda p: p.encode(Image.fromarray(images(1)[0])), "^images are of type Image: give an array, or a list of arrays$"),
        (lambda p: p.decode(jnp.zeros((2, 2, 3))), r"^latents are an array of 3 axes: need 4, \(number, height, width, channels\)$"),
        (lambda p: p.decode(jnp.zeros((0, 2, 2, 3))), "^there are no latents: give one or more$"),
        (lambda p: p.decode(jnp.zeros((1, 2, 2, 4))), "^latents have 4 channels, the autoencoder takes 3"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_is_out_of_range_is_refused_in_one_line(small, ask, message):
    with pytest.raises(ValueError, match=message) as caught:
        ask(small)
    assert "\n" not in str(caught.value)


def test_negative_prompts_that_are_cut_are_told_apart(small):
    with pytest.warns(UserWarning, match="^negative prompt 1 is longer than the 14 tokens"):
        small.text_to_image(["a cat", "the"], key=KEY, negative_prompts=["night " * 20, ""], steps=1)
