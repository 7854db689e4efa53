"""Sound: where it stands in time, whatever the codec and container, and spectrograms held against librosa's."""

import json
from pathlib import Path

import numpy as np
import pytest

from mmkd.data_manifests.errors import StorageError
from mmkd.pipeline.audio.sound import Segment, SoundMissingError, read_sound
from mmkd.pipeline.audio.spectrogram import MelParams, log_mel, mel_filters, windows_at
from tests.helpers.places import ROOT
from tests.helpers.sounding_videos import write_video

RATE = 16_000
FORMATS = [("aac", "mp4", 48_000), ("aac", "mp4", 44_100), ("libopus", "mkv", 48_000), ("pcm_s16le", "mkv", 16_000)]
LIBROSA = ROOT / "tests" / "data" / "librosa_mel.json"
"""Peak bin, peak and sum of each of librosa's filters, and the call that made them."""


def beeps(times):
    """A tone of 1 kHz in the second half of each second."""
    return 0.5 * np.sin(2 * np.pi * 1000 * times) * (times % 1 >= 0.5)


def loudness(sound, hop=160):
    return np.abs(sound[: len(sound) // hop * hop]).reshape(-1, hop).max(1)


@pytest.mark.parametrize(("codec", "suffix", "rate_hz"), FORMATS)
@pytest.mark.parametrize("start", [0.0, 0.25, 1.3])
def test_sound_stands_where_it_is_heard(tmp_path, codec, suffix, rate_hz, start):
    path = tmp_path / f"v.{suffix}"
    write_video(path, beeps, codec=codec, rate_hz=rate_hz)
    sound = read_sound(path, Segment(start, start + 1.5), rate_hz=RATE)
    assert sound.dtype == np.float32
    assert len(sound) == 1.5 * RATE
    heard = loudness(sound) > 0.2
    middles = start + (np.arange(len(heard)) + 0.5) * 0.01
    expected = middles % 1 >= 0.5
    edges = np.abs((middles % 0.5) - 0.25) > 0.235  # within 15 ms of a beep's ends a codec may smear
    np.testing.assert_array_equal(heard[~edges], expected[~edges])


def test_lossless_sound_is_the_samples_themselves(tmp_path):
    path = tmp_path / "v.mkv"
    write_video(path, beeps, codec="pcm_s16le", rate_hz=RATE, channels=1)
    sound = read_sound(path, Segment(0.4, 1.9), rate_hz=RATE)
    times = np.arange(round(0.4 * RATE), round(1.9 * RATE)) / RATE
    np.testing.assert_allclose(sound, beeps(times), atol=1 / 32767)


def test_where_one_reads_from_changes_no_sample(tmp_path):
    path = tmp_path / "v.mkv"
    write_video(path, beeps, codec="flac", rate_hz=RATE, channels=2, seconds=4)
    whole = read_sound(path, Segment(0, 4), rate_hz=RATE)
    part = read_sound(path, Segment(2.5, 3.5), rate_hz=RATE)
    np.testing.assert_array_equal(part, whole[round(2.5 * RATE) : round(3.5 * RATE)])


def test_outside_the_track_there_is_silence(tmp_path):
    path = tmp_path / "v.mkv"
    write_video(path, lambda times: 0.5 + 0 * times, codec="pcm_s16le", rate_hz=RATE, channels=1, seconds=1)
    sound = read_sound(path, Segment(0.5, 2), rate_hz=RATE)
    assert (sound[: RATE // 2] > 0.4).all()
    assert (sound[RATE // 2 :] == 0).all()


def test_a_picture_that_starts_late_does_not_move_the_sound(tmp_path):
    path = tmp_path / "v.mkv"
    write_video(path, beeps, codec="pcm_s16le", rate_hz=RATE, channels=1, picture_delay_seconds=0.4)
    sound = read_sound(path, Segment(0.4, 1.9), rate_hz=RATE)
    np.testing.assert_allclose(sound, beeps(np.arange(6400, 30400) / RATE), atol=1 / 32767)


def test_a_video_without_sound_says_so(tmp_path):
    path = tmp_path / "v.mp4"
    write_video(path, None)
    with pytest.raises(SoundMissingError, match="the video has no sound"):
        read_sound(path, Segment(0, 1), rate_hz=RATE)


def test_what_is_no_media_file_has_no_sound(tmp_path):
    (tmp_path / "v.mp4").write_bytes(b"not a video" * 100)
    with pytest.raises(SoundMissingError, match="cannot be decoded"):
        read_sound(tmp_path / "v.mp4", Segment(0, 1), rate_hz=RATE)
    with pytest.raises(StorageError, match="cannot read"):
        read_sound(tmp_path / "gone.mp4", Segment(0, 1), rate_hz=RATE)


def test_the_filters_are_librosa_s():
    stated = json.loads(Path(LIBROSA).read_text())
    ours = mel_filters(MelParams()).numpy().astype(np.float64)
    assert ours.shape == (128, 513)
    assert ours.argmax(1).tolist() == stated["peak_bin"]
    np.testing.assert_allclose(ours.max(1), stated["peak"], rtol=1e-6)
    np.testing.assert_allclose(ours.sum(1), stated["sum"], rtol=1e-6)


def test_the_whole_spectrogram_is_librosa_s():
    librosa = pytest.importorskip("librosa", reason="librosa, a large package, is not installed")
    params = MelParams()
    sound = np.random.default_rng(0).normal(size=params.window_samples).astype(np.float32) / 10
    power = librosa.feature.melspectrogram(
        y=sound, sr=16000, n_fft=1024, hop_length=80, win_length=160, power=2.0, n_mels=128, htk=True, norm=None,
        center=True, pad_mode="reflect",
    )  # fmt: skip
    np.testing.assert_allclose(log_mel(sound[None], params)[0], 10 * np.log10(np.maximum(power, 1e-10)), atol=1e-3)


def test_a_tone_is_a_row_at_its_pitch():
    params = MelParams()
    times = np.arange(params.window_samples) / params.rate_hz
    for pitch_hz in (500, 2000, 6000):
        (found,) = log_mel(np.sin(2 * np.pi * pitch_hz * times).astype(np.float32)[None], params)
        assert found.shape == (params.mels, params.columns) == (128, 224)
        row = found[:, 112].argmax()
        mel = 2595 * np.log10(1 + pitch_hz / 700) / (2595 * np.log10(1 + 8000 / 700)) * 129 - 1
        assert abs(row - mel) <= 1


def test_silence_is_the_floor():
    params = MelParams()
    assert (log_mel(np.zeros((2, params.window_samples), np.float32), params) == -100).all()


def test_a_window_stands_around_its_moment_and_is_silent_outside_the_clip():
    params = MelParams(rate_hz=100, window_seconds=0.1)  # 10 samples
    sound = np.arange(1, 101, dtype=np.float32)
    found = windows_at(sound, np.array([0.5, 0.02, 0.99]), params)
    assert found[0].tolist() == list(range(46, 56))
    assert found[1].tolist() == [0, 0, 0, 1, 2, 3, 4, 5, 6, 7]
    assert found[2].tolist() == [95, 96, 97, 98, 99, 100, 0, 0, 0, 0]
