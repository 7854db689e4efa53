"""How far logits move when nothing that matters has changed, and when something has: the tolerance of `drift`.

    python tests/benchmarks/drift.py ROOT [--experts DIR] [--views N] [--flips N]

ROOT is a finished `make demo` (trained experts in ROOT/seed-0/experts) or any folder with the demo's files and
--experts. Each row is the KL divergence in nats (T = 1) of the changed logits from the stored ones, that is those
of the build's batches after the round trip through fp16: over all views and heads the mean and the largest. Benign
rows are another batch size, thread count, decoder or precision; harmful ones another crop, frame, or weight. Last
comes swin3d_t at 16 x 112 x 112 without training, its head scaled so that its logits spread like a trained
teacher's (standard deviation 3): noise in, but a deep network's arithmetic.
"""

import argparse
import copy
import dataclasses
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from mmkd.cache_tools.cache.logit_formats import decode_logits, encode_logits
from mmkd.cache_tools.cache.softmax import kl_divergence
from mmkd.cache_tools.frames.clip_set import ClipSet, ClipVideo
from mmkd.cache_tools.frames.source import VideoFiles
from mmkd.cache_tools.recipes.recipe import load_recipe
from mmkd.cache_tools.views.drawing import random_views
from mmkd.cache_tools.views.view import View
from mmkd.pipeline.experts.expert import Expert, load_expert
from mmkd.pipeline.inputs.boxes import BoxFile, open_boxes
from mmkd.pipeline.inputs.expert_views import Inputs
from mmkd.pipeline.inputs.modalities import MODALITIES, ViewedClip, needs_flow
from mmkd.pipeline.inputs.prepare import ClipJob, FlowJob, prepare_clip
from mmkd.pipeline.recipe import TeacherRecipe
from mmkd.student.networks.networks import build_network
from mmkd.student.recipes.train import TrainRecipe

BUILD_BATCH = 32
Logits = dict[str, np.ndarray]
Forward = Callable[[Sequence[Inputs]], Logits]


class Clips:
    """One random view of each of some clips of the training split, prepared as the build does."""

    def __init__(self, root: Path, count: int) -> None:
        named = {"data.manifest": str(root / "manifest.jsonl"), "data.videos": str(root / "videos")}
        named["boxes.files"] = [str(root / "bounding_boxes.json")]
        self.recipe = load_recipe(TeacherRecipe, files=[root / "teacher.yaml"], named=named)
        clip_set = ClipSet(self.recipe.data)
        self.items = list(clip_set.probe(clip_set.manifest.split("train")[:count]))
        self.views = [self._view(item, clip_set) for item in self.items]
        self.source = clip_set.source
        self.boxes: BoxFile = open_boxes(self.recipe.boxes, {item.clip.video for item in self.items})

    def _view(self, item: ClipVideo, clip_set: ClipSet) -> View:
        options = {"dataset": clip_set.manifest.dataset, "clip_id": item.clip.clip_id, "seed": 0}
        return random_views(item.facts, self.recipe.views, **options, flip_allowed=False, numbers=[0])[0]

    def inputs(self, modality: str, change: Callable[[View, ClipVideo], View] | None = None) -> list[Inputs]:
        """Return what an expert sees of each view."""
        flow = FlowJob(self.recipe.flow, None, "cpu") if needs_flow([modality]) else None
        found = []
        for item, stored in zip(self.items, self.views, strict=True):
            view = change(stored, item) if change else stored
            clip = prepare_clip(ClipJob(self.source, item, (view,), self.recipe.views.size_px, flow))
            found += MODALITIES[modality].inputs(ViewedClip(item, [view], clip, self.boxes))
        return found

    def with_pyav(self, modality: str) -> list[Inputs]:
        """Return the same, decoded by PyAV alone."""
        kept, self.source = self.source, VideoFiles(self.source.root, force_pyav=True)
        items, self.items = (
            self.items,
            [dataclasses.replace(i, video=self.source.probe(i.clip.video)) for i in self.items],
        )
        found = self.inputs(modality)
        self.source, self.items = kept, items
        return found


def moved_crop(view: View, item: ClipVideo) -> View:
    """Return the view one pixel further to the right (to the left at the border)."""
    left, top, width, height = view.crop_xywh
    left += 1 if left + width < item.facts.width else -1
    return dataclasses.replace(view, crop_xywh=(left, top, width, height))


def later_frames(view: View, item: ClipVideo) -> View:
    """Return the view one native frame later."""
    last = item.facts.first_frame + item.facts.frame_count - 1
    return dataclasses.replace(view, frame_indices=np.minimum(view.frame_indices + 1, last))


def other_rounding(inputs: Sequence[Inputs]) -> list[Inputs]:
    """Return RGB with every value one grey level up or down at random: worse than another colour conversion."""
    random, found = np.random.default_rng(0), []
    for item in inputs:
        noise = random.integers(-1, 2, item["rgb"].shape)
        found.append({"rgb": np.clip(item["rgb"].astype(np.int16) + noise, 0, 255).astype(np.uint8)})
    return found


def forward(expert: Expert, inputs: Sequence[Inputs], *, batch: int = BUILD_BATCH) -> Logits:
    """Return head -> (views, classes), in batches of a size."""
    parts = []
    for start in range(0, len(inputs), batch):
        chosen = inputs[start : start + batch]
        stacked = {name: torch.from_numpy(np.stack([item[name] for item in chosen])) for name in chosen[0]}
        parts.append(expert.logits(stacked))
    return {head: np.concatenate([part[head] for part in parts]) for head in parts[0]}


