"""The demo data set: published file forms, honest boxes, swapped groups, and the same bytes every time."""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import av
import numpy as np
import pytest

from mmkd.data_manifests.demo.actions import ACTIONS
from mmkd.data_manifests.demo.boxes import box_annotations, visible_box
from mmkd.data_manifests.demo.draw import Draw
from mmkd.data_manifests.demo.plan import SPLITS, DemoOptions, kinds_for, plan_clips
from mmkd.data_manifests.demo.scene import MOMENTS, Layer, Scene, make_scene, render
from mmkd.data_manifests.demo.sprites import KINDS_A, KINDS_B
from mmkd.data_manifests.demo.write import is_complete, write_demo
from mmkd.data_manifests.errors import InputError

TINY = DemoOptions(
    seed=3,
    train_clips=2 * len(ACTIONS),
    standard_clips=len(ACTIONS),
    compositional_clips=len(ACTIONS),
    width=48,
    height=36,
    min_frames=8,
    max_frames=11,
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo") / "set"
    write_demo(directory, TINY, workers=1)
    return directory


def read(directory: Path, name: str):
    return json.loads((directory / name).read_text(encoding="utf-8"))


def hashes(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_two_workers_write_the_same_bytes_as_one(demo, tmp_path):
    calls = []
    write_demo(tmp_path / "again", TINY, workers=2, progress=lambda done, of: calls.append((done, of)))
    assert hashes(tmp_path / "again") == hashes(demo)
    count = len(plan_clips(TINY))
    assert calls == [(i, count) for i in range(1, count + 1)]


def test_another_seed_gives_other_videos():
    plan = plan_clips(TINY)[0]
    first = render(make_scene(plan, TINY))
    assert np.array_equal(first, render(make_scene(plan, TINY)))
    other = render(make_scene(plan, dataclasses.replace(TINY, seed=4)))
    assert other.shape != first.shape or not np.array_equal(first, other)


def test_a_stopped_run_is_continued_to_the_same_bytes(demo, tmp_path):
    directory = tmp_path / "stopped"
    shutil.copytree(demo, directory)
    kept = directory / "videos" / "2.webm"
    modified = kept.stat().st_mtime_ns
    for name in ("videos/1.webm", "videos/7.webm", "bounding_boxes.json", "standard.json"):
        (directory / name).unlink()
    abandoned = directory / "videos" / ".mmkd-0123456789abcdef.tmp"
    abandoned.write_bytes(b"torn")
    os.utime(abandoned, (0, 0))
    assert not is_complete(directory, TINY)
    write_demo(directory, TINY)
    assert is_complete(directory, TINY)
    assert hashes(directory) == hashes(demo)
    assert kept.stat().st_mtime_ns == modified


def test_a_complete_set_is_left_alone(demo):
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    write_demo(demo, TINY)
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*")} == before


def test_a_directory_of_other_options_or_other_files_is_refused(demo, tmp_path):
    with pytest.raises(InputError, match=r"seed.*another directory"):
        write_demo(demo, dataclasses.replace(TINY, seed=4))
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"no demo\.json"):
        write_demo(tmp_path, TINY)
    (tmp_path / "file").write_text("a file")
    with pytest.raises(InputError, match="not a directory"):
        write_demo(tmp_path / "file", TINY)


@pytest.mark.parametrize(
    "option",
    [
        {"seed": -1},
        {"train_clips": len(ACTIONS) - 1},
        {"standard_clips": 0},
        {"compositional_clips": 3},
        {"width": 47},
        {"height": 30},
        {"width": 4096},
        {"min_frames": 7},
        {"min_frames": 12},
        {"max_frames": 2000},
        {"fps": 0},
    ],
)
def test_each_bad_option_is_refused_by_name(option):
    with pytest.raises(InputError, match=next(iter(option))):
        dataclasses.replace(TINY, **option)
    with pytest.raises(InputError, match="workers"):
        write_demo(Path("unused"), TINY, workers=0)


def test_files_have_the_form_of_something_something(demo):
    labels = read(demo, "labels.json")
    assert list(labels.values()) == [str(i) for i in range(len(ACTIONS))]
    seen = set()
    for split in SPLITS:
        rows = read(demo, f"{split}.json")
        assert len(rows) == TINY.clips_per_split()[split]
        for row in rows:
            assert set(row) == {"id", "label", "template", "placeholders"}
            assert row["template"].replace("[", "").replace("]", "") in labels
            assert row["template"].count("[something]") == len(row["placeholders"])
            assert "something" not in row["label"]
            assert all(placeholder in row["label"] for placeholder in row["placeholders"])
            assert row["id"] not in seen
            seen.add(row["id"])
    assert set(read(demo, "bounding_boxes.json")) == seen


def test_box_files_have_the_form_of_something_else(demo):
    for clip_id, frames in read(demo, "bounding_boxes.json").items():
        for number, frame in enumerate(frames, 1):
            assert frame["name"] == f"{clip_id}/{number:04d}.jpg"
            assert frame["nr_instances"] == len(frame["labels"])
            for label in frame["labels"]:
                assert label["standard_category"] in ("hand", "0000", "0001")
                box = label["box2d"]
                assert 0 <= box["x1"] < box["x2"] <= TINY.width
                assert 0 <= box["y1"] < box["y2"] <= TINY.height


def test_every_video_is_vp9_with_a_frame_for_each_row_of_boxes(demo):
    for clip_id, frames in read(demo, "bounding_boxes.json").items():
        with av.open(str(demo / "videos" / f"{clip_id}.webm")) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.average_rate) == ("vp9", TINY.fps)
            assert (stream.codec_context.width, stream.codec_context.height) == (TINY.width, TINY.height)
            assert sum(1 for _ in container.decode(video=0)) == len(frames)
        assert TINY.min_frames <= len(frames) <= TINY.max_frames


