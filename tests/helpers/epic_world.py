"""EPIC-KITCHENS-100 in small: annotation files in the published form, and videos of other rates as downloaded.

Columns, file names, folders and time stamps are the publisher's; rows, classes and pictures are made. 97 verbs and
300 nouns, of which a few occur; two participants in training, one of them and an unseen one in validation. The
picture's motion tells the verb, its colour the noun, and a tone in each segment the verb again.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from tests.helpers.sounding_videos import encode_sound

LABELS = ("narration", "verb", "verb_class", "noun", "noun_class", "all_nouns", "all_noun_classes")
COLUMNS = (
    *("narration_id", "participant_id", "video_id", "narration_timestamp", "start_timestamp", "stop_timestamp"),
    *("start_frame", "stop_frame"),
    *LABELS,
)
"""The publisher's, in order; the test split's file has none of the labels."""
VERBS, NOUNS = 97, 300
USED_VERBS, USED_NOUNS = (0, 1, 40), (0, 2, 250)
TAIL_VERBS, TAIL_NOUNS = (40, 41), (250,)
SIZE = (96, 64)
RATE_HZ = 16_000
NOMINAL_FPS = {True: 60, False: 50}
"""Of official frame numbers: 60 for videos named PXX_YY, 50 for PXX_1YY."""


@dataclass(frozen=True)
class EpicVideo:
    """A video, its rate, and how many segments it has."""

    video_id: str
    fps: Fraction
    segments: int
    split: str

    @property
    def participant(self) -> str:
        """PXX."""
        return self.video_id[:3]


VIDEOS = (
    EpicVideo("P01_11", Fraction(60000, 1001), 6, "train"),
    EpicVideo("P02_101", Fraction(50), 6, "train"),
    EpicVideo("P02_102", Fraction(50), 4, "validation"),
    EpicVideo("P18_01", Fraction(30000, 1001), 5, "validation"),
    EpicVideo("P18_02", Fraction(30000, 1001), 2, "test"),
)
SEGMENT_SECONDS, PAUSE_SECONDS = 1.5, 0.25


@dataclass(frozen=True)
class EpicWorld:
    """Where the files lie."""

    root: Path
    rows: dict[str, list[dict[str, str]]]
    """Split -> the CSV's rows."""

    def annotations(self, name: str) -> Path:
        """An annotation file."""
        return self.root / "annotations" / name

    @property
    def videos(self) -> Path:
        """The folder of the videos, as the official script leaves it."""
        return self.root / "EPIC-KITCHENS"


def write_epic(root: Path, videos: Sequence[EpicVideo] = VIDEOS) -> EpicWorld:
    """Write annotations and videos below `root`."""
    rows: dict[str, list[dict[str, str]]] = {}
    for video in videos:
        own = [_row(video, number) for number in range(video.segments)]
        rows.setdefault(video.split, []).extend(own)
        path = root / "EPIC-KITCHENS" / video.participant / "videos" / f"{video.video_id}.MP4"
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_video(path, video, own)
    folder = root / "annotations"
    folder.mkdir(parents=True, exist_ok=True)
    for split, own in rows.items():
        columns = [name for name in COLUMNS if split != "test" or name not in LABELS]
        name = "EPIC_100_test_timestamps.csv" if split == "test" else f"EPIC_100_{split}.csv"
        _write_csv(folder / name, columns, own)
    for kind, count in (("verb", VERBS), ("noun", NOUNS)):
        classes = [
            {"id": n, "key": _class_name(kind, n), "instances": f"['{kind}-{n}']", "category": "made"}
            for n in range(count)
        ]
        _write_csv(folder / f"EPIC_100_{kind}_classes.csv", ["id", "key", "instances", "category"], classes)
        tail = TAIL_VERBS if kind == "verb" else TAIL_NOUNS
        _write_csv(folder / f"EPIC_100_tail_{kind}s.csv", [kind], [{kind: n} for n in tail])
    unseen = [{"participant_id": "P18"}, {"participant_id": "P32"}]
    _write_csv(folder / "EPIC_100_unseen_participant_ids_validation.csv", ["participant_id"], unseen)
    return EpicWorld(root, rows)


