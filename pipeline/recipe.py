"""The recipe of stage one: data, views, flow, boxes, experts and build, in one YAML file; free of torch."""

from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from mmkd.cache_tools.cluster.recipe import ClusterRecipe
from mmkd.cache_tools.frames.clip_set import DataRecipe
from mmkd.cache_tools.recipes.recipe import Recipe
from mmkd.cache_tools.views.drawing import ViewPolicy
from mmkd.pipeline.tvl1.params import PresetName
from mmkd.student.recipes.train import TrainRecipe

ModalityName = Literal["rgb", "flow", "boxes", "audio"]
Precision = Literal["fp16", "12-bit", "9-bit", "8-bit"]
"""Formats of mmkd.cache_tools.cache.logit_formats, the most exact first."""
FlowLayout = Literal["denseflow", "epic", "mmaction", "hdf5", "i3d", "interleaved"]
"""Layouts of flow files that are read."""


class FlowFilesRecipe(Recipe):
    """Flow that is there already, read in place of being computed (see mmkd.pipeline.flow.flow_files)."""

    path: Path = Field(description="folder with the flow of each video, or an HDF5 file of all")
    layout: FlowLayout = Field(
        description="how files are named and numbered; i3d: floats at 25 frames a second; interleaved: the "
        "authors' HDF5 of u and v in turn"
    )
    bound_px: float | None = Field(
        None,
        gt=0,
        description="what its 8-bit codes mean: denseflow 20 or 32, EPIC-100 8, EPIC-55 25; null for i3d alone",
    )
    stride: int = Field(1, ge=1, le=64, description="native frames for each field (EPIC-55: 2)")

    @model_validator(mode="after")
    def _is_stated(self) -> Self:
        if self.layout == "i3d" and (self.bound_px is not None or self.stride != 1):
            raise ValueError(
                "bound_px and stride are not for layout i3d, whose values are pixels / 20: leave them out"
            )
        if self.layout != "i3d" and self.bound_px is None:
            raise ValueError(
                f"bound_px is missing: say what the 8-bit codes of layout {self.layout} mean, e.g. --flow-bound 20 "
                "(denseflow 20 or 32, EPIC-100 8, EPIC-55 25)"
            )
        return self


class FlowRecipe(Recipe):
    """How optical flow is computed and stored; the same for `teach` and `build`."""

    preset: PresetName = Field(
        "default",
        description="default follows OpenCV's CUDA TV-L1, as denseflow and EPIC; see mmkd.pipeline.tvl1.dispatch",
    )
    short_side_px: int = Field(256, ge=16, le=2160, description="larger frames are shrunk to this before flow")
    enlarge: bool = Field(
        False, description="smaller frames are enlarged to it too, as all were before this value existed"
    )
    step: int = Field(1, ge=1, le=64, description="a pair is frames i and i + step")
    precision: Literal["float16", "uint8"] = Field(
        "float16", description="how fields are rounded before any expert sees them"
    )
    bound_px: float = Field(20.0, gt=0, description="uint8 only: values beyond +-bound are clipped")
    files: FlowFilesRecipe | None = Field(None, description="flow that is there already; null: it is computed")


class BoxesRecipe(Recipe):
    """Where object boxes come from."""

    files: tuple[Path, ...] = Field(
        (), description="annotations in the Something-Else form (JSON), or tables of `mmkd-cache boxes`"
    )
    fps: float = Field(12.0, gt=0, description="frame rate that the annotation's frame numbers count")
    max_boxes: int = Field(14, ge=1, le=64, description="boxes kept in a frame (STLT: 14)")


class AudioRecipe(Recipe):
    """How sound becomes spectrograms; the defaults are the authors' (see mmkd.pipeline.audio.spectrogram)."""

    rate_hz: int = Field(16_000, ge=1000, le=192_000, description="samples a second")
    window_seconds: float = Field(1.116, gt=0, le=60, description="sound around each sampled frame")
    fft_samples: int = Field(1024, ge=16, le=65536, description="length of the transform")
    frame_samples: int = Field(160, ge=2, le=65536, description="length of the Hann window, at most fft_samples")
    hop_samples: int = Field(80, ge=1, le=65536, description="between two columns")
    mels: int = Field(128, ge=2, le=1024, description="mel filters, the rows")

    @model_validator(mode="after")
    def _window_fits(self) -> Self:
        if self.frame_samples > self.fft_samples:
            raise ValueError(f"frame_samples {self.frame_samples} is above fft_samples {self.fft_samples}")
        if int(self.window_seconds * self.rate_hz) <= self.fft_samples // 2:
            raise ValueError(
                "window_seconds is shorter than half a transform: make it longer, or fft_samples smaller"
            )
        return self


class LayoutRecipe(Recipe):
    """Size of the layout transformer (STLT); the defaults are the published ones."""

    hidden: int = Field(768, ge=8, le=16384, description="width")
    attention_heads: int = Field(8, ge=1, le=256, description="divides hidden")
    spatial_layers: int = Field(6, ge=1, le=128, description="layers over the boxes of a frame")
    temporal_layers: int = Field(6, ge=1, le=128, description="layers over frames")
    dropout: float = Field(0.1, ge=0, lt=1)
    norm_eps: float = Field(
        1e-5, gt=0, le=1, description="epsilon of the two embeddings' layer norms; the authors': 0.1"
    )
    sides: bool = Field(False, description="see whether a hand is a left or a right one, where that is known")
    states: bool = Field(False, description="see what a hand touches, where that is known")

    def identity(self) -> dict[str, Any]:
        """Return what a fingerprint covers; fields newer than the first experts enter off their default alone."""
        newer = {name: type(self).model_fields[name].default for name in ("norm_eps", "sides", "states")}
        return {name: value for name, value in self.model_dump().items() if value != newer.get(name)}