def test_every_class_is_in_every_split_equally_often():
    plans = plan_clips(DemoOptions())
    for split, clips in DemoOptions().clips_per_split().items():
        counts = [sum(p.split == split and p.action is action for p in plans) for action in ACTIONS]
        assert sum(counts) == clips
        assert max(counts) - min(counts) <= 1


def test_object_groups_are_swapped_between_verb_groups():
    plans = plan_clips(DemoOptions())
    assert not set(KINDS_A) & set(KINDS_B)
    for group, (usual, swapped) in {0: (KINDS_A, KINDS_B), 1: (KINDS_B, KINDS_A)}.items():
        assert any(action.verb_group == group for action in ACTIONS)
        for split in SPLITS:
            found = {p.kind for p in plans if p.split == split and p.action.verb_group == group}
            assert found == set(swapped if split == "compositional" else usual)
    pairs = {split: {(p.action.template, p.kind) for p in plans if p.split == split} for split in SPLITS}
    assert pairs["standard"] <= pairs["train"]
    assert not pairs["train"] & pairs["compositional"]
    assert kinds_for(ACTIONS[0], "train") == kinds_for(ACTIONS[0], "standard")


def without_blur(moments):
    """The same tracks or camera with every moment of a frame's exposure at its middle."""
    middle = {
        field.name: np.repeat(getattr(moments, field.name)[MOMENTS // 2 :: MOMENTS], MOMENTS)
        for field in dataclasses.fields(moments)
    }
    return dataclasses.replace(moments, **middle)


def alone(scene: Scene, layer: Layer) -> Scene:
    """The scene with nothing but one layer, white on black, without noise or motion blur."""
    white = dataclasses.replace(layer.sprite, rgba=layer.sprite.rgba[..., 3:].repeat(4, axis=2))
    return dataclasses.replace(
        scene,
        table=np.zeros_like(scene.table),
        layers=(dataclasses.replace(layer, sprite=white, track=without_blur(layer.track)),),
        camera=without_blur(scene.camera),
        gain=np.ones_like(scene.gain),
        noise=0.0,
    )


def test_boxes_are_where_the_things_are_rendered():
    options = dataclasses.replace(TINY, width=96, height=72)
    compared = 0
    for plan in plan_clips(options)[:14]:
        scene = make_scene(plan, options)
        for layer in (layer for layer in scene.layers if layer.name):
            mask = render(alone(scene, layer)).max(axis=3) > 100
            for frame in range(scene.frames):
                box = visible_box(scene, layer, frame)
                rows, columns = np.nonzero(mask[frame])
                if box is None or min(box[2] - box[0], box[3] - box[1]) < 6:
                    continue  # finger tips at the frame's edge: half a pixel of height is many of width
                seen = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
                # anti-aliasing moves an edge by up to a pixel
                assert np.abs(np.array(box) - seen).max() < 1.6, (plan, layer.name, frame)
                compared += 1
    assert compared > 200


def test_a_covered_object_has_no_box_and_an_uncovered_one_gets_it_back():
    plans = plan_clips(DemoOptions())
    for name, hidden_at, seen_at in (("Covering", -1, 0), ("Uncovering", 0, -1)):
        for plan in [p for p in plans if p.action.template.startswith(name)][:10]:
            scene = make_scene(plan, DemoOptions())
            target = next(layer for layer in scene.layers if layer.name == "0000")
            boxes = [visible_box(scene, target, frame) for frame in range(scene.frames)]
            assert boxes[hidden_at] is None, plan
            assert boxes[seen_at] is not None, plan


def test_the_detector_is_close_but_misses_some():
    options = DemoOptions()
    missed = found = 0
    for plan in plan_clips(options)[:20]:
        scene = make_scene(plan, options)
        target = next(layer for layer in scene.layers if layer.name == "0000")
        for frame, row in enumerate(box_annotations(plan, scene, options)):
            truth = visible_box(scene, target, frame)
            boxes = [label["box2d"] for label in row["labels"] if label["standard_category"] == "0000"]
            if truth is None:
                assert not boxes
                continue
            missed, found = missed + (not boxes), found + len(boxes)
            for box in boxes:
                error = np.abs([box["x1"] - truth[0], box["y1"] - truth[1], box["x2"] - truth[2]]).max()
                assert error < 0.06 * max(truth[2] - truth[0], truth[3] - truth[1])
    assert 0.01 < missed / (missed + found) < 0.15


def test_draw_depends_on_its_key_alone_and_noise_is_standard():
    assert Draw(1, 2).uniform(0, 1) == Draw(1, 2).uniform(0, 1) != Draw(1, 3).uniform(0, 1)
    assert sorted(Draw(0).shuffled(range(50))) == list(range(50)) != Draw(0).shuffled(range(50))
    noise = Draw(5).noise(200, 200)
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02
    assert {Draw(i).whole(2, 4) for i in range(60)} == {2, 3, 4}
    assert Draw(7).uniform(0, 1) == pytest.approx(0.6250954666)  # the stream itself may not change
