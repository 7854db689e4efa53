"""What a training run does, as frozen models that refuse unknown keys; free of torch, so faults show at once.

Defaults are the authors' recipe for real footage, from their public code unless a field says otherwise; the
demo's recipes state what they change.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from mmkd.cache_tools.frames.clip_set import DataRecipe
from mmkd.cache_tools.recipes.recipe import Recipe
from mmkd.data_manifests.errors import InputError
from mmkd.student.network_table import Normalisation, is_own, known_network, own_normalisation

Missing = Literal["renormalise", "drop", "label-only"]
"""What becomes of a view that lacks an expert: the others are weighed, it is left out, or its label is used."""

WITHOUT_EFFECT = frozenset({"loader_threads", "prefetch_batches", "decoded_clips_gib"})
"""Fields that change no number: a stopped run may be resumed with other values."""

NEWER = frozenset({"normalisation", "network_options"})
"""Fields of a training's recipe that files of an earlier version lack: written only where they are set."""

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


class NormalisationRecipe(Recipe):
    """What is subtracted from each channel, and what it is divided by then; one number is for all channels."""

    mean: tuple[float, ...] = Field(min_length=1, description="of values in 0..1 (rgb) or -1..1 (flow)")
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field(min_length=1, description="as mean")

    def numbers(self) -> Normalisation:
        """Return the numbers alone."""
        return Normalisation(self.mean, self.std)


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

    network: str = Field(
        "swin3d_t",
        description="a name of student/README.md's table: swin3d_t for real footage, small3d for the demo",
    )
    weights: Path | None = Field(
        None, description="local file of Kinetics weights (safetensors, torch state dict); never downloaded"
    )
    drop_path: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="stochastic depth of the last block of swin3d and mvit; null: the network's own",
    )
    network_options: dict[str, Any] = Field(
        default_factory=dict, description="further arguments of a network that is named as module:factory"
    )
    normalisation: NormalisationRecipe | None = Field(
        None, description="mean and std of the input's channels, {mean: [...], std: [...]}; null: the network's own"
    )
    flow_scale_px: float = Field(
        20.0, gt=0, description="flow in pixels per step that maps to 1, clipped beyond (I3D: 20); flow only"
    )
    jitter: JitterRecipe = Field(default_factory=JitterRecipe, description="photometric jitter; rgb only")
    decoded_clips_gib: float = Field(
        2.0, ge=0, description="memory in GiB for clips kept decoded between epochs; changes no number"
    )

    @field_validator("network")
    @classmethod
    def _network_exists(cls, name: str) -> str:
        try:
            if not is_own(name):
                known_network(name)
        except InputError as error:
            raise ValueError(str(error)) from None
        return name

    @model_validator(mode="after")
    def _options_are_of_own_networks(self) -> Self:
        if self.network_options and not is_own(self.network):
            raise ValueError(f"network_options: {self.network} takes none; they are for networks of your own")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_set(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what was not there before it could be set: old files and checkpoints stay as they were."""
        fields: dict[str, Any] = handler(self)
        return {key: value for key, value in fields.items() if key not in NEWER or value}

    def normalised(self, modality: str) -> Normalisation:
        """Return what a new network's input is normalised with."""
        return (
            own_normalisation(self.network, modality)
            if self.normalisation is None
            else self.normalisation.numbers()
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
