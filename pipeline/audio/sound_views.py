"""What an audio expert sees of a clip: spectrograms around a view's frames, for the build and for teaching."""

from collections.abc import Sequence

import numpy as np

from mmkd.cache_tools.frames.clip_set import ClipVideo
from mmkd.cache_tools.frames.data_frames import DataFrames
from mmkd.cache_tools.frames.records import Float32Array
from mmkd.cache_tools.frames.source import FrameSource
from mmkd.cache_tools.frames.stills import STILLS
from mmkd.cache_tools.views.view import View
from mmkd.pipeline.audio.sound import Segment, has_sound, read_sound
from mmkd.pipeline.audio.spectrogram import MelParams, log_mel, windows_at
from mmkd.pipeline.missing import SoundMissingError


def clip_segment(item: ClipVideo) -> Segment:
    """Return the part of the video's sound that is the clip's: its stated times, or those of its frames."""
    times = item.times_seconds
    interval = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    end = item.clip.end_seconds
    begin = item.clip.start_seconds
    return Segment(begin, end if end is not None else float(times[-1]) + max(interval, 1e-3))


def clip_sound(source: FrameSource, item: ClipVideo, params: MelParams) -> Float32Array:
    """Return the sound (N,) of a clip; SoundMissingError where its frames are pictures or the file has none."""
    refuse_stills(source, item)
    assert isinstance(source, DataFrames)
    return read_sound(source.files.path(item.clip.video), clip_segment(item), rate_hz=params.rate_hz)


def check_sound(source: FrameSource, item: ClipVideo) -> None:
    """Raise SoundMissingError unless the clip's file has a sound track; nothing is decoded."""
    refuse_stills(source, item)
    assert isinstance(source, DataFrames)
    if not has_sound(source.files.path(item.clip.video)):
        raise SoundMissingError("the video has no sound")


def refuse_stills(source: FrameSource, item: ClipVideo) -> None:
    """Raise SoundMissingError for a clip whose frames are pictures, which have none."""
    if item.video.decoder in STILLS or not isinstance(source, DataFrames):
        raise SoundMissingError("its frames are pictures, which have no sound")


def view_sounds(sound: Float32Array, item: ClipVideo, views: Sequence[View], params: MelParams) -> Float32Array:
    """Return (V, T, mels, columns): spectrograms in decibels around each view's frames; a flip changes none."""
    start = clip_segment(item).start_seconds
    return np.stack(
        [
            log_mel(windows_at(sound, item.video.times_seconds[view.frame_indices] - start, params), params)
            for view in views
        ]
    )
