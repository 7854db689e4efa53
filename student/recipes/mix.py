"""How clips of a batch are mixed in pairs, with their labels and targets."""

from typing import Self

from pydantic import Field, model_validator

from mmkd.cache_tools.recipes.recipe import Recipe


class MixRecipe(Recipe):
    """Mixup, cutmix, or either by turns; inputs, labels and teacher's probabilities in the same share; rgb only."""

    mixup_alpha: float | None = Field(
        None, gt=0, le=100, description="mixup with the share from Beta(a, a); larger mixes more evenly; null: none"
    )
    cutmix_alpha: float | None = Field(
        None, gt=0, le=100, description="cutmix with the area from Beta(a, a); 1 is its authors'; null: none"
    )
    probability: float = Field(1.0, gt=0, le=1, description="that a batch is mixed")
    switch: float = Field(0.5, gt=0, lt=1, description="of both: the share of cutmix among mixed batches")

    @model_validator(mode="after")
    def _one_or_both(self) -> Self:
        if self.mixup_alpha is None and self.cutmix_alpha is None:
            raise ValueError("set mixup_alpha (0.4, say), cutmix_alpha (1), or both")
        is_set = self.switch != type(self).model_fields["switch"].default  # a written recipe has it in any case
        if is_set and None in (self.mixup_alpha, self.cutmix_alpha):
            raise ValueError("switch is for both mixup_alpha and cutmix_alpha, and one is not set: leave it out")
        return self