class LookRecipe(Recipe):
    """What an expert sees of a view's interval and crop, where that is not the canonical view."""

    frames: int | None = Field(None, ge=1, le=256, description="in the view's interval; null: the view's own")
    size_px: int | None = Field(None, ge=16, le=1024, description="side of the view's crop; null: the view's own")


LAYOUT_FRAMES = 64
"""Positions of the layout transformer."""


class ExpertRecipe(Recipe):
    """One unimodal expert."""

    modality: ModalityName = Field(description="what the expert sees")
    views: int | None = Field(None, ge=1, description="random views in turn; null: a fresh one every epoch")
    train: TrainRecipe = Field(default_factory=TrainRecipe, description="network and optimisation")
    layout: LayoutRecipe = Field(default_factory=LayoutRecipe, description="boxes only: the layout transformer")
    look: LookRecipe = Field(default_factory=LookRecipe, description="frames and size of its own")
    flow_stack: int = Field(1, ge=1, le=32, description="flow only: consecutive fields around each frame")

    @model_validator(mode="after")
    def _look_fits(self) -> Self:
        if self.flow_stack > 1 and self.modality != "flow":
            raise ValueError(f"flow_stack {self.flow_stack} is for flow experts; this one sees {self.modality}")
        if self.modality != "rgb" and (names := self.train.only_rgb()):
            raise ValueError(f"train.{names[0]} is for rgb experts; this one sees {self.modality}: leave it out")
        if self.train.input is not None:
            raise ValueError("train.input is for students; say look.frames and look.size_px of an expert")
        if self.modality == "boxes" and self.look.size_px is not None:
            raise ValueError("look.size_px is for rgb and flow; boxes have no size: leave it out")
        if self.modality == "boxes" and (self.look.frames or 0) > LAYOUT_FRAMES:
            raise ValueError(f"look.frames {self.look.frames}: a boxes expert takes {LAYOUT_FRAMES} at most")
        return self


class HeldOutRecipe(Recipe):
    """The part of the training split on which no expert trains, for fitting weights."""

    fraction: float = Field(0.1, ge=0, le=0.5, description="share of the training clips; 0: none")
    seed: int = Field(0, ge=0)


class BuildRecipe(Recipe):
    """What the cache holds."""

    splits: tuple[str, ...] | None = Field(None, description="splits to cache; null: all that hold a label")
    views: int = Field(8, ge=1, le=1024, description="random views of each training clip")
    shard_rows: int = Field(512, ge=1, le=2048, description="clips in a shard")
    shard_views: int | None = Field(
        None, ge=1, description="views in a shard; divides views; null: all, or those of the cache that grows"
    )
    batch_views: int = Field(32, ge=1, le=1024, description="views that an expert sees at once")
    precision: Precision = Field(
        "fp16", description="how logits are stored: 2, 1.5, 1.125 or 1 byte a class; see `max_kl`"
    )
    max_kl: float = Field(
        1e-4,
        gt=0,
        description="storing may cost at most this KL divergence in nats at any temperature from 1 to 10, else the "
        "build stops; larger accepts coarser formats",
    )

    @model_validator(mode="after")
    def _views_divide(self) -> Self:
        if self.shard_views is not None and self.views % self.shard_views:
            below = self.views // self.shard_views * self.shard_views
            possible = " or ".join(str(number) for number in (below, below + self.shard_views) if number)
            raise ValueError(
                f"shard_views {self.shard_views} must divide views {self.views}; with it, give {possible} views"
            )
        splits = self.splits or ()
        if twice := [name for name in splits if splits.count(name) > 1]:
            raise ValueError(f"splits: {twice[0]!r} stands there twice")
        return self


class TeacherRecipe(Recipe):
    """Everything of stage one."""

    command = "mmkd-cache"
    flags = MappingProxyType(
        {
            "boxes.files": "--boxes",
            "flow.files.path": "--flow-files",
            "flow.files.layout": "--flow-layout",
            "flow.files.bound_px": "--flow-bound",
        }
    )
    of_other_commands = frozenset({"train", "loss", "teacher", "node_copies", "thumbprint_sample"})

    data: DataRecipe
    train_split: str = Field("train", description="the split that experts train on, with random views")
    views: ViewPolicy = Field(default_factory=ViewPolicy)
    view_seed: int = Field(0, ge=0, description="seed of the random views")
    held_out: HeldOutRecipe = Field(default_factory=HeldOutRecipe)
    flow: FlowRecipe = Field(default_factory=FlowRecipe)
    flow_scratch: Path | None = Field(
        None, description="folder for flow computed once; see mmkd.pipeline.flow.scratch"
    )
    boxes: BoxesRecipe = Field(default_factory=BoxesRecipe)
    audio: AudioRecipe = Field(default_factory=AudioRecipe)
    experts: dict[str, ExpertRecipe] = Field(default_factory=dict, description="name -> expert")
    build: BuildRecipe = Field(default_factory=BuildRecipe)
    cluster: ClusterRecipe = Field(
        default_factory=ClusterRecipe, description="what `mmkd-cache submit` asks a cluster for"
    )

    @property
    def scratch(self) -> Path:
        """The flow scratch folder: the one asked for, or one beside the manifest."""
        return self.flow_scratch or self.data.manifest.with_name(self.data.manifest.name + ".flow")
