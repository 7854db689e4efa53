"""What a network sees of a view: which frames, how large, normalised by which numbers."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from mmkd.cache_tools.recipes.recipe import Recipe
from mmkd.data_manifests.errors import InputError
from mmkd.student.network_table import Normalisation


class NormalisationRecipe(Recipe):
    """What is subtracted from each channel, and what it is divided by then; one number is for all channels."""

    mean: tuple[float, ...] = Field(min_length=1, description="of values in 0..1 (rgb) or -1..1 (flow)")
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field(min_length=1, description="as mean")

    def numbers(self) -> Normalisation:
        """Return the numbers alone."""
        return Normalisation(self.mean, self.std)


class InputRecipe(Recipe):
    """A cheaper look at the views of the cache: the teacher's targets stay those of the whole view."""

    every: int = Field(1, ge=1, le=64, description="every k-th frame of a view, beginning with its first")
    size_px: int | None = Field(
        None, ge=8, le=2048, description="side to which a view is downscaled; null: the view's own"
    )

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if self.every == 1 and self.size_px is None:
            raise ValueError("set every (2, say), size_px, or both")
        return self

    def shape(self, frames: int, size_px: int) -> tuple[int, int]:
        """Return T and S that remain of a view; InputError where nothing of it can be left out."""
        if self.every >= frames > 1 or (self.every > 1 and frames == 1):
            raise InputError(f"input.every={self.every} leaves one frame of a view: choose a smaller one")
        if self.size_px is not None and self.size_px >= size_px:
            raise InputError(
                f"input.size_px={self.size_px} is not below the views' {size_px} px: leave it out, or choose a "
                "smaller one"
            )
        return -(-frames // self.every), self.size_px or size_px
