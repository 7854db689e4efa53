"""Writing the table of detections: video after video, gathered into large writes, whole or not at all.

A video that cannot be used is left out with its reason, and the others go on. A stop leaves nothing behind.
"""

import json
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mmkd.cache_tools.process.interrupt import StopRequest, stop_on_signals
from mmkd.cache_tools.storage.hdf5_file import writing_hdf5
from mmkd.data_manifests.atomic import atomic_path
from mmkd.data_manifests.errors import InputError
from mmkd.pipeline.detections.records import Unusable, VideoDetections
from mmkd.pipeline.detections.table import (
    BOX_COLUMNS,
    FRAME_COLUMNS,
    SCHEMA,
    TRACKS,
    VIDEO_COLUMNS,
    checksum,
    columns_of,
)

CHUNK_ROWS = 1 << 14
GATHERED_ROWS = 1 << 17
"""Frames and boxes that wait in memory for one write."""
COLUMNS = FRAME_COLUMNS | BOX_COLUMNS | TRACKS


@dataclass
class TableReport:
    """What a table has."""

    videos: int = 0
    """Videos in it."""
    frames: int = 0
    """Frames that were looked at."""
    boxes: int = 0
    """Boxes in them."""
    unusable: dict[str, str] = field(default_factory=dict)
    """Video -> why it was left out."""


def write_table(
    path: Path,
    videos: Iterable[VideoDetections | Unusable],
    about: dict[str, Any],
    *,
    stop: StopRequest | None = None,
    kept: str = "nothing is written",
) -> TableReport:
    """Write a table, whole or not at all; `about` is kept as JSON: where the detections are from.

    `stop` is the caller's listener to signals, where it has one.
    Raises InputError for a video that comes twice and where none can be used, StorageError when the disk refuses,
    InterruptedByUserError, saying what is `kept`, after a stop.
    """
    report = TableReport()
    listening = stop_on_signals() if stop is None else nullcontext(stop)
    with listening as stopping, atomic_path(path) as temporary, writing_hdf5(temporary) as output:
        output.file.attrs.update({"schema": SCHEMA, "about": json.dumps(about, sort_keys=True)})
        columns = _Columns(output.file)
        for video in videos:
            stopping.check(kept)
            if video.video in columns.names or video.video in report.unusable:
                raise InputError(f"video {video.video!r}: it comes twice")
            if (fault := video.fault()) is not None:
                report.unusable[video.video] = fault
                continue
            assert isinstance(video, VideoDetections)
            if columns.add(video):
                output.check()
        if not columns.names:
            first = next((f"{video}: {why}" for video, why in report.unusable.items()), "there is none")
            raise InputError(f"no video can be used; the first: {first}")
        columns.finish()
        report.videos, (report.frames, report.boxes) = len(columns.names), columns.rows
    return report


class _Columns:
    """The columns of a table that is being written."""

    def __init__(self, file: h5py.File) -> None:
        """Create them, empty."""
        self.file, self.names, self.rows = file, dict[str, None](), (0, 0)
        self._index = {name: list[Any]() for name in VIDEO_COLUMNS}
        self._gathered: list[dict[str, Any]] = []
        for name, dtype in COLUMNS.items():
            width = (4,) if name == "boxes" else ()
            file.create_dataset(name, (0, *width), dtype, maxshape=(None, *width), chunks=(CHUNK_ROWS, *width))

    def add(self, video: VideoDetections) -> bool:
        """Take a video, and return whether it led to a write."""
        values = columns_of(video)
        self.names[video.video] = None
        self.rows = self.rows[0] + len(values["ends"]), self.rows[1] + len(values["boxes"])
        row = (*self.rows, video.period_seconds, checksum(values, video.period_seconds))
        for column, value in zip(self._index.values(), row, strict=True):
            column.append(value)
        self._gathered.append(values)
        full = sum(self.rows) - len(self.file["ends"]) - len(self.file["boxes"]) >= GATHERED_ROWS
        if full:
            self._write()
        return full

    def _write(self) -> None:
        for name in COLUMNS if self._gathered else ():
            values = np.concatenate([columns[name] for columns in self._gathered])
            stored = self.file[name]
            stored.resize(len(stored) + len(values), axis=0)
            stored[len(stored) - len(values) :] = values
        self._gathered.clear()

    def finish(self) -> None:
        """Write what waits, and the index of videos."""
        self._write()
        for name, dtype in VIDEO_COLUMNS.items():
            self.file[name] = np.array(self._index[name], dtype)
        self.file["videos"] = np.frombuffer(json.dumps(list(self.names)).encode(), np.uint8)
