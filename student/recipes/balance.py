"""What a training run makes of labels that are rare, or mistaken: class balance and label smoothing."""

from typing import Self

from pydantic import Field, model_validator

from mmkd.cache_tools.recipes.recipe import Recipe


class BalanceRecipe(Recipe):
    """Rare classes in the label term, by one of three rules; each head by its own training labels."""

    inverse_frequency: float | None = Field(
        None, gt=0, le=1, description="weigh a class by (its clips)^-p; 1 is the inverse frequency, 0.5 its root"
    )
    effective_number: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="weigh a class by (1 - b) / (1 - b^clips) (Cui et al., 2019); nearer 1 favours rare ones more",
    )
    logit_adjustment: float | None = Field(
        None,
        gt=0,
        le=10,
        description="add t log(share of the clips) to the logits in the label term (Menon et al., 2021); 1 is "
        "theirs, larger favours rare classes more",
    )

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if len(given := [name for name in type(self).model_fields if getattr(self, name) is not None]) != 1:
            rules = ", ".join(type(self).model_fields)
            raise ValueError(f"give exactly one of {rules}" + (f", not {' and '.join(given)}" if given else ""))
        return self
