"""What a run will take: bytes by kind, counted by hand, and that counting them allocates nothing."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from diffusion import settings
from diffusion.consolidation import Consolidation, Penalty
from diffusion.layers import initialise
from diffusion.layout import Layout
from diffusion.objective import Denoising
from diffusion.optimiser import Adafactor, AdamW
from diffusion.pipeline import Pipeline
from diffusion.plan import memory_of, plan
from diffusion.run import Task
from diffusion.schedules import LinearSchedule
from diffusion.settings import Length, Network, Noise, Settings
from diffusion.stable.config import UNet2DConditionConfig
from diffusion.stable.unet import UNet2DCondition
from diffusion.train import Program
from diffusion.unet import UNet, parameter_count
from hopjax.data import Images
from tests.diffusion.affine import Affine
from tests.diffusion.tiny import NETWORK, NETWORKS, pixels

pytestmark = pytest.mark.usefixtures("as_run")


@pytest.mark.parametrize(
    ("optimiser", "ema", "moments"),
    [(AdamW(), 0.9, 8), (AdamW(first_moments="bfloat16"), 0.0, 6), (Adafactor(), 0.0, 4)],
    ids=["adamw", "bfloat16", "adafactor"],
)
def test_bytes_are_those_of_each_kind(optimiser, ema, moments):
    """Of 2 × 3,000 parameters; Adafactor keeps second moments of vectors whole, and a number or three for what it has not."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Affine(3000)), nnx.Param)
    program = Program(graphdef, Denoising(LinearSchedule()), optimiser, 10, ema, Layout().mesh())
    large = [array.size for array in jax.live_arrays() if array.size >= 3000]
    found, compiled = memory_of(program, params, jax.ShapeDtypeStruct((16, 4, 4, 1), np.uint8))
    assert [array.size for array in jax.live_arrays() if array.size >= 3000] == large
    assert found["parameters"] == found["gradients"] == 24_000
    assert found.get("average") == (24_000 if ema else None)
    assert 0 < found["step"] < 10 * 24_000
    assert moments * 6000 <= found["optimiser"] < moments * 6000 + 50
    assert "penalty" not in found
    assert "frozen" not in found
    analysis = compiled.memory_analysis()
    assert analysis is not None
    arguments = found["parameters"] + found.get("average", 0) + found["optimiser"]
    # The step, the batch and the key besides.
    assert arguments < analysis.argument_size_in_bytes < arguments + 16 * 16 + 200


def test_what_consolidation_holds_is_counted():
    """Where parameters were, how much each counts, and λ."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Affine(3000)), nnx.Param)
    penalty = Penalty(jax.ShapeDtypeStruct((), np.float32), params, params)
    program = Program(graphdef, Denoising(LinearSchedule()), AdamW(), 10, 0.0, Layout().mesh(), penalty)
    found, compiled = memory_of(program, params, jax.ShapeDtypeStruct((16, 4, 4, 1), np.uint8))
    assert found["penalty"] == 48_004
    analysis = compiled.memory_analysis()
    assert analysis is not None
    assert analysis.argument_size_in_bytes > sum(found[kind] for kind in ("parameters", "optimiser", "penalty"))


@pytest.mark.slow
def test_a_plan_counts_what_holds_parameters_and_needs_none_of_them(monkeypatch):
    images = Images(pixels(), None, None, "stripes")
    objective = Noise("cosine", prediction="v_prediction").objective()
    monkeypatch.setattr(settings, "NETWORKS", NETWORKS)
    chosen = Settings(Network("tiny"), Noise("cosine", prediction="v_prediction"), AdamW(warmup=2), Length(40, 8, 0.9))
    abstract = Pipeline(nnx.eval_shape(lambda: UNet(NETWORK, rngs=nnx.Rngs(0))), objective)
    size = 4 * parameter_count(abstract.unet)
    task = Task(images, start=abstract, consolidation=Consolidation(images))
    found = plan(task, chosen, timed=False)
    assert found.bytes["penalty"] == 2 * size + 4  # where parameters were, how much each counts, and λ
    assert found.bytes["average"] == found.bytes["parameters"] == size
    assert not any(line.startswith("a step") for line in found.lines())
    real = Pipeline(initialise(lambda rngs: UNet(NETWORK, rngs=rngs), jax.random.key(0)), objective)
    timed = plan(task._replace(start=real), chosen)
    assert timed.bytes == found.bytes
    assert timed.step_seconds > 0
    assert any(line.startswith("a step") for line in timed.lines())
    bare = plan(task._replace(consolidation=None), dataclasses.replace(chosen, length=Length(40, 8, 0.0)), timed=False)
    assert {"penalty", "average"} & bare.bytes.keys() == set()


@pytest.mark.usefixtures("unchecked")
def test_the_rule_of_sharding_covers_stable_diffusion():
    """All but small arrays are split over eight devices, evenly: there is nothing that a table of names would add."""
    from diffusion.layout import WHOLE_BELOW, state_shardings

    params = nnx.state(nnx.eval_shape(lambda: UNet2DCondition(UNet2DConditionConfig(), rngs=nnx.Rngs(0))), nnx.Param)
    mesh = jax.sharding.AbstractMesh((1, 8), ("replicas", "fsdp"))
    leaves, shardings = jax.tree.leaves(params), jax.tree.leaves(state_shardings(mesh, params))  # type: ignore[arg-type]
    shares = [int(np.prod(sharding.shard_shape(leaf.shape))) for leaf, sharding in zip(leaves, shardings, strict=True)]
    whole = [leaf.size for leaf, share in zip(leaves, shares, strict=True) if share == leaf.size]
    assert max(whole) < WHOLE_BELOW
    assert all(share == leaf.size / 8 for leaf, share in zip(leaves, shares, strict=True) if share < leaf.size)
    total = sum(leaf.size for leaf in leaves)
    assert total == 859_520_964
    assert sum(shares) < 1.01 * total / 8
