"""Writes small videos whose every frame carries its own number, in many containers, codecs and GOPs.

The number is drawn as two rows of bars, the second one inverted, large enough to survive strong compression:
a frame that shows anything else than one number cannot be read by mistake.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.packet import Packet

from mmkd.data_manifests.manifest import Clip, Head, Manifest
from mmkd.data_manifests.manifest_file import save_manifest

BITS = 10
BAR = 12  # pixels
WIDTH, HEIGHT = BITS * BAR + 8, 4 * BAR + 24  # 128 x 72


@dataclass(frozen=True)
class Sample:
    """How to encode one barcode video."""

    name: str
    codec: str
    options: dict[str, str] = field(default_factory=dict)
    pixel_format: str = "yuv420p"
    size: tuple[int, int] = (WIDTH, HEIGHT)
    frames: int = 100
    pts: Callable[[int], int] = int
    """Time stamp of frame i in units of 1/24 s."""
    b_frames: int | None = None
    gop: int | None = None
    turns: int = 0
    """Quarter turns to the left that the display matrix asks for."""


def x264(name: str, params: str, **more) -> Sample:
    return Sample(name, "libx264", {"x264-params": f"scenecut=0:{params}", "preset": "veryfast"}, **more)


def uneven(i: int) -> int:
    return 3 * i + (i * i) % 3  # ascending, with steps of 2 to 5


VP9 = {"cpu-used": "8", "deadline": "realtime"}
X265 = {"x265-params": "keyint=24:bframes=4:log-level=error", "preset": "veryfast"}
LONG_GOP = "keyint=60:min-keyint=60:bframes=3"
EXACT = [
    Sample("vp8.webm", "libvpx", {"deadline": "realtime", "cpu-used": "8"}, gop=30),
    Sample("vp8_alt_ref.webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16"}, gop=40),
    Sample("vp9.webm", "libvpx-vp9", VP9, gop=30),
    Sample("vp9_alt_ref.webm", "libvpx-vp9", {"cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    Sample("vp9_uneven.webm", "libvpx-vp9", VP9, pts=uneven),
    Sample("vp9_odd.webm", "libvpx-vp9", VP9, size=(WIDTH + 1, HEIGHT + 1)),
    Sample("vp9_odd_width.webm", "libvpx-vp9", VP9, size=(WIDTH + 3, HEIGHT + 2)),
    x264("closed.mp4", LONG_GOP),
    x264("closed.mkv", LONG_GOP),
    x264("open.mp4", "keyint=24:min-keyint=24:open-gop=1:bframes=4:b-pyramid=normal"),
    x264("open.mkv", "keyint=24:min-keyint=24:open-gop=1:bframes=4:b-pyramid=normal"),
    x264("dense_keys.mp4", "keyint=2:min-keyint=1:open-gop=1:bframes=3:b-adapt=0"),
    x264("one_key.mp4", "keyint=infinite:bframes=3"),
    x264("intra_refresh.mp4", "keyint=30:intra-refresh=1:bframes=0"),
    x264("uneven.mp4", LONG_GOP, pts=uneven),
    x264("odd.mkv", LONG_GOP, pixel_format="yuv444p", size=(WIDTH + 1, HEIGHT + 1)),
    x264("upright_left.mp4", LONG_GOP, turns=1),
    x264("upside_down.mp4", LONG_GOP, turns=2),
    x264("upright_right.mp4", LONG_GOP, turns=3),
    Sample("hevc.mp4", "libx265", {"x265-params": "keyint=24:bframes=4:log-level=error", "preset": "veryfast"}),
    Sample(
        "hevc_10_bit.mkv",
        "libx265",
        {"x265-params": "keyint=24:log-level=error", "preset": "veryfast"},
        pixel_format="yuv420p10le",
    ),
    Sample("av1.mp4", "libsvtav1", {"preset": "12", "svtav1-params": "keyint=24"}, frames=40),
    Sample("mpeg4.avi", "mpeg4", b_frames=0, gop=12),
    Sample("mpeg4_b.avi", "mpeg4", b_frames=2, gop=12),
    Sample("mpeg4_b.mp4", "mpeg4", b_frames=2, gop=12, frames=40),
    Sample("h263.3gp", "h263", size=(176, 144), gop=12, frames=40),
    Sample("flv1.flv", "flv", gop=12, frames=40),
    Sample("msmpeg4.avi", "msmpeg4", gop=12, frames=40),
    Sample("wmv2.asf", "wmv2", gop=12, frames=40),
    Sample("cinepak.mov", "cinepak", pixel_format="rgb24", gop=12, frames=40),
    Sample("animation.mov", "qtrle", pixel_format="rgb24", gop=12, frames=40),
    Sample("mpeg2_b.mkv", "mpeg2video", b_frames=2, gop=12, frames=40),
    Sample("mpeg1_b.avi", "mpeg1video", b_frames=2, gop=12, frames=40),
    x264("h264.avi", "keyint=12:bframes=0", frames=40),
    x264("h264_b.avi", LONG_GOP, frames=80),
    Sample("vp9.mp4", "libvpx-vp9", VP9, gop=12, frames=40),
]
NOT_EXACT = x264("stream.ts", LONG_GOP, frames=30)


def draw(number: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> np.ndarray:
    """Return an RGB frame (H, W, 3) that carries `number`, over a background that moves with it."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    background = 128 + 60 * np.sin((x + 2 * number) / 7) * np.cos((y - number) / 5)
    frame = np.repeat(background[..., None], 3, axis=2).astype(np.uint8)
    for bit in range(BITS):
        level = 230 if number >> bit & 1 else 25
        columns = slice(4 + bit * BAR, 4 + (bit + 1) * BAR)
        frame[: 2 * BAR, columns] = level
        frame[2 * BAR : 4 * BAR, columns] = 255 - level
    return frame


