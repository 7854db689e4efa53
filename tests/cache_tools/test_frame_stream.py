"""Frames one by one: the numbers and the bits that random access gives, without seeking back."""

import numpy as np
import pytest

from mmkd.cache_tools.frames.decoders import PyavDecoder
from mmkd.cache_tools.frames.source import VideoFiles
from mmkd.data_manifests.errors import StorageError, VideoError
from tests.helpers import barcode_videos as barcode

NAMES = [
    "vp9_alt_ref.webm",
    "open.mp4",
    "dense_keys.mp4",
    "uneven.mp4",
    "hevc.mp4",
    "upright_left.mp4",
    "mpeg4_b.avi",
]
SAMPLES = {sample.name: sample for sample in barcode.EXACT}


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_gives_the_bits_of_random_access_and_seeks_once(tmp_path, monkeypatch, name):
    barcode.write_sample(tmp_path, SAMPLES[name])
    files = VideoFiles(tmp_path)
    facts = files.probe(name)
    whole = np.arange(facts.frame_count)
    expected = files.read(name, whole, facts).frames
    seeks = []
    seek = PyavDecoder._seek
    monkeypatch.setattr(PyavDecoder, "_seek", lambda self, pts: (seeks.append(pts), seek(self, pts))[1])
    np.testing.assert_array_equal(np.stack(list(files.stream(name, whole, facts))), expected)
    assert len(seeks) == 1
    some = np.array([3, 4, 5, 31, 32, 38])
    assert barcode.numbers_of(list(files.stream(name, some, facts))) == some.tolist()


def test_a_stream_refuses_what_reading_refuses(tmp_path):
    barcode.write_sample(tmp_path, SAMPLES["vp8.webm"])
    files = VideoFiles(tmp_path)
    facts = files.probe("vp8.webm")
    for indices in ([], [5, 5], [6, 5], [0, 100], [-1, 0]):
        with pytest.raises(ValueError, match="frame indices"):
            next(files.stream("vp8.webm", np.array(indices, np.int64), facts))
    barcode.write_sample(tmp_path, barcode.replace(SAMPLES["vp8.webm"], frames=50))
    with pytest.raises(VideoError, match="has changed since"):
        next(files.stream("vp8.webm", np.arange(2), facts))
    with pytest.raises(StorageError, match="video not found: none"):
        next(files.stream("none.webm", np.arange(2), facts))
