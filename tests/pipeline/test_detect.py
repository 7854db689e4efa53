"""Detecting: the table has what torchvision's own call gives for the same frames."""

import numpy as np
import pytest
import torch
import torchvision

from mmkd.cache_tools.frames.clip_set import ClipSet, DataRecipe
from mmkd.cache_tools.frames.records import VideoFacts
from mmkd.cache_tools.process.interrupt import StopRequest
from mmkd.data_manifests.errors import InputError, InterruptedByUserError
from mmkd.pipeline.detecting import detector as detector_module
from mmkd.pipeline.detecting.detect import detect_videos, frames_at
from mmkd.pipeline.detecting.detector import Detector, norm_eps_of
from mmkd.pipeline.detecting.detector_params import DetectorParams
from mmkd.pipeline.detections.table import DetectionTable
from mmkd.pipeline.inputs.boxes import boxes_at, load_boxes
from tests.helpers.barcode_videos import write_world
from tests.helpers.in_process import call, call_ok, refused

NETWORK = "fasterrcnn_mobilenet_v3_large_320_fpn"
NAMES = ("closed.mp4", "uneven.mp4")
RATE = ("--frames-per-second", 4)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two barcode videos, one that is broken, and the parameters of a drawn detector of 4 classes."""
    root = tmp_path_factory.mktemp("detect")
    write_world(root, NAMES)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = torchvision.models.get_model(NETWORK, weights=None, weights_backbone=None, num_classes=4)
        with torch.no_grad():  # so that scores differ
            network.roi_heads.box_predictor.cls_score.weight.normal_(0, 1)
    torch.save(network.state_dict(), root / "hands.pth")
    return root


def command(root, out, *options, manifest="well"):
    data = ("--manifest", root / f"{manifest}.jsonl", "--videos", root / "videos", "--workers", 0)
    net = ("--weights", root / "hands.pth", "--network", NETWORK, "--min-size", 64, "--device", "cpu")
    return ("mmkd-cache", "detect", *data, *net, "-o", out, *options)


def params(root, **values):
    named = {
        "network": NETWORK,
        "weights": root / "hands.pth",
        "hand": (2,),
        "min_size_px": 64,
        "frames_per_second": 2.0,
    }
    return DetectorParams(**named | values)


def clip_set(root, manifest="well"):
    return ClipSet(DataRecipe(manifest=root / f"{manifest}.jsonl", videos=root / "videos", workers=0))


def by_torchvision(root, frames):
    """torchvision's own call, with its own threshold, three frames at a time: scores are close, and rounding
    sorts."""
    network = torchvision.models.get_model(
        NETWORK, weights=None, weights_backbone=None, num_classes=4, min_size=64
    ).eval()
    network.load_state_dict(torch.load(root / "hands.pth", weights_only=True))
    with torch.no_grad():
        images = [torch.from_numpy(frame).permute(2, 0, 1) / 255 for frame in frames]
        return [found for start in range(0, len(images), 3) for found in network(images[start : start + 3])]


def test_boxes_are_torchvisions_own_on_the_same_frames(root, tmp_path):
    call_ok(
        *command(root, tmp_path / "t.h5", "--hand", "2", "--object", "1", "--min-score", "0.2", "--batch", 3, *RATE)
    )
    data, table = clip_set(root), DetectionTable(tmp_path / "t.h5")
    assert not (tmp_path / "t.h5.parts").exists()
    seen = set()
    for item in data.probe(data.manifest.clips):
        stored = table.read(item.clip.video.split(".")[0])
        indices = np.flatnonzero(np.isin(item.video.times_seconds, stored.times_seconds))
        assert len(indices) == len(stored.times_seconds) >= 4
        frames = list(data.source.stream(item.clip.video, indices, item.video))
        height, width = frames[0].shape[:2]
        for index, expected in enumerate(by_torchvision(root, frames)):
            kept = (expected["scores"] > 0.2) & ((expected["labels"] == 1) | (expected["labels"] == 2))
            rows = slice(*stored.offsets[index : index + 2])
            boxes = expected["boxes"][kept] / torch.tensor([width, height, width, height])
            np.testing.assert_allclose(stored.boxes[rows], boxes.numpy(), atol=1e-4)
            np.testing.assert_allclose(stored.scores[rows], expected["scores"][kept].numpy(), atol=1e-4)
            categories = torch.where(expected["labels"][kept] == 2, 1, 2)
            assert stored.categories[rows].tolist() == categories.tolist()
            seen |= set(categories.tolist())
    assert seen == {1, 2}
    assert table.about["network"] == NETWORK
    assert table.about["min_score"] == 0.2
    assert len(table.about["weights_sha256"]) == 64


def test_a_look_up_finds_what_was_detected(root, tmp_path):
    call_ok(*command(root, tmp_path / "t.h5", "--hand", "2", "--frames-per-second", 4))
    stored = DetectionTable(tmp_path / "t.h5").read("closed")
    assert np.diff(stored.times_seconds).min() > 0.1
    found = boxes_at(load_boxes([tmp_path / "t.h5"]).track("closed.mp4"), stored.times_seconds, width=9, height=9)
    assert found.annotated.all()
    assert found.scores.max() == stored.scores[stored.categories == 1].max()  # hands fill the slots


@pytest.mark.parametrize(
    ("times", "rate", "expected"),
    [
        ([0, 0.1, 0.2, 0.3, 0.4], None, [0, 1, 2, 3, 4]),
        ([0, 0.1, 0.2, 0.3, 0.4], 5, [0, 2, 4]),
        ([0.5, 0.6, 0.7], 10, [0, 1, 2]),
        ([0, 1, 2], 30, [0, 1, 2]),
        ([0, 0.1, 3.0], 1, [0, 1, 2]),
        ([0], 5, [0]),
    ],
)
def test_frames_are_those_nearest_to_the_rate_s_steps(times, rate, expected):
    facts = VideoFacts(9, 9, np.array(times, np.float64), "pyav", "x")
    assert frames_at(facts, rate).tolist() == expected


def test_a_run_that_was_stopped_goes_on_with_the_same_result(root, tmp_path, monkeypatch):
    detect_videos(clip_set(root), tmp_path / "whole.h5", params(root), CPU)
    out, checks = tmp_path / "t.h5", []

    def check(self, kept):
        checks.append(kept)
        if len(list(out.with_name("t.h5.parts").glob("*.h5"))) == 1:
            raise InterruptedByUserError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "check", check)
        with pytest.raises(InterruptedByUserError):
            detect_videos(clip_set(root), out, params(root), CPU)
    assert not out.exists()
    with pytest.raises(InputError, match=r"was begun with min_score 0\.05"):
        detect_videos(clip_set(root), out, params(root, min_score=0.5), CPU)
    calls = []
    with monkeypatch.context() as patch:
        find = Detector.find
        patch.setattr(Detector, "find", lambda self, frames: calls.append(len(frames)) or find(self, frames))
        detect_videos(clip_set(root), out, params(root), CPU)
    assert sum(calls) == len(DetectionTable(out).read("uneven").times_seconds)  # the other one was done
    assert out.read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_a_broken_video_is_left_out_and_named(root, tmp_path):
    result = call(*command(root, tmp_path / "t.h5", "--hand", "1", "--frames-per-second", 1, manifest="all"))
    assert result.code == 3
    assert "left out: broken: " in result.out
    assert set(DetectionTable(tmp_path / "t.h5").rows) == {"closed", "uneven"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--hand", "4"), "class 4 is not one of the detector's"),
        (("--hand", "0"), "class 0 is not one of the detector's"),
        (("--hand", "x"), "--hand 'x' is not a list of class numbers"),
        (("--hand", "1,2", "--object", "2"), "class 2 is in --hand and in --object"),
        (
            ("--hand", "1", "--network", "fasterrcnn_resnet50_fpn"),
            "not those of torchvision's fasterrcnn_resnet50_fpn",
        ),
        (("--hand", "1", "--weights", "absent.pth"), "there is no weights file absent.pth"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(root, tmp_path, options, says):
    assert says in refused(*command(root, tmp_path / "t.h5", *options))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def retina(tmp_path_factory):
    """A drawn RetinaNet of 3 classes and its file."""
    path = tmp_path_factory.mktemp("retina") / "retina.pth"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = {"weights": None, "weights_backbone": None, "num_classes": 3, "min_size": 64, "score_thresh": 0.2}
        network = torchvision.models.get_model("retinanet_resnet50_fpn", **options).eval()
        with torch.no_grad():
            head = network.head.classification_head.cls_logits
            head.weight.normal_(0, 30)
            head.bias.zero_()
    torch.save({"model": network.state_dict()}, path)
    return network, path


def test_retinanet_s_boxes_are_torchvisions_own_and_its_classes_count_from_0(retina, one_thread):
    network, path = retina
    own = DetectorParams(
        network="retinanet_resnet50_fpn", weights=path, hand=(0,), object=(2,), min_score=0.2, min_size_px=64
    )
    frames = list(np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), np.uint8))
    found = Detector(own, CPU).find(frames)
    with torch.no_grad():
        expected = network([torch.from_numpy(frame).permute(2, 0, 1) / 255 for frame in frames])
    seen = set()
    for ours, theirs in zip(found, expected, strict=True):
        kept = (theirs["scores"] > 0.2) & (theirs["labels"] != 1)
        np.testing.assert_allclose(ours.boxes, theirs["boxes"][kept] / torch.tensor([64, 48] * 2), atol=1e-4)
        np.testing.assert_allclose(ours.scores, theirs["scores"][kept], atol=1e-5)
        assert ours.categories.tolist() == torch.where(theirs["labels"][kept] == 0, 1, 2).tolist()
        seen |= set(theirs["labels"].tolist())
    assert seen == {0, 1, 2}


def test_weights_and_classes_of_another_detector_than_retinanet_are_refused(root, retina):
    with pytest.raises(InputError, match=r"class 3 is not one of the detector's, which .* says are 0 to 2$"):
        Detector(DetectorParams("retinanet_resnet50_fpn", retina[1], (3,)), CPU)
    with pytest.raises(InputError, match="those of torchvision's retinanet_resnet50_fpn: they have no head"):
        Detector(params(root, network="retinanet_resnet50_fpn"), CPU)
    with pytest.raises(InputError, match="are not those of torchvision's retinanet_resnet50_fpn_v2"):
        Detector(DetectorParams("retinanet_resnet50_fpn_v2", retina[1], (0,)), CPU)


@pytest.mark.parametrize("network", ["fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn"])
def test_torchvisions_published_detector_runs_with_its_epsilon_of_0(root, monkeypatch, network):
    old = params(root, network=network)
    assert norm_eps_of(old) is None
    url = torchvision.models.get_model_weights(network).COCO_V1.url
    digest = url.rsplit("-", 1)[1].removesuffix(".pth") + "0" * 56
    monkeypatch.setattr(detector_module, "file_sha256", lambda path: digest)
    assert norm_eps_of(old) == 0.0
    assert norm_eps_of(params(root, network=network, norm_eps=1e-3)) == 1e-3
    assert norm_eps_of(params(root)) is None
    found = Detector(params(root, norm_eps=0.0), CPU).network
    assert {module.eps for module in found.modules() if isinstance(module, torch.nn.BatchNorm2d)} == {0.0}