def _class_name(kind: str, number: int) -> str:
    return f"{kind}-{number}" if kind == "verb" else f"{kind}:{number}"


def _row(video: EpicVideo, number: int) -> dict[str, str]:
    verb, noun = USED_VERBS[number % 3], USED_NOUNS[(number + len(video.video_id)) % 3]
    start = PAUSE_SECONDS + number * (SEGMENT_SECONDS + PAUSE_SECONDS)
    stop = start + SEGMENT_SECONDS
    nominal = NOMINAL_FPS[len(video.video_id) == len("P01_11")]
    return {
        "narration_id": f"{video.video_id}_{number}",
        "participant_id": video.participant,
        "video_id": video.video_id,
        "narration_timestamp": _stamp(start, 3),
        "start_timestamp": _stamp(start, 2),
        "stop_timestamp": _stamp(stop, 2),
        "start_frame": str(round(start * nominal) + 1),
        "stop_frame": str(round(stop * nominal) + 1),
        "narration": f"verb {verb}, noun {noun}",
        "verb": _class_name("verb", verb),
        "verb_class": str(verb),
        "noun": _class_name("noun", noun),
        "noun_class": str(noun),
        "all_nouns": f"['{_class_name('noun', noun)}']",
        "all_noun_classes": f"[{noun}]",
    }


def _stamp(seconds: float, digits: int) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"00:{int(minutes):02d}:{rest:0{3 + digits}.{digits}f}"


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _write_video(path: Path, video: EpicVideo, rows: Sequence[dict[str, str]]) -> None:
    seconds = PAUSE_SECONDS + video.segments * (SEGMENT_SECONDS + PAUSE_SECONDS)
    with av.open(str(path), "w") as box:
        stream = box.add_stream("libx264", rate=video.fps, options={"preset": "ultrafast", "g": "24"})
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        sound = box.add_stream("aac", rate=RATE_HZ, layout="mono")
        for number in range(int(seconds * video.fps)):
            frame = av.VideoFrame.from_ndarray(_picture(number / float(video.fps), rows), "rgb24")
            frame.pts, frame.time_base = number, 1 / video.fps
            box.mux(stream.encode(frame))
        box.mux(stream.encode(None))
        box.mux(encode_sound(sound, _sound(np.arange(int(seconds * RATE_HZ)) / RATE_HZ, rows), 1, RATE_HZ))


def _segment_at(seconds: float, rows: Sequence[dict[str, str]]) -> tuple[int, int] | None:
    number, inside = divmod(seconds - PAUSE_SECONDS, SEGMENT_SECONDS + PAUSE_SECONDS)
    if not 0 <= number < len(rows) or inside >= SEGMENT_SECONDS:
        return None
    row = rows[int(number)]
    return USED_VERBS.index(int(row["verb_class"])), USED_NOUNS.index(int(row["noun_class"]))


def _picture(seconds: float, rows: Sequence[dict[str, str]]) -> np.ndarray:
    picture = np.full((SIZE[1], SIZE[0], 3), 60, np.uint8)
    picture[::8] = 90
    found = _segment_at(seconds, rows)
    if found is not None:
        verb, noun = found
        place = int(20 + 15 * np.sin(2 * np.pi * seconds * (verb + 0.5)))
        picture[place : place + 16, 30:60, noun] = 230
    return picture


def _sound(times: np.ndarray, rows: Sequence[dict[str, str]]) -> np.ndarray:
    number, inside = np.divmod(times - PAUSE_SECONDS, SEGMENT_SECONDS + PAUSE_SECONDS)
    verbs = np.array([USED_VERBS.index(int(row["verb_class"])) for row in rows])
    active = (number >= 0) & (number < len(rows)) & (inside < SEGMENT_SECONDS)
    pitch_hz = 500.0 * 2 ** verbs[number.clip(0, len(rows) - 1).astype(int)]
    return 0.5 * np.sin(2 * np.pi * pitch_hz * times) * active
