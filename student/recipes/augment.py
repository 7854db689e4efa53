"""What training does to the pixels of a view: photometric changes alone, for the teacher saw the same view."""

from pydantic import Field

from mmkd.cache_tools.recipes.recipe import Recipe


class JitterRecipe(Recipe):
    """Photometric jitter of RGB in training, one draw per clip; larger changes more, 0 switches it off."""

    brightness: float = Field(0.25, ge=0, le=1, description="factor drawn from [1 - b, 1 + b]")
    contrast: float = Field(0.25, ge=0, le=1, description="factor drawn from [1 - c, 1 + c]")
    saturation: float = Field(0.25, ge=0, le=1, description="factor drawn from [1 - s, 1 + s]")
    hue: float = Field(0.1, ge=0, le=0.5, description="turn of the colour wheel from [-h, h]; 0.5 is half a turn")