def number_of(frame: np.ndarray) -> int:
    """Return the number that a decoded RGB frame carries; ValueError when it carries none clearly."""
    number = 0
    for bit in range(BITS):
        columns = slice(4 + bit * BAR + 3, 4 + (bit + 1) * BAR - 3)
        upper, lower = (frame[row + 4 : row + 2 * BAR - 4, columns].mean() for row in (0, 2 * BAR))
        if abs(upper - lower) < 60:
            raise ValueError(f"bit {bit} is unclear: {upper:.0f} over {lower:.0f}")
        number |= (upper > lower) << bit
    return number


def numbers_of(frames: np.ndarray) -> list[int]:
    return [number_of(frame) for frame in frames]


def encode(path: Path, sample: Sample, *, first: int = 0, container_options: dict[str, str] | None = None) -> Path:
    """Write the sample; its frame i carries the number first + i."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(sample.codec, rate=24, options=sample.options)
        stream.width, stream.height = sample.size if sample.turns % 2 == 0 else sample.size[::-1]
        stream.pix_fmt = sample.pixel_format
        stream.codec_context.time_base = Fraction(1, 24)
        stream.codec_context.thread_count = 1
        if sample.gop is not None:
            stream.codec_context.gop_size = sample.gop
        if sample.b_frames is not None:
            stream.codec_context.max_b_frames = sample.b_frames
        if sample.turns:
            stream.set_display_rotation(90.0 * sample.turns if sample.turns < 3 else -90.0)
        for i in range(sample.frames):
            lying = np.ascontiguousarray(np.rot90(draw(first + i, sample.size), -sample.turns))
            frame = av.VideoFrame.from_ndarray(lying, format="rgb24")
            frame.pts = sample.pts(i)
            frame.time_base = Fraction(1, 24)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_sample(folder: Path, sample: Sample) -> Path:
    return encode(folder / sample.name, sample)


def write_world(root: Path, names: Sequence[str]) -> Path:
    """Write `videos/` with the named samples and one that is broken, and two manifests: of all, and of the well."""
    (root / "videos").mkdir()
    for sample in EXACT:
        if sample.name in names:
            write_sample(root / "videos", sample)
    (root / "videos" / "broken.mp4").write_bytes(b"no video" * 100)
    for name, files in (("all", (*names, "broken.mp4")), ("well", names)):
        clips = tuple(Clip(file, file, "train", {"action": 0}) for file in files)
        save_manifest(Manifest("barcodes", (Head("action", ("a", "b")),), clips), root / f"{name}.jsonl")
    return root


def rewrite(
    source: Path,
    target: Path,
    change: Callable[[Sequence[bytes]], Sequence[bytes]] = list,
    *,
    all_keys: bool = False,
) -> Path:
    """Remux a file with its packets' bytes changed, in the order and at the times of the old ones.

    `all_keys` marks each packet as a key frame, as some muxers do.
    """
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [packet for packet in old.demux(video=0) if packet.size]
        for packet, data in zip(packets, change([bytes(p) for p in packets]), strict=True):
            changed = Packet(data)
            changed.pts, changed.dts, changed.time_base = packet.pts, packet.dts, packet.time_base
            changed.duration = packet.duration
            changed.is_keyframe = all_keys or packet.is_keyframe
            changed.stream = stream
            new.mux(changed)
    return target


def hide_frame(packets: Sequence[bytes], position: int) -> list[bytes]:
    """Clear the show_frame bit of one VP8 packet, as encoders do for alternate references."""
    return [bytes([data[0] & ~0x10]) + data[1:] if i == position else data for i, data in enumerate(packets)]


def pack_b_frames(packets: Sequence[bytes]) -> list[bytes]:
    """Pack MPEG-4 frames as DivX did: each B-frame rides with the frame before it, a stub stands for it."""
    start, stub = b"\x00\x00\x01\xb6", b"\x00\x00\x01\xb6\x51\xcf"
    is_b = [data[data.index(start) + 4] >> 6 == 2 for data in packets]
    packed = []
    for i, data in enumerate(packets):
        carried = packets[i + 1] if i + 1 < len(packets) and is_b[i + 1] else b""
        packed.append(stub if is_b[i] else data + carried)
    head = packed[0]
    cut = head.index(start)
    packed[0] = head[:cut] + b"\x00\x00\x01\xb2DivX503b1393p" + head[cut:]
    return packed


def write_packed(folder: Path) -> Path:
    sample = Sample("plain_b.avi", "mpeg4", b_frames=1, gop=12, options={"b_strategy": "0"}, frames=60)
    return rewrite(write_sample(folder, sample), folder / "packed.avi", pack_b_frames)


def write_hidden(folder: Path, position: int) -> Path:
    sample = replace(EXACT[0], name="all_shown.webm")
    return rewrite(
        write_sample(folder, sample), folder / "hidden.webm", lambda packets: hide_frame(packets, position)
    )