def amp(expert: Expert, inputs: Sequence[Inputs]) -> Logits:
    """Return the logits under bfloat16 autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        return forward(expert, inputs)


def two_threads(expert: Expert, inputs: Sequence[Inputs]) -> Logits:
    """Return the logits of two threads."""
    torch.set_num_threads(2)
    try:
        return forward(expert, inputs)
    finally:
        torch.set_num_threads(1)


def flipped_weights(expert: Expert, inputs: Sequence[Inputs], flips: int) -> list[Logits]:
    """Return the logits after one bit of one weight was flipped, for random weights and all 32 bits in turn."""
    random, found = np.random.default_rng(0), []
    for number in range(flips):
        network = copy.deepcopy(expert.network)
        weights = [value.data for value in network.parameters()]
        sizes = np.array([value.numel() for value in weights])
        chosen = weights[random.choice(len(weights), p=sizes / sizes.sum())]
        place = tuple(int(random.integers(size)) for size in chosen.shape)
        word = np.array(chosen[place].item(), np.float32).view(np.uint32) ^ np.uint32(1 << (number % 32))
        chosen[place] = float(word.view(np.float32))
        found.append(forward(dataclasses.replace(expert, network=network), inputs))
    return found


def stored(logits: Logits) -> Logits:
    """Return what a cache gives back."""
    return {head: decode_logits(*encode_logits(value)) for head, value in logits.items()}


def divergence(reference: Logits, changed: Logits) -> np.ndarray:
    """Return KL(stored || changed) of all views and heads; infinite where the changed logits are not finite."""
    found = []
    for head, value in reference.items():
        with np.errstate(all="ignore"):
            kl = kl_divergence(value, changed[head])
        found.append(np.where(np.isfinite(changed[head]).all(-1), kl, np.inf))
    return np.concatenate(found)


def show(name: str, kl: np.ndarray) -> None:
    """Print one row."""
    print(f"  {name:44} mean {kl.mean():9.1e}   max {kl.max():9.1e}")


def compare(expert: Expert, inputs: Sequence[Inputs], *, flips: int) -> Logits:
    """Print what the arithmetic alone does, and what flipped bits of weights do; return the stored logits."""
    kept = forward(expert, inputs)
    reference = stored(kept)
    spread = float(np.mean([value.std(-1).mean() for value in kept.values()]))
    print(f"{expert.name} ({len(inputs)} views, logits' standard deviation {spread:.1f})")
    show("benign: stored in fp16, same batches", divergence(reference, kept))
    for batch in (1, 7, 31):
        show(f"benign: batches of {batch}", divergence(reference, forward(expert, inputs, batch=batch)))
    order = np.random.default_rng(0).permutation(len(inputs))
    mixed = forward(expert, [inputs[i] for i in order], batch=31)
    undone = {head: value[np.argsort(order)] for head, value in mixed.items()}
    show("benign: batches of 31, shuffled", divergence(reference, undone))
    show("benign: 2 threads in place of 1", divergence(reference, two_threads(expert, inputs)))
    show("benign: bfloat16 autocast", divergence(reference, amp(expert, inputs)))
    worst = np.sort([divergence(reference, changed).max() for changed in flipped_weights(expert, inputs, flips)])
    if flips:
        shares = ", ".join(f"{(worst > t).mean():.2f} above {t:.0e}" for t in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2))
        print(
            f"  harmful: one bit of a weight, {flips} times: largest KL's median {np.median(worst):.1e}; {shares}"
        )
    return reference


def compare_views(clips: Clips, expert: Expert, reference: Logits) -> None:
    """Print what other pixels do."""
    show(
        "benign: PyAV in place of decord", divergence(reference, forward(expert, clips.with_pyav(expert.modality)))
    )
    if expert.modality == "rgb":
        noisy = other_rounding(clips.inputs("rgb"))
        show("benign: every pixel -1, 0 or +1", divergence(reference, forward(expert, noisy)))
    for name, change in (("crop 1 px further", moved_crop), ("frames 1 later", later_frames)):
        kl = divergence(reference, forward(expert, clips.inputs(expert.modality, change)))
        show(f"harmful: {name}", kl)
        print(f"  {'':44} of the views .1 are above {np.quantile(kl, 0.9):.1e}, .5 above {np.median(kl):.1e}")


def untrained_swin(expert: Expert, views: int) -> tuple[Expert, list[Inputs]]:
    """Return swin3d_t as an expert, and noise for it."""
    torch.manual_seed(0)
    recipe = TrainRecipe(network="swin3d_t")
    network = build_network(recipe, heads={"action": 174}, modality="rgb").eval()
    random = np.random.default_rng(0)
    inputs = [{"rgb": random.integers(0, 256, (16, 112, 112, 3), np.uint8)} for _ in range(views)]
    card = dataclasses.replace(expert.card, name="swin3d_t, untrained")
    made = Expert(card, network, torch.device("cpu"))
    with torch.no_grad():
        for name, value in network.named_parameters():
            if "heads." in name:
                value *= 3 / float(forward(made, inputs[:4])["action"].std())
    return made, inputs


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="what moves logits, and how far")
    parser.add_argument("root", type=Path)
    parser.add_argument("--experts", type=Path, help="[default: ROOT/seed-0/experts]")
    parser.add_argument("--views", type=int, default=64)
    parser.add_argument("--flips", type=int, default=64)
    parser.add_argument("--swin-views", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, KL(stored || changed) in nats")
    clips = Clips(options.root, options.views)
    for name in ("rgb", "flow", "boxes"):
        folder = (options.experts or options.root / "seed-0" / "experts") / name
        expert = load_expert(folder, torch.device("cpu"))
        reference = compare(expert, clips.inputs(expert.modality), flips=options.flips)
        if name != "boxes":
            compare_views(clips, expert, reference)
    swin, inputs = untrained_swin(expert, options.swin_views)
    compare(swin, inputs, flips=options.flips // 4)


if __name__ == "__main__":
    main()
