"""One training run of a network: student, baseline or expert."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from mmkd.data_manifests.errors import InputError
from mmkd.student.network_table import (
    DIFFERENCES,
    Normalisation,
    check_input,
    is_own,
    known_network,
    own_normalisation,
)
from mmkd.student.recipes.augment import ErasingRecipe, JitterRecipe, RandAugmentRecipe
from mmkd.student.recipes.loop import LoopRecipe
from mmkd.student.recipes.seen import InputRecipe, NormalisationRecipe

ONLY_RGB = ("input", "permute_channels", "grey", "rand_augment", "erasing", "mix")
"""Fields without effect on another modality."""


class TrainRecipe(LoopRecipe):
    """One training run of a network: student, baseline or expert."""

    first_fields = LoopRecipe.first_fields | {
        "network",
        "weights",
        "drop_path",
        "flow_scale_px",
        "jitter",
        "decoded_clips_gib",
    }

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
    input: InputRecipe | None = Field(
        None, description="a cheaper look at the views, {every: 2, size_px: 160}; null: the whole; rgb only"
    )
    stem: Literal["frames", "differences"] = Field(
        "frames",
        description="what the network sees: frames, or differences between them (five times as large), which leave "
        "motion alone; rgb only",
    )
    flow_scale_px: float = Field(
        20.0, gt=0, description="flow in pixels per step that maps to 1, clipped beyond (I3D: 20); flow only"
    )
    jitter: JitterRecipe = Field(default_factory=JitterRecipe, description="photometric jitter; rgb only")
    permute_channels: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the clips whose red, green and blue change places in training, so that colours tell "
        "less and shapes and motion more; rgb only",
    )
    grey: float = Field(0.0, ge=0, le=1, description="share of the clips that turn grey in training; rgb only")
    rand_augment: RandAugmentRecipe | None = Field(
        None, description="RandAugment's photometric operations, before the jitter; null: none; rgb only"
    )
    erasing: ErasingRecipe | None = Field(
        None, description="a window erased in all frames of some clips, {probability: 0.25}; null: none; rgb only"
    )
    held_out: float = Field(
        0.0,
        ge=0,
        le=0.5,
        description="share of the training clips on which this network does not learn, and which tell after each "
        "epoch how good it is: whole videos, of each class its share; 0: none",
    )
    held_out_seed: int = Field(0, ge=0, lt=2**32, description="of the choice of these clips")
    decoded_clips_gib: float = Field(
        2.0,
        ge=0,
        description="memory in GiB for clips kept decoded between epochs, by threads alone; changes no number",
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

    @model_validator(mode="after")
    def _best_epoch_is_told(self) -> Self:
        if not self.held_out and (asked := self.asks_for_held_out()):
            raise ValueError(f"{asked} needs clips that tell the best epoch: set held_out, such as 0.1")
        return self

    def only_rgb(self) -> list[str]:
        """Return the fields that are set and change RGB alone, but for the jitter, which is on by default."""
        return [name for name in ONLY_RGB if getattr(self, name)] + ["stem"] * (self.stem != "frames")

    def seen_shape(self, frames: int, size_px: int) -> tuple[int, int]:
        """Return T and S of what the network sees of views; InputError where `input` leaves nothing out."""
        return (frames, size_px) if self.input is None else self.input.shape(frames, size_px)

    def check_views(self, *, frames: int, size_px: int) -> None:
        """Raise InputError where the network cannot see views of T frames and S x S pixels."""
        seen_frames, seen_px = self.seen_shape(frames, size_px)
        check_input(self.network, frames=seen_frames, size_px=seen_px)

    def normalised(self, modality: str) -> Normalisation:
        """Return what a new network's input is normalised with."""
        if self.normalisation is not None:
            return self.normalisation.numbers()
        return DIFFERENCES if self.stem == "differences" else own_normalisation(self.network, modality)
