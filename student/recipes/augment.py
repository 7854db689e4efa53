"""What training does to the pixels of a view: photometric changes alone, for the teacher saw the same view."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from mmkd.cache_tools.recipes.recipe import Recipe


class JitterRecipe(Recipe):
    """Photometric jitter of RGB in training, one draw per clip; larger changes more, 0 switches it off."""

    brightness: float = Field(0.25, ge=0, le=1, description="factor drawn from [1 - b, 1 + b]")
    contrast: float = Field(0.25, ge=0, le=1, description="factor drawn from [1 - c, 1 + c]")
    saturation: float = Field(0.25, ge=0, le=1, description="factor drawn from [1 - s, 1 + s]")
    hue: float = Field(0.1, ge=0, le=0.5, description="turn of the colour wheel from [-h, h]; 0.5 is half a turn")


class RandAugmentRecipe(Recipe):
    """RandAugment's photometric operations; those that move pixels are left out."""

    probability: float = Field(1.0, gt=0, le=1, description="that a clip is changed")
    operations: int = Field(2, ge=1, le=9, description="how many are applied to a clip, one after the other")
    magnitude: int = Field(9, ge=0, le=30, description="strength of each, as torchvision's 31 bins count it")


class ErasingRecipe(Recipe):
    """A window of a clip that is erased in all of its frames."""

    probability: float = Field(0.25, gt=0, le=1, description="that a clip loses a window")
    scale: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = Field(
        (0.02, 0.33), description="smallest and largest area of a window, as a share of the picture"
    )
    ratio: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = Field(
        (0.3, 3.3), description="smallest and largest height by width of a window"
    )

    @model_validator(mode="after")
    def _smallest_first(self) -> Self:
        for name, (smallest, largest) in (("scale", self.scale), ("ratio", self.ratio)):
            if smallest > largest:
                raise ValueError(f"{name}: the smallest comes first, and {smallest} is above {largest}")
        return self
