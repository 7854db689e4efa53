"""Videos with a known sound: tones that begin at stated moments, beside a picture track that may start later."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

Sound = Callable[[np.ndarray], np.ndarray]
"""Times in seconds -> samples in -1..1."""


def write_video(
    path: Path,
    sound: Sound | None,
    *,
    seconds: float = 3.0,
    codec: str = "aac",
    rate_hz: int = 48_000,
    channels: int = 2,
    fps: int = 25,
    picture: bool = True,
    picture_delay_seconds: float = 0.0,
    size: tuple[int, int] = (64, 48),
) -> None:
    """Write pictures of one grey a frame and, where given, a sound track."""
    with av.open(str(path), "w") as box:
        video = box.add_stream("mpeg4", rate=fps) if picture else None
        audio = box.add_stream(codec, rate=rate_hz) if sound else None
        if video is not None:
            video.width, video.height, video.pix_fmt = *size, "yuv420p"
        if audio is not None:
            audio.codec_context.layout = "stereo" if channels == 2 else "mono"
        if video is not None:
            delay = round(picture_delay_seconds * fps)
            for number in range(round(seconds * fps) - delay):
                frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), number % 256, np.uint8), "rgb24")
                frame.pts, frame.time_base = number + delay, Fraction(1, fps)
                for packet in video.encode(frame):
                    box.mux(packet)
            for packet in video.encode(None):
                box.mux(packet)
        if audio is not None and sound is not None:
            for packet in encode_sound(
                audio, sound(np.arange(round(seconds * rate_hz)) / rate_hz), channels, rate_hz
            ):
                box.mux(packet)


def encode_sound(audio, samples, channels, rate_hz):
    block = 1024
    kind = audio.codec_context.format.name
    for start in range(0, len(samples), block):
        part = samples[start : start + block].astype(np.float32)
        planes = np.repeat(part[None], channels, 0)
        packed = (planes.T.reshape(1, -1) * 32767).round().astype(np.int16)
        data = packed if kind == "s16" else planes
        frame = av.AudioFrame.from_ndarray(data, format=kind, layout="stereo" if channels == 2 else "mono")
        frame.rate, frame.pts, frame.time_base = rate_hz, start, Fraction(1, rate_hz)
        yield from audio.encode(frame)
    yield from audio.encode(None)
