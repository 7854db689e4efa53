"""EPIC-KITCHENS-100 from the publisher's files to the challenge's file, as a user goes it: small videos, real
forms.

Manifest, three experts taught (one of them hears), one cache, a student, its metrics by the scorer's rules, and the
submission. Videos have 29.97, 50 and 59.94 frames a second, and one of them has no sound.
"""

import csv
import json
import zipfile

import av
import numpy as np
import pytest
import torch

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.frames.clip_set import ClipSet, DataRecipe
from mmkd.cache_tools.layout import Status
from mmkd.data_manifests.manifest_file import load_manifest
from mmkd.pipeline.audio.sound_views import clip_segment
from mmkd.pipeline.experts.expert import load_expert
from tests.helpers.epic_world import NOUNS, VERBS, write_epic
from tests.helpers.in_process import call, call_ok, refused

RECIPE = """
views: {sampling: dense, frames: 4, seconds_between_frames: 0.25, size_px: 32}
held_out: {fraction: 0.1}
flow: {short_side_px: 32, precision: uint8, bound_px: 8}
experts:
  rgb: {modality: rgb, train: {network: small3d, epochs: 2, batch_size: 4, warmup_epochs: 0}}
  flow: {modality: flow, flow_stack: 2, train: {network: small3d, epochs: 1, batch_size: 4, warmup_epochs: 0}}
  audio: {modality: audio, look: {frames: 8}, train: {network: small3d, epochs: 2, batch_size: 4, warmup_epochs: 0}}
build: {views: 2, shard_rows: 4, batch_views: 4}
"""
STUDENT = "train: {network: small3d, epochs: 2, batch_size: 4, warmup_epochs: 0}\n"
EXPERTS = ("rgb", "flow", "audio")
SILENT = "P02_102"


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """The world after the whole road, with what the commands said."""
    root = tmp_path_factory.mktemp("road")
    world = write_epic(root)
    silence(world.videos / "P02" / "videos" / f"{SILENT}.MP4")
    (root / "teacher.yaml").write_text(RECIPE)
    (root / "student.yaml").write_text(STUDENT)
    manifest = ("mmkd-cache", "manifest", "epic-kitchens", root / "annotations", "--videos", world.videos)
    call_ok(*manifest, "-o", root / "manifest.jsonl")
    data = ("--manifest", root / "manifest.jsonl", "--videos", world.videos, "--workers", 0)
    for name in EXPERTS:
        call_ok("mmkd-cache", "teach", name, "-c", root / "teacher.yaml", *data, "-o", root / name)
    experts = [part for name in EXPERTS for part in ("--expert", root / name)]
    splits = ("--set", "build.splits=[train,validation,test]")
    built = call("mmkd-cache", "build", "-c", root / "teacher.yaml", *data, *experts, *splits, "-o", root / "cache")
    train = ("mmkd-student", "train", "-c", root / "student.yaml", *data, "--cache", root / "cache")
    call_ok(*train, "--weights", "uniform", "-o", root / "run")
    return root, world, built, data


def silence(path):
    """Take the sound track out of a video."""
    kept = path.with_suffix(".mkv")
    with av.open(str(path)) as old, av.open(str(kept), "w", format="mp4") as new:
        stream = old.streams.video[0]
        out = new.add_stream_from_template(stream)
        for packet in old.demux(stream):
            if packet.dts is not None:
                packet.stream = out
                new.mux(packet)
    kept.replace(path)


def test_a_video_without_sound_lacks_the_audio_expert_alone(road):
    root, world, built, _ = road
    assert built.code == 3  # finished, with clips that one expert cannot use
    reader = CacheReader(root / "cache")
    silent = [row["narration_id"].startswith(SILENT) for row in world.rows["validation"]]
    expected = np.where(silent, Status.SOUND_MISSING, Status.OK)
    np.testing.assert_array_equal(reader.status("validation", "audio")[:, 0], expected)
    for name in ("rgb", "flow"):
        assert (reader.status("validation", name) == Status.OK).all()
    said = call_ok("mmkd-cache", "inspect", root / "cache")
    assert "the video has no sound" in said


def test_a_segment_s_views_are_seconds_of_every_rate(road):
    root, world, _, _ = road
    reader = CacheReader(root / "cache")
    clip_set = ClipSet(DataRecipe(manifest=root / "manifest.jsonl", videos=world.videos, workers=0))
    rates = set()
    for split in ("train", "validation"):
        table = reader.split(split)
        for row, item in enumerate(clip_set.probe(clip_set.manifest.split(split))):
            for number in range(table.views):
                seen = item.video.times_seconds[table.view(row, number).frame_indices]
                assert item.clip.start_seconds <= seen[0]
                assert seen[-1] < item.clip.end_seconds
                np.testing.assert_allclose(np.diff(seen), 0.25, atol=0.6 / 29.97)
            rates.add(round(1 / np.diff(item.video.times_seconds).mean()))
    assert rates == {30, 50, 60}


