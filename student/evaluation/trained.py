"""A trained student, read from its run's folder alone: what it sees of a video, and what it says.

    student = load_student(Path("runs/student"))
    for view in student.views(facts):                            # facts: ClipFacts of a clip
        pixels = canonical_view(clip_frames, view, student.policy.size_px)   # uint8 (T, S, S, 3)
        logits = student.logits(pixels[None])                    # {head: float32 (1, classes)}
    student.heads["action"][logits["action"][0].argmax()]        # the class's name

Neither cache nor manifest nor weights to start from are needed, and no stored code runs.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from mmkd.cache_tools.frames.records import ClipFacts, Float32Array, Float64Array, UInt8Array
from mmkd.cache_tools.views.canonical import CANONICAL_RULES
from mmkd.cache_tools.views.drawing import VIEW_RULES, ViewPolicy, evaluation_views
from mmkd.cache_tools.views.view import View
from mmkd.data_manifests.errors import InputError, VerificationError
from mmkd.student.evaluation.run_files import (
    MODEL_AGAIN,
    MODEL_FILE,
    RUN_FILE,
    RunRecord,
    StudentInput,
    read_model,
    read_run,
)
from mmkd.student.network_table import Normalisation
from mmkd.student.networks.networks import VideoClassifier, build_network
from mmkd.student.networks.own_networks import require_trust
from mmkd.student.recipes.loop import Precision
from mmkd.student.recipes.train import TrainRecipe
from mmkd.student.training.devices import reproducible


@dataclass(frozen=True)
class TrainedStudent:
    """A student in memory, ready to give logits."""

    network: VideoClassifier
    """In evaluation mode on its device; it normalises its input itself."""
    policy: ViewPolicy
    """How it looks at a clip: frames T, size S in pixels, sampling, evaluation views."""
    heads: dict[str, list[str]]
    """Head -> ordered class list."""
    device: torch.device
    """Where it runs."""
    precision: Precision = "auto"
    """Of its network's arithmetic in evaluation and prediction; `auto` is bf16 on CUDA and fp32 elsewhere."""

    def views(self, facts: ClipFacts, times_seconds: Float64Array | None = None) -> tuple[View, ...]:
        """Return the views under which a clip is evaluated; the mean of their logits is the student's word.

        A student whose views are stated in seconds needs `times_seconds` (frames,), those of the clip's frames.
        """
        return evaluation_views(facts, self.policy, times_seconds)

    def logits(self, pixels: UInt8Array) -> dict[str, Float32Array]:
        """Return head -> float32 (B, classes) for canonical views, uint8 (B, T, S, S, 3) RGB, computed in fp32."""
        wanted = (self.policy.frames, self.policy.size_px, self.policy.size_px, 3)
        if pixels.shape[1:] != wanted or pixels.dtype != "uint8":
            raise ValueError(
                f"expected uint8 (B, {', '.join(map(str, wanted))}), got {pixels.dtype} {pixels.shape}"
            )
        with torch.inference_mode(), reproducible(self.device):
            outputs = self.network({"rgb": torch.from_numpy(pixels).to(self.device)})
        return {head: value.float().cpu().numpy() for head, value in outputs.items()}


def load_student(run: Path, device: torch.device | str = "cpu", trusted: Collection[str] = ()) -> TrainedStudent:
    """Read the student of a finished run; a network that is not mmkd's is run only when it is among the `trusted`.

    Raises InputError for a folder without a finished run, and for a run of an earlier version, which does not say
    what its student sees; VerificationError for one that is not what was written.
    """
    record = read_run(run)
    seen = student_input(run, record)
    try:
        policy = ViewPolicy.model_validate(seen.views)
        recipe = TrainRecipe.model_validate(record.recipe["train"])
    except (ValidationError, KeyError) as error:
        raise InputError(f"{run / RUN_FILE} does not describe a student: {str(error).splitlines()[0]}") from error
    require_trust(recipe.network, trusted, f"run {run}")
    heads = {head: len(classes) for head, classes in record.heads.items()}
    network = build_network(
        without_weights(recipe),
        heads=heads,
        modality="rgb",
        frames=policy.frames,
        size_px=policy.size_px,
        normalisation=Normalisation(tuple(seen.mean), tuple(seen.std)),
    )
    state = model_state(run, record)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{run}: {RUN_FILE} does not describe the model: {str(error).splitlines()[0]}") from error
    device = torch.device(device)
    return TrainedStudent(network.to(device).eval(), policy, record.heads, device, recipe.precision)


def model_state(run: Path, record: RunRecord) -> dict[str, Tensor]:
    """Return a finished run's parameters; raises as `read_model`."""
    data = read_model(run, record)
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise VerificationError(f"{run / MODEL_FILE} is damaged ({error}); {MODEL_AGAIN}") from error


def student_input(run: Path, record: RunRecord) -> StudentInput:
    """Return what a run's student sees; InputError where it does not say, or views had other rules."""
    if record.input is None:
        raise InputError(
            f"{run / RUN_FILE} does not say what the student sees: an earlier version made it. Run the same "
            "`mmkd-student train` again, which adds it"
        )
    if (record.input.view_rules, record.input.canonical) != (VIEW_RULES, CANONICAL_RULES):
        raise InputError(
            f"{run}: the student sees views by other rules than this version's; use the one of its time"
        )
    return record.input


def without_weights(recipe: TrainRecipe) -> TrainRecipe:
    """Return the recipe of a network whose parameters are known: the file that it started from is not needed."""
    return recipe.model_copy(update={"weights": None})
