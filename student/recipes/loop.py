"""The optimiser and the length of a run: all that the training loop itself reads."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from mmkd.cache_tools.recipes.recipe import Recipe
from mmkd.data_manifests.counted import counted
from mmkd.student.network_table import OWN_NETWORK
from mmkd.student.recipes.balance import BalanceRecipe
from mmkd.student.recipes.growing import GrowingRecipe
from mmkd.student.recipes.mix import MixRecipe

WITHOUT_EFFECT = frozenset(
    {
        "loader_threads",
        "loader_processes",
        "prefetch_batches",
        "decoded_clips_gib",
        "checkpoint_minutes",
        "log_steps",
    }
)
"""Fields that change no number: a stopped run may be resumed with other values."""

WARMUP_SHARE = 0.1
"""The authors' 3 of 30 epochs."""


Precision = Literal["auto", "fp32", "bf16", "fp16"]
PrecisionMode = Literal["deterministic", "fast"]
OPTIMIZERS = ("adamw", "sgd")


class AveragingRecipe(Recipe):
    """An exponential moving average of the weights, which is what the run leaves and what is validated."""

    decay: float = Field(0.9999, ge=0, lt=1, description="share that stays at each step; nearer 1 averages longer")
    warmup: bool = Field(
        True, description="begin with short averages: step n keeps min(decay, (1 + n) / (10 + n)), n from 0"
    )


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
    repeats: int = Field(
        1,
        ge=1,
        le=64,
        description="views of each clip in a step, for which it is decoded once; batch_size counts views, so an "
        "epoch has so many times the steps",
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
    optimizer: str = Field(
        "adamw", description="adamw, sgd (momentum 0.9, Nesterov), or module:factory, called with groups and lr"
    )
    optimizer_options: dict[str, Any] = Field(
        default_factory=dict, description="further arguments of the optimiser, such as {momentum: 0.95}"
    )
    schedule: Literal["linear", "cosine"] = Field("linear", description="how the rate falls to 0 after its rise")
    rate_for_batch: int | None = Field(
        None,
        ge=1,
        description="learning_rate is for batches of so many clips, and is scaled to batch_size; null: as it is",
    )
    layer_decay: float | None = Field(
        None, gt=0, le=1, description="factor on the rate from each block to the one before it; null: none"
    )
    freeze: Literal["backbone", "batch_norm"] | None = Field(
        None, description="what does not learn: all but the heads, or the batch norms (with their statistics)"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of each label that is spread over all classes of its head"
    )
    class_balance: BalanceRecipe | None = Field(
        None, description="weights of classes or adjusted logits in the label term, for long tails; null: none"
    )
    mix: MixRecipe | None = Field(
        None, description="clips mixed in pairs, with labels and targets, {mixup_alpha: 0.4}; null: none; rgb only"
    )
    averaging: AveragingRecipe | None = Field(None, description="moving average of the weights; null: none")
    accumulate: int = Field(
        1, ge=1, le=4096, description="parts in which a step's batch is computed, to fit memory; the step stays one"
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute each block's activations in the backward pass: less memory, a third more time"
    )
    precision: Precision = Field(
        "auto", description="of the network's arithmetic; auto: bf16 on CUDA, fp32 elsewhere; fp16 scales the loss"
    )
    precision_mode: PrecisionMode = Field(
        "deterministic",
        description="deterministic: kernels that repeat bit for bit, no TF32; on CUDA torch warns of what has "
        "none, the gradients of 3D pooling in s3d and mvit; fast: TF32, and the fastest kernels",
    )
    compile: bool = Field(False, description="torch.compile the network: slow to begin, faster then")
    channels_last: bool = Field(False, description="channels innermost in memory: faster convolutions on CUDA")
    checkpoint_minutes: float | None = Field(
        10, gt=0, description="minutes between checkpoints within an epoch; null: at epochs' ends alone"
    )
    log_steps: int = Field(
        50, ge=1, description="steps to each row of steps.csv; further rows end at epochs' ends and checkpoints"
    )
    patience_epochs: int | None = Field(
        None, ge=1, description="stop after so many epochs without a better held-out accuracy; null: never early"
    )
    keep: Literal["best", "last"] | None = Field(
        None,
        description="the epoch whose weights the run leaves, best by its held-out clips; null: the best where "
        "clips are held out, else the last",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of initial weights, clips' order, views, jitter and dropout")
    loader_threads: int = Field(4, ge=1, le=256, description="threads that read ahead; they change no number")
    loader_processes: int | None = Field(
        None,
        ge=0,
        le=256,
        description="processes that decode, in place of threads; 0: threads; null: one less than cores, at most "
        "16, and 0 where all clips stay decoded, below 4 cores, and for less than 2,048 views",
    )
    prefetch_batches: int = Field(
        4, ge=1, le=64, description="batches read ahead, beyond one for each process; larger needs more memory"
    )

    @field_validator("optimizer")
    @classmethod
    def _optimizer_exists(cls, name: str) -> str:
        if name not in OPTIMIZERS and not OWN_NETWORK.fullmatch(name):
            raise ValueError(f"{name!r} is not one of {', '.join(OPTIMIZERS)}, and not of the form module:factory")
        return name

    @model_validator(mode="after")
    def _repeats_fill_batch(self) -> Self:
        if self.batch_size % self.repeats:
            raise ValueError(f"batch_size ({self.batch_size}) is no multiple of repeats ({self.repeats})")
        return self

    @model_validator(mode="after")
    def _parts_within_batch(self) -> Self:
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate ({self.accumulate}) is above batch_size ({self.batch_size})")
        return self

    @model_validator(mode="after")
    def _different_clips_to_mix(self) -> Self:
        self.check_mixing(processes=1)
        return self

    def check_mixing(self, *, processes: int) -> None:
        """Raise ValueError where mixing finds no pairs: all views that are computed together are of one clip."""
        together = self.batch_size // processes // self.accumulate
        if self.mix is not None and together <= self.repeats:
            shared = f" by {processes} processes" if processes > 1 else ""
            raise ValueError(
                f"mix pairs different clips, and of batch_size {self.batch_size}, computed{shared} in "
                f"{counted(self.accumulate, 'part')}, views of one clip alone are in each: set a larger "
                "batch_size, or leave mix out"
            )

    @model_validator(mode="after")
    def _warmup_within_run(self) -> Self:
        if self.warmup_epochs is not None and self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs ({self.warmup_epochs}) must be below epochs ({self.epochs})")
        return self

    def asks_for_held_out(self) -> str | None:
        """Return the setting that needs held-out clips after each epoch, or None."""
        if self.patience_epochs is not None:
            return f"patience_epochs={self.patience_epochs}"
        return "keep=best" if self.keep == "best" else None

    @property
    def peak_rate(self) -> float:
        """The highest rate, resolved."""
        return self.learning_rate * (self.batch_size / self.rate_for_batch if self.rate_for_batch else 1)

    @property
    def warmup(self) -> float:
        """Epochs of warm-up, resolved."""
        return WARMUP_SHARE * self.epochs if self.warmup_epochs is None else self.warmup_epochs
