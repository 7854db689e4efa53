"""Everything of stage two, as one recipe.

Defaults are the authors' recipe for real footage, from their public code unless a field says otherwise; the
demo's recipes state what they change.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializationInfo, field_serializer

from mmkd.cache_tools.cluster.recipe import ClusterRecipe
from mmkd.cache_tools.frames.clip_set import DataRecipe
from mmkd.cache_tools.recipes.recipe import WHOLE, Recipe
from mmkd.cache_tools.views.drawing import ViewPolicy
from mmkd.data_manifests.errors import InputError
from mmkd.student.recipes.growing import GrowingRecipe
from mmkd.student.recipes.loss import LossOptions, LossRecipe, courses, values_of
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


@dataclass(frozen=True)
class Looking:
    """What else looks on while it trains; no number of the run depends on it."""

    profile_steps: int | None = None
    """Steps to profile after a warm-up; None: none."""
    tensorboard: Path | None = None
    """Folder for TensorBoard's event files; None: none."""


UNWATCHED = Looking()


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


class StudentRecipe(GrowingRecipe):
    """Everything of stage two."""

    command = "mmkd-student"
    of_other_commands = frozenset({"held_out", "flow", "flow_scratch", "boxes", "audio", "experts", "build"})
    first_fields = frozenset(
        {"data", "train", "loss", "teacher", "train_split", "node_copies", "thumbprint_sample"}
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

    views: ViewPolicy | None = Field(
        None,
        description="without --cache, how views look at a clip, as in the recipe of `mmkd-cache build`; null: 16 "
        "frames of 224 x 224. With a cache its own: what is given here must be the same",
    )
    view_seed: int = Field(0, ge=0, description="seed of the random views, likewise")
    cluster: ClusterRecipe = Field(
        default_factory=ClusterRecipe, description="what `mmkd-student submit` asks a cluster for"
    )

    @field_serializer("views")
    def _without_the_other_distance(
        self, views: ViewPolicy | None, info: SerializationInfo
    ) -> dict[str, Any] | None:
        """Leave out the distance of frames that does not hold: a policy takes one of the two."""
        if views is None or info.context == WHOLE:
            return None if views is None else views.model_dump(mode="json")
        return views.identity()

    def policy(self) -> ViewPolicy:
        """Return how views look at a clip where no cache says so."""
        return self.views or ViewPolicy()

    def of_teacher(self) -> list[str]:
        """Return the settings that are not the default's, and mean nothing without a teacher."""
        found = [
            f"{part}.{name}"
            for part in ("teacher", "loss")
            for name, field in type(getattr(self, part)).model_fields.items()
            if getattr(getattr(self, part), name) != field.default
        ]
        return found + (["node_copies"] if self.node_copies is not None else [])

    def refuse_teacher(self, flags: Mapping[str, str], *, labels_only: bool) -> None:
        """Raise InputError where a run without a cache is asked for a teacher: by flags, or by its recipe.

        `flags` is setting -> flag. What the recipe says is passed over where the run is to be on labels only.
        """
        of_recipe = [] if labels_only else [name for name in self.of_teacher() if name not in flags]
        asked = [*flags.values(), *of_recipe]
        if asked:
            need = "needs" if len(asked) == 1 else "need"
            advice = "or leave that out" if labels_only else "or --labels-only to train without one"
            raise InputError(f"{', '.join(asked)} {need} a teacher: give --cache, {advice}")

    def of_labels_alone(self) -> list[str]:
        """Return the settings that change the label term, where a student has none because its weight is 0."""
        weights = [weight for course in courses(self.loss.label_weight) for weight in values_of(course)]
        if any(weights) or self.teacher.missing == "label-only":
            return []
        return [f"train.{name}" for name in ("label_smoothing", "class_balance") if getattr(self.train, name)]

    def loss_options(self) -> LossOptions:
        """Return the loss with what `teacher.missing` says of clips without a target."""
        rule: Literal["drop", "label-only"] = "label-only" if self.teacher.missing == "label-only" else "drop"
        return LossOptions(**self.loss.model_dump(), without_target=rule)
