"""How targets and labels make the loss of a step."""

from typing import Literal

from pydantic import Field

from mmkd.student.recipes.growing import GrowingRecipe


class LossRecipe(GrowingRecipe):
    """How targets and labels make the loss (see mmkd.student.training.losses)."""

    first_fields = frozenset({"temperature", "label_weight", "without_target"})

    temperature: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="T in T^2 KL(softmax(z_T / T) || softmax(z_S / T)); larger teaches more of the order of "
        "the unlikely classes (later work of the same first author: 10)",
    )
    label_weight: float = Field(0.0, ge=0, le=1, description="weight of the label term; distillation has the rest")


class LossOptions(LossRecipe):
    """The loss with what `teacher.missing` says of clips without a target: what the training loop reads."""

    without_target: Literal["drop", "label-only"] = Field(
        "drop", description="a clip without a target is left out, or learns from its label with weight 1"
    )
