"""What a training run does, as frozen models that refuse unknown keys; free of torch, so faults show at once.

Defaults are the authors' recipe for real footage, from their public code unless a field says otherwise; the
demo's recipes state what they change.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from mmkd.cache_tools.frames.clip_set import DataRecipe
from mmkd.cache_tools.recipes.recipe import Recipe
from mmkd.data_manifests.errors import InputError

Missing = Literal["renormalise", "drop", "label-only"]
"""What becomes of a view that lacks an expert: the others are weighed, it is left out, or its label is used."""
NetworkName = Literal["small3d", "swin3d_t", "r3d_18"]

WITHOUT_EFFECT = frozenset({"loader_threads", "prefetch_batches", "decoded_clips_gib"})
"""Fields that change no number: a stopped run may be resumed with other values."""

WARMUP_SHARE = 0.1
"""The authors' 3 of 30 epochs."""


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


class JitterRecipe(Recipe):
    """Photometric jitter of RGB in training, one draw per clip; larger changes more, 0 switches it off."""

    brightness: float = Field(0.25, ge=0, le=1, description="factor drawn from [1 - b, 1 + b]")
    contrast: float = Field(0.25, ge=0, le=1, description="factor drawn from [1 - c, 1 + c]")
    saturation: float = Field(0.25, ge=0, le=1, description="factor drawn from [1 - s, 1 + s]")
    hue: float = Field(0.1, ge=0, le=0.5, description="turn of the colour wheel from [-h, h]; 0.5 is half a turn")


class LossRecipe(Recipe):
    """How targets and labels make the loss (see mmkd.student.training.losses)."""

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


class LoopRecipe(Recipe):
    """The optimiser and the length of a run: all that the training loop itself reads."""

    epochs: int = Field(30, ge=1, le=1_000_000, description="passes over the training clips")
    batch_size: int = Field(
        16, ge=1, le=65536, description="clips per step; an epoch is cut into ceil(clips / batch_size) even batches"
    )
    learning_rate: float = Field(1e-4, gt=0, le=1, description="peak rate of AdamW")
    weight_decay: float = Field(
        0.02, ge=0, le=1, description="decoupled decay of matrices and kernels, not of norms and biases"
    )
    warmup_epochs: float | None = Field(
        None,
        ge=0,
        description="linear rise of the rate from 0, before its linear fall to 0, both per step; null: a "
        "tenth of the epochs (authors: 3 of 30)",
    )
    clip_norm: float = Field(
        5.0, gt=0, description="gradients are scaled down to this global norm; larger clips less"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of initial weights, clips' order, views, jitter and dropout")
    loader_threads: int = Field(4, ge=1, le=256, description="threads that read ahead; they change no number")
    prefetch_batches: int = Field(4, ge=1, le=64, description="batches read ahead; larger needs more memory")

    @model_validator(mode="after")
    def _warmup_within_run(self) -> Self:
        if self.warmup_epochs is not None and self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs ({self.warmup_epochs}) must be below epochs ({self.epochs})")
        return self

    @property
    def warmup(self) -> float:
        """Epochs of warm-up, resolved."""
        return WARMUP_SHARE * self.epochs if self.warmup_epochs is None else self.warmup_epochs


class TrainRecipe(LoopRecipe):
    """One training run of a network: student, baseline or expert."""

    network: NetworkName = Field("swin3d_t", description="swin3d_t for real footage, small3d for the demo")
    weights: Path | None = Field(
        None, description="local file of Kinetics weights (safetensors, torch state dict); never downloaded"
    )
    drop_path: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="stochastic depth of swin3d_t's last block; null: the network's own, 0.2",
    )
    flow_scale_px: float = Field(
        20.0, gt=0, description="flow in pixels per step that maps to 1, clipped beyond (I3D: 20); flow only"
    )
    jitter: JitterRecipe = Field(default_factory=JitterRecipe, description="photometric jitter; rgb only")
    decoded_clips_gib: float = Field(
        2.0, ge=0, description="memory in GiB for clips kept decoded between epochs; changes no number"
    )


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
