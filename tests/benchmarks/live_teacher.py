"""A live teacher behind the protocol of cached targets, for reference: experts that run again for every batch.

    python tests/benchmarks/live_teacher.py [ROOT] [--cache DIR] [--experts DIR] [--clips N]
        [--batches N] [--batch N]

ROOT is a finished `make demo`; without it a small demo with untrained experts is made. For each batch the live
teacher decodes its clips, computes flow by TV-L1, takes boxes, runs the experts and mixes their logits. Printed are
its targets' largest difference from the cache's (the stored format and the batch's shape move them), and
milliseconds a clip of each part; a cache has them for a lookup. Student imports no pipeline, so both meet here.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from mmkd.cache_tools.cache.logit_formats import storable
from mmkd.cache_tools.frames.clip_set import ClipVideo
from mmkd.cache_tools.frames.source import FrameSource
from mmkd.cache_tools.process.stages import Stages
from mmkd.cache_tools.recipes.recipe import load_recipe
from mmkd.data_manifests.errors import VideoError
from mmkd.pipeline.experts.expert import Expert
from mmkd.pipeline.experts.teacher import check_teacher, load_teacher
from mmkd.pipeline.inputs.boxes import open_boxes
from mmkd.pipeline.inputs.expert_views import Inputs
from mmkd.pipeline.inputs.modalities import (
    MODALITIES,
    ViewedClip,
    looks_at,
    mel_params,
    needs_boxes,
    needs_flow,
    open_flow,
)
from mmkd.pipeline.inputs.prepare import ClipJob, FlowJob, SoundJob, prepare_clip, with_flow
from mmkd.pipeline.missing import InputMissingError
from mmkd.pipeline.recipe import TeacherRecipe
from mmkd.student.data.batches import Schedule, clips_of
from mmkd.student.data.view_streams import StoredViews, ViewStream
from mmkd.student.recipes.student import Missing
from mmkd.student.teacher.mixing import HeadMixtures, mix_head
from tests.helpers.demo_place import Place, StageTwo, chosen_place, machine, open_stage_two, place_options

IN_THIS_PROCESS = "later"
"""The device of a `FlowJob` that leaves flow to its caller: `prepare_clip` would set this process to one thread."""
Found = tuple[dict[str, np.ndarray], np.ndarray]
"""Head -> float32 (B, classes), and bool (B,) whether there is a target."""


class LiveTeacher:
    """A `TargetSource` that runs its experts over a batch's views when it is asked.

    Flow is computed each time (files that a user has are read), never taken from the scratch store.
    """

    def __init__(
        self,
        recipe: TeacherRecipe,
        experts: Sequence[Expert],
        *,
        source: FrameSource,
        clips: Sequence[ClipVideo],
        stream: ViewStream,
        mixtures: HeadMixtures,
        labels: dict[str, np.ndarray],
        missing: Missing = "renormalise",
    ) -> None:
        """Teach `clips` (a data set's rows) under the views of `stream`; `labels` (rows,) by head weigh samples."""
        self.seconds: dict[str, float] = {}
        """Part -> seconds so far."""
        self.recipe, self.experts, self.mixtures, self.missing = recipe, tuple(experts), mixtures, missing
        self._source, self._clips, self._stream, self._labels = source, clips, stream, labels
        modalities = [expert.modality for expert in experts]
        self._boxes = (
            open_boxes(recipe.boxes, {item.clip.video for item in clips}) if needs_boxes(modalities) else None
        )
        self._has_flow = needs_flow(modalities)
        self._stage = Stages(self.seconds)
        self._last: tuple[bytes, Found] | None = None

    def targets(self, rows: np.ndarray, views: np.ndarray) -> dict[str, np.ndarray]:
        """Return head -> float32 (B, classes), NaN where there is no target."""
        return self._found(rows, views)[0]

    def valid(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Return bool (B,): whether there is a target."""
        return self._found(rows, views)[1]

    def _found(self, rows: np.ndarray, views: np.ndarray) -> Found:
        key = np.stack(
            [rows, views]
        ).tobytes()  # the loop asks for targets and mask of one batch, one after another
        if self._last is None or self._last[0] != key:
            self._last = key, self._mixed(rows, views)
        return self._last[1]

    def _mixed(self, rows: np.ndarray, views: np.ndarray) -> Found:
        inputs: dict[str, list[Inputs | None]] = {expert.name: [] for expert in self.experts}
        for row, numbers in clips_of((rows, views)):
            for name, found in self._inputs(row, numbers).items():
                inputs[name] += found
        with self._stage("experts"):
            logits = {expert.name: run_expert(expert, inputs[expert.name]) for expert in self.experts}
        with self._stage("mixing"):
            usable = {
                name: np.logical_and.reduce([storable(values) for values in heads.values()])[:, None]
                for name, heads in logits.items()
            }
            mixed, valid = {}, np.ones(len(rows), np.bool_)
            for head, mixture in self.mixtures.items():
                own = {name: logits[name][head][:, None] for name in mixture.weights}
                present = {name: usable[name] for name in mixture.weights}
                labels = self._labels[head][rows]
                found, there = mix_head(own, present, mixture, missing=self.missing, labels=labels)
                mixed[head], valid = found[:, 0], valid & there[:, 0]
            for values in mixed.values():
                values[~valid] = np.nan
        return mixed, valid

    def _inputs(self, row: int, numbers: Sequence[int]) -> dict[str, Sequence[Inputs | None]]:
        """Return expert -> what it sees of each view of a clip; None where it lacks something."""
        item, views = self._clips[row], tuple(self._stream.view(row, number) for number in numbers)
        nothing = [None] * len(views)
        try:
            with self._stage("decoding"):
                clip = prepare_clip(self._job(item, views))
        except VideoError:
            return {expert.name: nothing for expert in self.experts}
        with self._stage("flow"):
            clip = with_flow(clip, item, views, recipe=self.recipe.flow, device=str(self.experts[0].device))
        found, seen = {}, ViewedClip(item, views, clip, self._boxes)
        with self._stage("boxes and inputs"):
            for expert in self.experts:
                try:
                    given = MODALITIES[expert.modality].inputs(replace(seen, look=expert.card.look))
                except InputMissingError:
                    given = nothing
                found[expert.name] = given
        return found

    def _job(self, item: ClipVideo, views: tuple) -> ClipJob:
        looks, recipe = [(expert.modality, expert.card.look) for expert in self.experts], self.recipe
        flow = None
        if self._has_flow:
            files = open_flow(recipe, IN_THIS_PROCESS) if recipe.flow.files else None
            flow = FlowJob(recipe.flow, files, IN_THIS_PROCESS, looks_at("flow", looks))
        heard = looks_at("audio", looks)
        sound = SoundJob(mel_params(recipe.audio), heard) if heard else None
        further = looks_at("rgb", looks, beyond_canonical=True)
        return ClipJob(self._source, item, views, recipe.views.size_px, flow, further, sound)


def run_expert(expert: Expert, inputs: Sequence[Inputs | None]) -> dict[str, np.ndarray]:
    """Return head -> float32 (B, classes); NaN where there is no input."""
    there = [position for position, value in enumerate(inputs) if value is not None]
    found = {
        head: np.full((len(inputs), len(classes)), np.nan, np.float32)
        for head, classes in expert.card.heads.items()
    }
    if there:
        given = [inputs[position] for position in there]
        batch = {name: torch.from_numpy(np.stack([value[name] for value in given])) for name in given[0]}
        for head, logits in expert.logits(batch).items():
            found[head][there] = logits
    return found


def open_live(
    place: Place,
    data: StageTwo,
    *,
    recipes: Sequence[str] = ("teacher.yaml",),
    missing: Missing = "renormalise",
    device: str = "cpu",
) -> LiveTeacher:
    """Load a place's experts, and teach the same clips under the same views as its cache."""
    named = {"data.manifest": str(place.root / "manifest.jsonl"), "data.videos": str(place.root / "videos")}
    named["boxes.files"] = [str(place.root / "bounding_boxes.json")]
    recipe = load_recipe(TeacherRecipe, files=[place.root / name for name in recipes], named=named)
    experts = load_teacher([place.experts / name for name in data.reader.experts], torch.device(device))
    check_teacher([expert.card for expert in experts], data.clip_set.manifest, recipe)
    return LiveTeacher(
        recipe,
        experts,
        source=data.clip_set.source,
        clips=data.split.clips,
        stream=StoredViews(data.split.table, data.split.rows.tolist()),
        mixtures=data.mixtures,
        labels=dict(data.split.data.labels),
        missing=missing,
    )


def main() -> None:
    """Print both."""
    parser = place_options("a live teacher beside the cache")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    print(machine())
    with chosen_place(options) as place:
        data = open_stage_two(place, clips=options.clips)
        live, clips = open_live(place, data), data.split.data
        worst, seen = 0.0, 0
        for rows, views in Schedule(clips.rows, clips.views, options.batch, seed=0).steps(0, options.batches):
            found, cached = live.targets(rows, views), data.cached.targets(rows, views)
            assert live.valid(rows, views).tolist() == data.cached.valid(rows, views).tolist()
            worst = max([worst, *(float(np.nanmax(abs(found[head] - cached[head]))) for head in cached)])
            seen += len(rows)
    print(f"{seen} clips, one view each: live and cached logits differ by at most {worst:.1e}")
    for part, seconds in live.seconds.items():
        print(f"{part:20}{1e3 * seconds / seen:8.2f} ms/clip")
    print(f"{'in all':20}{1e3 * sum(live.seconds.values()) / seen:8.2f} ms/clip")


if __name__ == "__main__":
    main()
