"""The recipe of stage two: data, network and optimisation, loss, and how the cached experts are mixed."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from mmkd.cache_tools.frames.clip_set import DataRecipe
from mmkd.cache_tools.recipes.recipe import Recipe
from mmkd.student.recipe import LossOptions, LossRecipe, TrainRecipe


class TeacherMix(Recipe):
    """How cached experts become a teacher; changing it costs seconds and no GPU."""

    weights: str = Field(
        "uniform",
        description="uniform, heldout, per-sample, a list such as rgb=1,flow=2,boxes=2, or FILE.json[:SCHEME] of "
        "`mmkd-cache weigh`",
    )
    weights_temperature: float = Field(1.0, gt=0, description="heldout and per-sample only: larger is more uniform")
    missing: Literal["renormalise", "drop", "label-only"] = Field(
        "renormalise",
        description="a view that lacks an expert: weigh the others, leave it out, or use its label",
    )


class StudentRecipe(Recipe):
    """Everything of stage two."""

    command = "mmkd-student"
    of_other_commands = frozenset(
        {"views", "view_seed", "held_out", "flow", "flow_scratch", "boxes", "experts", "build"}
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
