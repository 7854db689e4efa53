"""Write the demo data set: an honest small stand-in for Something-Something, in its published file forms.

    DIR/videos/<id>.webm       VP9 in WebM
    DIR/labels.json            class name -> number as a string (the V2 form)
    DIR/train.json             [{id, label, template, placeholders}]; so standard.json, compositional.json
    DIR/bounding_boxes.json    per video and frame the boxes of hand and objects (the Something-Else form)
    DIR/demo.json              the options and versions it was made with

The same options give the same bytes with the same versions of NumPy, OpenCV and libvpx, whatever the number
of workers. A stopped run is continued; a directory made with other options is refused.
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
from collections.abc import Callable, Iterator
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np

from mmkd.data_manifests.atomic import atomic_path, sweep_abandoned, write_atomically
from mmkd.data_manifests.demo.actions import ACTIONS
from mmkd.data_manifests.demo.boxes import box_annotations
from mmkd.data_manifests.demo.plan import SPLITS, ClipPlan, DemoOptions, plan_clips
from mmkd.data_manifests.demo.scene import make_scene, render
from mmkd.data_manifests.demo.shapes import UInt8Array
from mmkd.data_manifests.errors import InputError

SCHEMA = "mmkd-demo-1"
"""Changes whenever the same options would give another data set."""
ENCODER_OPTIONS = {"deadline": "realtime", "cpu-used": "8", "crf": "22", "row-mt": "0"}
CHUNK = 16
"""Clips that a worker takes at a time."""

Progress = Callable[[int, int], None]
"""Called with the number of clips done and of all clips."""


def write_demo(
    directory: Path, options: DemoOptions, *, workers: int = 1, progress: Progress | None = None
) -> None:
    """Write the data set into `directory`, or complete it there; raise InputError if it holds another one."""
    if workers < 1:
        raise InputError(f"workers is {workers}; at least 1 is needed")
    plans = plan_clips(options)
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is not a directory")
    if is_complete(directory, options):
        if progress is not None:
            progress(len(plans), len(plans))
        return
    _claim(directory, options)
    videos = directory / "videos"
    videos.mkdir(exist_ok=True)
    sweep_abandoned(videos)
    boxes: dict[str, list[dict[str, Any]]] = {}
    for done, (plan, rows) in enumerate(zip(plans, _clips(plans, options, videos, workers), strict=True), 1):
        boxes[plan.clip_id] = rows
        if progress is not None:
            progress(done, len(plans))
    for name, content in annotation_files(plans).items():
        _write_json(directory / name, content)
    _write_json(directory / "bounding_boxes.json", boxes, indent=None)


def is_complete(directory: Path, options: DemoOptions) -> bool:
    """Return whether the directory holds the whole data set of these options, made with whatever versions."""
    stored = _stored(directory) or {}
    if any(stored.get(part) != _described(options)[part] for part in ("schema", "options")):
        return False
    names = ["labels.json", *(f"{split}.json" for split in SPLITS), "bounding_boxes.json"]
    names += [f"videos/{plan.clip_id}.webm" for plan in plan_clips(options)]
    return all((directory / name).is_file() for name in names)


def annotation_files(plans: list[ClipPlan]) -> dict[str, Any]:
    """Return the content of labels.json and of one file per split, in the form of Something-Something V2."""
    files: dict[str, Any] = {"labels.json": {action.class_name: str(i) for i, action in enumerate(ACTIONS)}}
    for split in SPLITS:
        files[f"{split}.json"] = [
            {
                "id": plan.clip_id,
                "label": plan.label(),
                "template": plan.action.template,
                "placeholders": plan.placeholders(),
            }
            for plan in plans
            if plan.split == split
        ]
    return files


def encode_video(clip: UInt8Array, path: Path, fps: int) -> None:
    """Write frames (N, H, W, 3) as VP9 in WebM, in one step; the same frames give the same bytes."""
    # bitexact: no random segment id and no library version in the file
    options = {"fflags": "+bitexact"}
    with (
        atomic_path(path, sync=False) as temporary,
        av.open(str(temporary), "w", format="webm", options=options) as container,
    ):
        stream = container.add_stream("libvpx-vp9", rate=fps, options=dict(ENCODER_OPTIONS))
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 0  # constant quality
        stream.thread_count = 1
        for picture in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def _clip(plan: ClipPlan, options: DemoOptions, videos: Path) -> list[dict[str, Any]]:
    """Write one video unless it is there, and return its boxes."""
    scene = make_scene(plan, options)
    path = videos / f"{plan.clip_id}.webm"
    if not path.is_file():
        encode_video(render(scene), path, options.fps)
    return box_annotations(plan, scene, options)


def _clips(
    plans: list[ClipPlan], options: DemoOptions, videos: Path, workers: int
) -> Iterator[list[dict[str, Any]]]:
    """Yield each clip's boxes in order, once its video is written."""
    work = partial(_clip, options=options, videos=videos)
    if workers == 1:
        yield from map(work, plans)
        return
    context = multiprocessing.get_context("spawn")  # fork is not safe beside the caller's threads
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, cv2.setNumThreads, (1,))
    try:
        yield from pool.map(work, plans, chunksize=CHUNK)
    finally:
        pool.shutdown(cancel_futures=True)


def _described(options: DemoOptions) -> dict[str, Any]:
    """Return what demo.json says: all that the bytes depend on."""
    codec = ".".join(str(part) for part in av.library_versions["libavcodec"])
    versions = {"numpy": np.__version__, "opencv": cv2.__version__, "av": av.__version__, "libavcodec": codec}
    return {"schema": SCHEMA, "options": dataclasses.asdict(options), "versions": versions}


def _stored(directory: Path) -> dict[str, Any] | None:
    try:
        value = json.loads((directory / "demo.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {directory / 'demo.json'}: {error}") from error
    return value if isinstance(value, dict) else {}


def _claim(directory: Path, options: DemoOptions) -> None:
    """Write demo.json first, or refuse a directory that holds something else."""
    stored, wanted = _stored(directory), _described(options)
    if stored is None:
        if directory.exists() and any(directory.iterdir()):
            raise InputError(f"{directory} is not empty and holds no demo.json; choose an empty directory")
        directory.mkdir(parents=True, exist_ok=True)
        _write_json(directory / "demo.json", wanted)
        return
    for part, now in wanted.items():
        if stored.get(part) != now:
            raise InputError(
                f"{directory} was made with {part} {json.dumps(stored.get(part))}, not {json.dumps(now)}; "
                "remove it or choose another directory"
            )


def _write_json(path: Path, content: object, *, indent: int | None = 1) -> None:
    text = json.dumps(content, indent=indent, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode())


RECIPES = {"demo-teacher.yaml": "teacher.yaml", "demo-student.yaml": "student.yaml"}
"""Name in the package -> name in the demo's directory."""


def write_recipes(directory: Path) -> None:
    """Write teacher.yaml and student.yaml into `directory`; recipes that are there, perhaps edited, stay."""
    for source, name in RECIPES.items():
        target = directory / name
        if not target.exists():
            target.write_bytes((files("mmkd.data_manifests") / "recipe-files" / source).read_bytes())
