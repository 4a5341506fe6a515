"""What `run` changes of a preset's settings, for both tasks alike."""

import dataclasses
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from diffusion.layout import Layout
from diffusion.optimiser import Adafactor, AdamW, Optimiser
from diffusion.settings import Settings
from hopjax.cli.options import UsageError, need

_OPTIMISERS = {"adamw": AdamW, "adafactor": Adafactor}


@Parameter(name="*", group="Learning (default: the preset's)")
@dataclasses.dataclass(frozen=True)
class Learning:
    """Settings of both tasks; None leaves the preset's."""

    steps1: Annotated[int | None, Parameter(help="Steps of Task 1.")] = None
    steps2: Annotated[int | None, Parameter(help="Steps of Task 2.")] = None
    batch_size: Annotated[int | None, Parameter(help="Images in a step.")] = None
    ema: Annotated[float | None, Parameter(help="Decay of the average of the parameters; 0 for none, which saves their memory.")] = None
    replay_ratio: Annotated[float | None, Parameter(help="Fraction of replayed images in a batch.")] = None
    optimiser: Annotated[Literal["adamw", "adafactor"] | None, Parameter(help="Adafactor takes next to no memory.")] = None
    learning_rate: Annotated[float | None, Parameter(help="After the warm-up.")] = None
    warmup: Annotated[int | None, Parameter(help="Steps over which the rate grows from 0.")] = None
    decay: Annotated[float | None, Parameter(help="Fraction of the run, at its end, over which the rate falls to 0.")] = None
    weight_decay: Annotated[float | None, Parameter(help="Fraction of a weight that a step takes off, times the rate.")] = None
    first_moments: Annotated[Literal["float32", "bfloat16"] | None, Parameter(help="Of AdamW; bfloat16 takes half the memory.")] = None
    network: Annotated[str | None, Parameter(help="Preset of diffusion.config; not with --weights, which bring theirs.")] = None
    dropout: Annotated[float | None, Parameter(help="Probability that an entry is dropped in training.")] = None
    dtype: Annotated[Literal["float32", "bfloat16"] | None, Parameter(help="Of products and convolutions in training.")] = None
    remat: Annotated[bool | None, Parameter(help="Compute blocks again in the backward pass, which saves memory.")] = None

    def first(self, preset: Settings, layout: Layout) -> Settings:
        """Of Task 1."""
        return self._changed(preset, layout, "--steps1", self.steps1)

    def later(self, preset: Settings, layout: Layout) -> Settings:
        """Of Task 2, and of those after it."""
        return self._changed(preset, layout, "--steps2", self.steps2)

    def _changed(self, preset: Settings, layout: Layout, option: str, steps: int | None) -> Settings:
        need(steps is None or steps >= 1, option, steps, f"{option.removeprefix('--')} ≥ 1", preset.length.steps)
        asked = {"steps": steps, **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)}}
        optimiser = preset.optimiser
        if self.optimiser is not None:
            common = (field.name for field in dataclasses.fields(Optimiser))
            optimiser = _OPTIMISERS[self.optimiser](**{name: getattr(optimiser, name) for name in common})
        if self.first_moments is not None and not isinstance(optimiser, AdamW):
            raise UsageError(f"--first-moments {self.first_moments}: Adafactor has none; take --optimiser adamw")

        def with_asked(part: Any) -> Any:
            names = (field.name for field in dataclasses.fields(part))
            return dataclasses.replace(part, **{name: asked[name] for name in names if asked.get(name) is not None})

        network, length = with_asked(preset.network), with_asked(preset.length)
        return dataclasses.replace(preset, network=network, optimiser=with_asked(optimiser), length=length, layout=layout)
