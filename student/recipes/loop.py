"""The optimiser and the length of a run: all that the training loop itself reads."""

from typing import Self

from pydantic import Field, model_validator

from mmkd.student.recipes.growing import GrowingRecipe

WITHOUT_EFFECT = frozenset({"loader_threads", "prefetch_batches", "decoded_clips_gib"})
"""Fields that change no number: a stopped run may be resumed with other values."""

WARMUP_SHARE = 0.1
"""The authors' 3 of 30 epochs."""


class LoopRecipe(GrowingRecipe):
    """The optimiser and the length of a run: all that the training loop itself reads."""

    first_fields = frozenset(
        {
            "epochs",
            "batch_size",
            "learning_rate",
            "weight_decay",
            "warmup_epochs",
            "clip_norm",
            "seed",
            "loader_threads",
            "prefetch_batches",
        }
    )

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