def test_audio_logits_are_those_of_the_sound_decoded_by_hand(road):
    """The sound track whole, by PyAV's plain way, cut and transformed here; the network is the expert's own."""
    root, world, _, _ = road
    reader = CacheReader(root / "cache")
    row = 1
    clip = load_manifest(root / "manifest.jsonl").split("train")[row]
    clip_set = ClipSet(DataRecipe(manifest=root / "manifest.jsonl", videos=world.videos, workers=0))
    (item,) = clip_set.probe([clip])
    with av.open(str(world.videos / clip.video)) as box:
        frames = list(box.decode(audio=0))
        start = frames[0].time - (box.start_time or 0) / av.time_base
        track = np.concatenate([frame.to_ndarray()[0] for frame in frames])  # 16 kHz and one channel already
    segment = clip_segment(item)
    whole = np.pad(track, (max(0, round(start * 16000)), 16000))
    sound = whole[round(segment.start_seconds * 16000) : round(segment.end_seconds * 16000)]
    view = reader.split("train").view(row, 0)
    at = ((np.arange(8) + 0.5) * 4 / 8 - 0.5).clip(0, 3)
    looked = np.rint(np.interp(at, np.arange(4), view.frame_indices)).astype(int)
    windows = []
    for moment in item.video.times_seconds[looked] - segment.start_seconds:
        centre = int(moment * 16000)
        left = centre - 17856 // 2
        window = np.zeros(17856, np.float32)
        inside = slice(max(0, -left), min(17856, len(sound) - left))
        window[inside] = sound[left + inside.start : left + inside.stop]
        windows.append(window)
    spectra = torch.stft(
        torch.from_numpy(np.stack(windows)), 1024, 80, 160, torch.hann_window(160), pad_mode="reflect",
        return_complex=True,
    ).abs() ** 2  # fmt: skip
    highest = 2595 * np.log10(1 + 8000 / 700)
    corners = 700 * (10 ** (np.linspace(0, highest, 130) / 2595) - 1)
    bins = np.linspace(0, 8000, 513)
    filters = np.stack([np.interp(bins, corners[i : i + 3], [0, 1, 0]) for i in range(128)])
    mel = torch.einsum("mf,tfc->tmc", torch.from_numpy(filters).float(), spectra)
    decibels = 10 * torch.log10(mel.clamp(min=1e-10))
    pictures = torch.nn.functional.interpolate(decibels[None], size=(32, 32))
    clips = ((pictures + 28.1125) / 16.5627)[:, None].expand(-1, 3, -1, -1, -1)
    network = load_expert(root / "audio", torch.device("cpu")).network
    with torch.inference_mode():
        expected = network.network(clips)
    for head in ("verb", "noun"):
        stored = reader.logits("train", "audio")[head][row, 0]
        wanted = expected[head][0].numpy()
        assert np.ptp(wanted) > 0.05
        np.testing.assert_allclose(stored, wanted, atol=0.02 * np.ptp(wanted) + 2e-3)


def test_metrics_and_table_are_the_scorer_s(road):
    root, world, _, _ = road
    found = json.loads(call_ok("mmkd-student", "evaluate", root / "run", "--cache", root / "cache", "--json"))
    assert set(found["validation"]) == {"verb", "noun", "action"}
    assert found["validation"]["action"]["count"] == len(world.rows["validation"])
    assert found["validation/unseen"]["action"]["count"] == 5
    assert set(found["validation/tail_verb"]) == {"verb"}
    assert set(found["validation/tail_action"]) == {"action"}
    assert found["validation"]["verb"]["positions"] == 1
    table = call_ok(
        "mmkd-student", "compare", "--cache", root / "cache", "--manifest", root / "manifest.jsonl",
        "--run", f"student={root / 'run'}",
    )  # fmt: skip
    assert "audio expert" in table
    assert "each clip by the mean logits of 1 view (1 position in time, 1 crop)" in " ".join(table.split())


def test_per_class_rows_are_the_classes_that_occur(road):
    root, world, _, _ = road
    out = root / "classes.csv"
    call_ok("mmkd-student", "evaluate", root / "run", "--cache", root / "cache", "--per-class", out)
    rows = list(csv.DictReader(out.read_text().splitlines()))
    wanted = {int(row["verb_class"]) for row in world.rows["validation"]}
    assert {int(row["class"]) for row in rows if row["split"] == "validation" and row["head"] == "verb"} == wanted


def test_the_submission_holds_every_test_clip(road):
    root, world, _, _ = road
    line = ("mmkd-student", "submission", root / "run", "--cache", root / "cache", "-o", root / "s.zip")
    assert "2 clips" in call_ok(*line)
    with zipfile.ZipFile(root / "s.zip") as archive:
        results = json.loads(archive.read("test.json"))["results"]
    assert list(results) == [row["narration_id"] for row in world.rows["test"]]
    assert all(len(own["verb"]) == VERBS and len(own["noun"]) == NOUNS for own in results.values())
    assert "no split 'final' in common" in refused(*line, "--split", "final")


def test_other_spectrograms_than_the_expert_s_are_refused(road):
    root, _, _, data = road
    other = ("--set", "audio.mels=64", "--expert", root / "audio", "-o", root / "other")
    assert "audio.spectrogram.mels" in refused("mmkd-cache", "build", "-c", root / "teacher.yaml", *data, *other)
    assert "is above fft_samples" in refused(
        "mmkd-cache", "build", "-c", root / "teacher.yaml", *data, "--set", "audio.frame_samples=2048",
        "--expert", root / "audio", "-o", root / "other",
    )  # fmt: skip
