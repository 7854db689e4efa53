"""What a student says of videos: evaluation's logits bit for bit, with names and times, whatever is damaged."""

import csv
import json
import os
import shutil
import signal
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from mmkd.cache_tools.frames.clip_set import ClipSet, DataRecipe
from mmkd.data_manifests.errors import InputError, VerificationError
from mmkd.data_manifests.manifest import Clip, Manifest
from mmkd.data_manifests.manifest_file import load_manifest, save_manifest
from mmkd.student.data.evaluation_views import evaluation_data
from mmkd.student.evaluation.actions import action_scores
from mmkd.student.evaluation.run_evaluation import EVALUATION_BATCH
from mmkd.student.evaluation.trained import load_student
from mmkd.student.prediction import predict_videos as predicting
from mmkd.student.prediction.predict_videos import predict_videos
from mmkd.student.prediction.predictions import Predictions
from mmkd.student.prediction.video_clips import Windows
from mmkd.student.training.predict import predict as predict_views
from tests.helpers.commands import ENVIRONMENT
from tests.helpers.evaluated import evaluated_logits
from tests.helpers.in_process import call, call_ok, refused
from tests.helpers.places import unpack_before

PREDICT = ("mmkd-student", "predict", "run", "--device", "cpu")
TRAIN = ("mmkd-student", "train", "-c", "student.yaml", "--cache", "cache", "--node-copies", "copies", "-o", "run")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a trained `run`, its `cache` and `videos`; its precision is not the default: it must travel."""
    root = unpack_before(tmp_path_factory.mktemp("predict"))
    shutil.rmtree(root / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        call_ok(*TRAIN, "--labels-only", "--set", "train.weights=null", "--set", "train.precision=bf16")
    return root


@pytest.fixture
def world(trained, monkeypatch):
    """That folder, as the current one."""
    monkeypatch.chdir(trained)
    return trained


@pytest.fixture
def evaluated(world, monkeypatch):
    """Videos of the test split, and the logits (clips, V, classes) that the command `evaluate` has of them."""
    return evaluated_logits(monkeypatch, "mmkd-student", "evaluate", "run", "--cache", "cache", "--device", "cpu")


def long_video(path, seconds=3):
    """A video of 10 frames a second whose pixels move."""
    rng = np.random.default_rng(3)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(10))
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 48, 32, "yuv420p", 5
        for _ in range(10 * seconds):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (32, 48, 3), dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def as_json(*arguments):
    return json.loads(call_ok(*PREDICT, *arguments, "--json"))


def test_clips_of_the_test_split_get_evaluations_logits_bit_for_bit(world, evaluated):
    paths, wanted = evaluated
    student = load_student(Path("run"))
    found = predict_videos(student, paths, progress=False)
    assert found.logits["action"].tobytes() == wanted.tobytes()
    assert np.ptp(wanted[:, 0], axis=0).min() > 0, "the clips differ"
    alone = predict_videos(student, paths[2:3], progress=False)
    assert alone.logits["action"].tobytes() == wanted[2:3].tobytes(), "its batch is padded to evaluation's"


def test_json_has_the_best_classes_by_name_with_the_mean_logits_and_their_softmax(world, evaluated):
    paths, logits = evaluated
    classes = load_student(Path("run")).heads["action"]
    clips = as_json(*paths)["clips"]
    assert [clip["video"] for clip in clips] == [str(path) for path in paths]
    for clip, own in zip(clips, logits[:, 0].astype(np.float64), strict=True):
        wanted = sorted(range(len(classes)), key=lambda at: -own[at])[:5]
        guesses = clip["heads"]["action"]
        assert [each["class"] for each in guesses] == [classes[at] for at in wanted]
        assert [each["logit"] for each in guesses] == [float(own[at]) for at in wanted], "bit for bit"
        softmax = np.exp(own - own.max()) / np.exp(own - own.max()).sum()
        np.testing.assert_allclose([each["probability"] for each in guesses], softmax[wanted], rtol=1e-6)
    (every,) = as_json(paths[0], "--top-k", 1000)["clips"]
    assert len(every["heads"]["action"]) == len(classes)
    assert sum(each["probability"] for each in every["heads"]["action"]) == pytest.approx(1)


def test_a_line_and_a_row_of_the_csv_file_tell_what_the_json_does(world, tmp_path, evaluated):
    paths, _ = evaluated
    out = tmp_path / "found.csv"
    lines = call_ok(*PREDICT, *paths[:2], "--top-k", 2, "--csv", out).splitlines()
    best = as_json(*paths[:2], "--top-k", 2)["clips"]
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert len(lines) == 2
    assert len(rows) == 4
    for line, clip in zip(lines, best, strict=True):
        first, second = clip["heads"]["action"]
        assert line == (
            f"{clip['video']}: action: {first['class']} {100 * first['probability']:.1f} %, "
            f"{second['class']} {100 * second['probability']:.1f} %"
        )
    flat = [(clip["video"], at + 1, each) for clip in best for at, each in enumerate(clip["heads"]["action"])]
    for row, (video, rank, each) in zip(rows, flat, strict=True):
        assert (row["video"], row["head"], row["rank"], row["class"]) == (video, "action", str(rank), each["class"])
        assert np.float32(row["logit"]) == np.float32(each["logit"]), "nine digits give the bits back"
    call_ok(*PREDICT, *paths[:1], "--csv", out)  # its own file is replaced
    (tmp_path / "notes.csv").write_text("a,b\n")
    assert "is not a table of predictions" in refused(*PREDICT, *paths[:1], "--csv", tmp_path / "notes.csv")
    assert (tmp_path / "notes.csv").read_text() == "a,b\n"


def test_a_folder_and_a_list_name_the_same_videos(world, tmp_path, evaluated):
    paths, _ = evaluated
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in paths))
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    for path in paths:
        shutil.copy(path, folder / "deep" / path.name)
    (folder / "notes.txt").write_text("no video")
    wanted = {Path(clip["video"]).name: clip["heads"] for clip in as_json(*paths)["clips"]}
    for found in (as_json("--list", tmp_path / "list.txt"), as_json(f"@{tmp_path / 'list.txt'}"), as_json(folder)):
        assert {Path(clip["video"]).name: clip["heads"] for clip in found["clips"]} == wanted


def test_two_videos_of_one_name_in_different_folders_are_both_done(world, tmp_path, evaluated):
    paths, _ = evaluated
    for number in (0, 1):
        (tmp_path / f"{number}").mkdir()
        shutil.copy(paths[number], tmp_path / f"{number}" / "clip:1.webm")  # a name that no manifest could hold
    found = as_json(tmp_path / "0" / "clip:1.webm", tmp_path / "1" / "clip:1.webm")["clips"]
    assert [clip["heads"] for clip in found] == [clip["heads"] for clip in as_json(*paths[:2])["clips"]]


def test_a_name_that_is_not_utf8_stays_itself_in_json_and_csv_and_can_be_printed(world, tmp_path, evaluated):
    paths, _ = evaluated
    name = os.fsdecode(b"\xff.webm")
    shutil.copy(paths[0], tmp_path / name)
    out = tmp_path / "found.csv"
    (clip,) = as_json(tmp_path / name, "--csv", out)["clips"]
    assert Path(clip["video"]).name == name
    assert b"/\xff.webm,0.000000," in out.read_bytes()
    assert call_ok(*PREDICT, tmp_path / name).encode().startswith(os.fsencode(tmp_path))


def test_the_run_needs_neither_cache_nor_manifest_nor_the_weights_that_it_started_from(
    world, tmp_path, monkeypatch, evaluated
):
    paths, logits = evaluated
    (tmp_path / "run").mkdir()
    for name in ("run.json", "model.safetensors"):
        shutil.copy(world / "run" / name, tmp_path / "run" / name)
    video = world / paths[0]
    monkeypatch.chdir(tmp_path)
    (clip,) = as_json(video)["clips"]
    assert clip["heads"]["action"][0]["logit"] == float(logits[0].max())


@pytest.mark.parametrize(
    ("end", "window", "stride", "spans"),
    [
        (10.0, 4.0, 3.0, [(0, 4), (3, 7), (6, 10)]),
        (10.0, 4.0, 4.0, [(0, 4), (4, 8), (6, 10)]),
        (3.0, 4.0, 1.0, [(0, 3)]),
        (4.0, 4.0, 1.0, [(0, 4)]),
        (10.02, 5.0, 5.0, [(0, 5), (5.02, 10.02)]),  # a rest of less than half a frame has no window of its own
        (1.0, 0.1, 0.3, [(0, 0.1), (0.3, 0.4), (0.6, 0.7), (0.9, 1.0)]),
    ],
)
def test_windows_cover_a_video_from_start_to_end_and_the_last_one_ends_with_it(end, window, stride, spans):
    assert Windows(window, stride).over(end, 0.05) == spans


def test_a_window_has_the_logits_of_a_manifests_clip_of_these_seconds(world, tmp_path):
    video = long_video(tmp_path / "long.mp4")
    found = as_json(video, "--window-s", 1, "--stride-s", 0.4)["clips"]
    spans = [(clip["start_seconds"], clip["end_seconds"]) for clip in found]
    assert spans == [(0, 1), (0.4, 1.4), (0.8, 1.8), (1.2, 2.2), (1.6, 2.6), (2, 3)]
    before = load_manifest(Path("manifest.jsonl"))
    clips = [Clip(f"c{n}", "long.mp4", "standard", {"action": 0}, *span) for n, span in enumerate(spans)]
    save_manifest(Manifest("long", before.heads, tuple(clips)), tmp_path / "m.jsonl")
    clip_set = ClipSet(DataRecipe(manifest=tmp_path / "m.jsonl", videos=tmp_path, workers=0))
    items = list(clip_set.probe(clips))
    assert [item.facts.first_frame for item in items] == [0, 4, 8, 12, 16, 20]
    student = load_student(Path("run"))
    data = evaluation_data(clip_set.source, items, before.heads, student.policy, memory_bytes=0)
    chosen = {"batch_size": EVALUATION_BATCH, "precision": student.precision, "progress": False}
    wanted = predict_views(student.network, data, np.arange(6), np.arange(1), **chosen)["action"][:, 0]
    best = [clip["heads"]["action"][0]["logit"] for clip in found]
    assert best == wanted.max(1).tolist()
    assert len(set(best)) == 6, "the windows differ"


def test_lines_of_windows_have_their_times(world, tmp_path):
    video = long_video(tmp_path / "long.mp4")
    lines = call_ok(*PREDICT, video, "--window-s", 1.5).splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{video} 0.00 to 1.50 s", f"{video} 1.50 to 3.00 s"]


def test_a_damaged_video_among_others_is_named_and_the_others_are_done(world, tmp_path, evaluated):
    paths, _ = evaluated
    whole = long_video(tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "text.mp4").write_text("no video")
    middle = bytearray(whole)  # the index is there, and the frames of its second half are not
    start = whole.index(b"mdat") + 4
    half = (start + whole.index(b"moov")) // 2
    middle[half : whole.index(b"moov") - 8] = bytes(len(middle[half : whole.index(b"moov") - 8]))
    (tmp_path / "half.mp4").write_bytes(middle)
    videos = (paths[0], tmp_path / "text.mp4", tmp_path / "half.mp4", paths[1])
    done = call(*PREDICT, *videos, "--json")
    found = json.loads(done.out)
    assert done.code == 3
    assert [clip["heads"] for clip in found["clips"]] == [clip["heads"] for clip in as_json(*paths[:2])["clips"]]
    assert [Path(each["video"]).name for each in found["unread"]] == ["text.mp4", "half.mp4"]
    for name in ("text.mp4", "half.mp4"):
        assert f"{tmp_path / name}: " in done.err
    last = done.err.rstrip().splitlines()[-1]
    assert last.startswith(
        f"error: 2 clips could not be read, 2 clips could; the first one, {tmp_path / 'text.mp4'}"
    )


def test_a_damaged_part_of_a_long_video_costs_the_windows_that_need_it(world, tmp_path):
    whole = long_video(tmp_path / "long.mp4").read_bytes()
    first = [clip["heads"] for clip in as_json(tmp_path / "long.mp4", "--window-s", 1)["clips"]]
    damaged = bytearray(whole)
    start, end = whole.index(b"mdat") + 4, whole.index(b"moov") - 8
    damaged[start + 3 * (end - start) // 4 : end] = bytes(end - (start + 3 * (end - start) // 4))
    (tmp_path / "long.mp4").write_bytes(damaged)
    done = call(*PREDICT, tmp_path / "long.mp4", "--window-s", 1, "--json")
    found = json.loads(done.out)
    assert done.code == 3
    assert [(each["start_seconds"], each["end_seconds"]) for each in found["unread"]] == [(2, 3)]
    assert [clip["heads"] for clip in found["clips"]] == first[:2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no video is named"),
        (("gone.webm",), "video not found: gone.webm"),
        (("empty",), "no video lies below empty"),
        (("--list", "gone.txt"), "list of videos gone.txt cannot be read"),
        (("--list", "bad.txt"), "bad.txt:2: video not found: nowhere.mp4"),
        (("text.mp4",), "text.mp4: "),
        (("text.mp4", "other.mp4"), "none of 2 videos can be read; the first one, text.mp4: "),
        (("text.mp4", "--stride-s", 1), "--stride-s needs --window-s"),
        (("text.mp4", "--window-s", 0), "--window-s 0: expected seconds, more than 0"),
        (("text.mp4", "--window-s", "nan"), "--window-s nan: expected seconds"),
        (("long.mp4", "--window-s", 1, "--stride-s", 1e-7), "windows of one video"),
    ],
)
def test_what_cannot_be_done_is_one_line_that_names_it(world, tmp_path, monkeypatch, arguments, said):
    (tmp_path / "run").symlink_to(world / "run")
    (tmp_path / "empty").mkdir()
    for name in ("text.mp4", "other.mp4"):
        (tmp_path / name).write_text("no video")
    if "long.mp4" in arguments:
        long_video(tmp_path / "long.mp4")
    (tmp_path / "bad.txt").write_text("text.mp4\nnowhere.mp4\n")
    monkeypatch.chdir(tmp_path)
    line = refused(*PREDICT, *arguments)
    assert said in line
    assert len(line.splitlines()) == 1


def test_one_of_several_processes_is_refused_since_each_would_predict_the_same(world, monkeypatch, evaluated):
    paths, _ = evaluated
    launched = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "LOCAL_RANK": "1"}
    for name, value in launched.items():
        monkeypatch.setitem(ENVIRONMENT, name, value)
    assert "`mmkd-student predict` is one process" in refused(*PREDICT, *paths)


def test_a_run_of_an_earlier_version_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(unpack_before(tmp_path))
    video = next(Path("videos").iterdir())
    assert "Run the same `mmkd-student train` again, which adds it" in refused(*PREDICT, video)


def test_a_stop_signal_ends_with_exit_code_75_and_writes_nothing(world, tmp_path, monkeypatch, evaluated):
    paths, _ = evaluated

    def stopped(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal was not heard")

    monkeypatch.setattr(predicting, "predict", stopped)
    line = refused(*PREDICT, *paths, "--csv", tmp_path / "found.csv", code=75)
    assert "stopped by SIGTERM: nothing was written" in line
    assert list(tmp_path.iterdir()) == []


def test_a_student_that_gives_nan_is_refused(world, evaluated):
    paths, _ = evaluated
    student = load_student(Path("run"))
    with torch.no_grad():
        next(student.network.parameters()).fill_(float("nan"))
    with pytest.raises(VerificationError, match="NaN"):
        predict_videos(student, paths[:1], progress=False)


def test_verb_and_noun_give_actions_in_the_order_in_which_evaluation_ranks_them():
    rng = np.random.default_rng(5)
    logits = {"verb": rng.normal(size=(1, 2, 3)), "noun": rng.normal(size=(1, 2, 4))}
    heads = {"verb": ["take", "put", "wash"], "noun": ["cup", "pan", "egg", "tap"]}
    found = Predictions((), {head: value.astype(np.float32) for head, value in logits.items()}, heads, ())
    actions = found.best(0, 12)["action"]
    means = {head: value[0].astype(np.float32).mean(0, dtype=np.float64) for head, value in logits.items()}
    shares = {head: np.exp(mean) / np.exp(mean).sum() for head, mean in means.items()}
    assert len(found.best(0, 5)["action"]) == 5
    assert sum(each.probability for each in actions) == pytest.approx(1)
    for rank, each in enumerate(actions):
        verb, noun = (
            np.array([heads[head].index(word)]) for head, word in zip(heads, each.name.split(), strict=True)
        )
        assert each.probability == pytest.approx(shares["verb"][verb[0]] * shares["noun"][noun[0]], rel=1e-6)
        scores = action_scores(means["verb"][None], means["noun"][None], verb, noun)
        assert scores.rank.tolist() == [rank]


def test_the_python_call_gives_what_the_command_prints(world, evaluated):
    paths, _ = evaluated
    found = predict_videos(load_student(Path("run")), paths[:1], progress=False)
    (clip,) = as_json(paths[0], "--top-k", 2)["clips"]
    assert [(each.name, each.logit) for each in found.best(0, 2)["action"]] == [
        (each["class"], each["logit"]) for each in clip["heads"]["action"]
    ]
    with pytest.raises(InputError, match="--stride-s inf"):
        Windows(1, float("inf"))
