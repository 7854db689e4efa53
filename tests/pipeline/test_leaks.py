"""Leaks: an expert that was trained on clips of an evaluation is named loudly, found by the clips' ids."""

import json
import logging

import pytest

from mmkd.data_manifests.errors import InputError, VerificationError
from mmkd.data_manifests.leaks import leak_lines, leaked, read_trained_on, trained_on
from mmkd.data_manifests.manifest import Clip, Head, Manifest
from mmkd.data_manifests.manifest_file import load_manifest, save_manifest
from mmkd.pipeline.experts.trained_on import TRAINED_ON_FILE, load_trained_on, write_trained_on
from tests.helpers.in_process import call, call_ok

HEADS = (Head("action", ("a", "b")),)


def manifest_of(**splits):
    clips = [Clip(own, f"{own}.webm", split, {"action": 0}) for split, ids in splits.items() for own in ids]
    return Manifest("else", HEADS, tuple(clips))


def test_clips_are_found_by_their_ids_whatever_else_differs():
    trained = trained_on("V2, split train", ["1", "2", "3", "B"])
    assert leaked(trained, ["3", "4", "b"]) == 2
    made = manifest_of(train=["9"], validation=["2", "3", "8"], test=["7"])
    (line,) = leak_lines("rgb", trained, made, ["validation", "test"])
    assert line.startswith("LEAK: expert 'rgb' was trained on 2 of 3 clips of split 'validation' (V2, split train)")


def test_what_somebody_else_trained_on_is_read_in_three_forms(tmp_path):
    save_manifest(manifest_of(train=["1", "2"], validation=["3"]), tmp_path / "m.jsonl")
    (tmp_path / "train.json").write_text(json.dumps([{"id": own, "label": "x", "template": "y"} for own in "12"]))
    (tmp_path / "ids.txt").write_text("1\n\n2\n")
    found = [read_trained_on(tmp_path / name) for name in ("m.jsonl", "train.json", "ids.txt")]
    assert [own.hashes.tolist() for own in found] == [trained_on("", ["1", "2"]).hashes.tolist()] * 3
    assert found[0].name == "else, split train"
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(InputError, match="names no clip"):
        read_trained_on(tmp_path / "none.txt")


def test_the_record_is_sealed(tmp_path):
    assert load_trained_on(tmp_path) is None
    trained = trained_on("x", ["1", "2"])
    write_trained_on(tmp_path, trained)
    found = load_trained_on(tmp_path)
    assert found.name == "x"
    assert found.hashes.tolist() == trained.hashes.tolist()
    path = tmp_path / TRAINED_ON_FILE
    data = path.read_bytes()
    for place in range(0, len(data) - 1, 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        try:
            assert load_trained_on(tmp_path) == found
        except VerificationError as error:
            assert "delete it" in str(error)  # noqa: PT017 - a flip in blank space changes nothing
        except ValueError:
            pytest.fail("a flipped bit is a traceback")


def test_teach_records_what_it_learned_from_and_build_warns(tiny, tmp_path, caplog):
    made = load_manifest(tiny.root / "manifest.jsonl")
    trained = load_trained_on(tiny.root / "experts" / "boxes")
    train = [clip.clip_id for clip in made.split("train")]
    held = len(train) - leaked(trained, train)
    assert 0 < held < len(train) / 2
    assert all(leaked(trained, [clip.clip_id for clip in made.split(name)]) == 0 for name in ("standard",))
    moved = [Clip(c.clip_id, c.video, "leaky" if c.split == "train" else c.split, c.labels) for c in made.clips]
    save_manifest(Manifest(made.dataset, made.heads, tuple(moved)), tmp_path / "m.jsonl")
    options = [part if part != tiny.root / "manifest.jsonl" else tmp_path / "m.jsonl" for part in tiny.stage_one]
    boxes = ("--expert", tiny.root / "experts" / "boxes", "--set", "train_split=none")
    with caplog.at_level(logging.WARNING):
        said = call("mmkd-cache", "plan", *options, *boxes, "--sample-clips", "1", "-o", tmp_path / "cache")
    count = len(train) - held
    line = f"LEAK: expert 'boxes' was trained on {count} of {len(train)} clips of split 'leaky'"
    assert line in said.err + caplog.text
    call_ok("mmkd-cache", "plan", *tiny.stage_one, *boxes[:2], "--sample-clips", "1", "-o", tmp_path / "cache")
    assert "LEAK" not in caplog.text.replace(line, "")
