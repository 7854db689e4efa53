"""Everything of stage two, as one recipe.

Defaults are the authors' recipe for real footage, from their public code unless a field says otherwise; the
demo's recipes state what they change.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from mmkd.cache_tools.frames.clip_set import DataRecipe
from mmkd.cache_tools.recipes.recipe import Recipe
from mmkd.data_manifests.errors import InputError
from mmkd.student.recipes.loss import LossOptions, LossRecipe
from mmkd.student.recipes.train import TrainRecipe

Missing = Literal["renormalise", "drop", "label-only"]
"""What becomes of a view that lacks an expert: the others are weighed, it is left out, or its label is used."""


@dataclass(frozen=True)
class Mode:
    """What kind of run this is."""

    labels_only: bool = False
    """The baseline: no teacher."""
    fresh_views: bool = False
    """Baseline only: a new view every epoch in place of the cached ones."""

    def __post_init__(self) -> None:
        """Raise InputError for new views with a teacher."""
        if self.fresh_views and not self.labels_only:
            raise InputError("--fresh-views needs --labels-only: cached targets belong to cached views")


class TeacherMix(Recipe):
    """How cached experts become a teacher; changing it costs seconds and no GPU."""

    weights: str = Field(
        "uniform",
        description="uniform, heldout, per-sample, a list such as rgb=1,flow=2,boxes=2, or FILE.json[:SCHEME] of "
        "`mmkd-cache weigh`",
    )
    weights_temperature: float = Field(1.0, gt=0, description="heldout and per-sample only: larger is more uniform")
    missing: Missing = Field(
        "renormalise",
        description="a view that lacks an expert: weigh the others, leave it out, or use its label",
    )


class StudentRecipe(Recipe):
    """Everything of stage two."""

    command = "mmkd-student"
    of_other_commands = frozenset(
        {"views", "view_seed", "held_out", "flow", "flow_scratch", "boxes", "audio", "experts", "build"}
    )

    data: DataRecipe
    train: TrainRecipe = Field(default_factory=TrainRecipe)
    loss: LossRecipe = Field(default_factory=LossRecipe)
    teacher: TeacherMix = Field(default_factory=TeacherMix)
    train_split: str = Field("train", description="the split that the student trains on")
    node_copies: Path | None = Field(
        None,
        description="folder on the node's own disk for the mixed targets, which its processes share; "
        "null: below $SLURM_TMPDIR, $TMPDIR, $XDG_CACHE_HOME or ~/.cache, the first set",
    )
    thumbprint_sample: int = Field(32, ge=0, description="views compared with the teacher's pixels before training")

    def loss_options(self) -> LossOptions:
        """Return the loss with what `teacher.missing` says of clips without a target."""
        rule: Literal["drop", "label-only"] = "label-only" if self.teacher.missing == "label-only" else "drop"
        return LossOptions(**self.loss.model_dump(), without_target=rule)
