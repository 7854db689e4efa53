"""The table of detections: one HDF5 file for a whole data set, of which one video is read at a time.

`mmkd-detections-1`: columns of all boxes one after the other, ranges of frames into them, ranges of videos into
the frames, and a CRC-32 of each video's values, so that damage is noticed when the video is read. In memory stands
a name and a few numbers per video. It gives up compression, and changing a table in place: it is written whole.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mmkd.data_manifests.errors import InputError, VerificationError
from mmkd.data_manifests.regular_file import open_regular
from mmkd.data_manifests.system_errors import cannot_read
from mmkd.pipeline.detections.records import VideoDetections

SCHEMA = "mmkd-detections-1"
SIGNATURE = b"\x89HDF\r\n\x1a\n"
FRAME_COLUMNS = {"times_seconds": "<f8", "ends": "<i8"}
BOX_COLUMNS = {"boxes": "<f4", "categories": "u1", "scores": "<f4", "sides": "u1", "states": "u1"}
TRACKS = {"tracks": "<i4"}
"""A column that older tables do not have; -1 where a box's track is not known."""
VIDEO_COLUMNS = {"frame_ends": "<i8", "box_ends": "<i8", "periods_seconds": "<f8", "crc32": "<u4"}
KEPT_VIDEOS = 4
"""Videos of a table whose boxes stay in memory (of EPIC's longest, 90 minutes, 60 MB each)."""


def is_table(path: Path) -> bool:
    """Return whether a file is HDF5, by its first bytes."""
    try:
        with open_regular(path) as file:
            return file.read(len(SIGNATURE)) == SIGNATURE
    except OSError as error:
        raise cannot_read(path, error) from error


def columns_of(video: VideoDetections) -> dict[str, Any]:
    """Return the columns as they are stored; `ends` counts within the video."""
    values: dict[str, Any] = {"times_seconds": video.times_seconds, "ends": video.offsets[1:]}
    values |= {name: getattr(video, name) for name in BOX_COLUMNS}
    values["tracks"] = np.full(len(video.boxes), -1) if video.tracks is None else video.tracks
    return {name: np.asarray(values[name], dtype) for name, dtype in (FRAME_COLUMNS | BOX_COLUMNS | TRACKS).items()}


def checksum(columns: dict[str, Any], period_seconds: float) -> int:
    """Return the CRC-32 of a video's values; a table from before there were tracks has none of them in it."""
    crc = zlib.crc32(np.float64(period_seconds).tobytes())
    for name in (name for name in (*FRAME_COLUMNS, *BOX_COLUMNS, *TRACKS) if name in columns):
        crc = zlib.crc32(np.ascontiguousarray(columns[name]).tobytes(), crc)
    return crc


class DetectionTable:
    """A table that is there; it holds no file open, so that processes may share it."""

    def __init__(self, path: Path) -> None:
        """Read which videos it has; InputError for another file, VerificationError for a damaged one."""
        self.path = path
        if not is_table(path):
            raise InputError(f"{path} is not a table of detections; `mmkd-cache boxes` makes one")
        try:
            with open_regular(path) as raw, h5py.File(raw, "r") as file:
                schema = file.attrs.get("schema")
                if not isinstance(schema, str) or schema != SCHEMA:
                    raise InputError(f"{path} has the schema {schema!r}; this version reads {SCHEMA!r}")
                names = json.loads(self._dataset(file, "videos")[()].tobytes())
                self._index = {name: self._dataset(file, name)[()] for name in VIDEO_COLUMNS}
                self.about: dict[str, Any] = json.loads(file.attrs["about"])
            self.rows = {str(name): row for row, name in enumerate(names)}
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise self._damaged(error) from error
        if len(self.rows) != len(names) or any(len(column) != len(names) for column in self._index.values()):
            raise self._damaged("its columns differ in length")
        self._kept: dict[str, VideoDetections] = {}

    def read(self, video: str) -> VideoDetections:
        """Return one video's detections; KeyError where there are none, VerificationError where they changed."""
        if (kept := self._kept.get(video)) is not None:
            return kept
        found = self._read(video)
        for oldest in list(self._kept)[: max(0, len(self._kept) - KEPT_VIDEOS + 1)]:
            self._kept.pop(oldest, None)
        self._kept[video] = found
        return found

    def _read(self, video: str) -> VideoDetections:
        row = self.rows[video]
        try:
            with open_regular(self.path) as raw, h5py.File(raw, "r") as file:
                columns = {name: self._slice(file, name, row) for name in (*FRAME_COLUMNS, *BOX_COLUMNS)}
                if "tracks" in file:
                    columns["tracks"] = self._slice(file, "tracks", row)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise self._damaged(error) from error
        period_seconds = float(self._index["periods_seconds"][row])
        if checksum(columns, period_seconds) != int(self._index["crc32"][row]):
            raise self._damaged(f"the detections of {video!r} are not what was written")
        if "tracks" in columns and (columns["tracks"] < 0).any():
            del columns["tracks"]
        offsets = np.concatenate([[0], columns.pop("ends")]).astype(np.int64)
        return VideoDetections(video=video, offsets=offsets, period_seconds=period_seconds, **columns)

    def _slice(self, file: h5py.File, name: str, row: int) -> Any:
        ends = self._index["frame_ends" if name in FRAME_COLUMNS else "box_ends"]
        return self._dataset(file, name)[int(ends[row - 1]) if row else 0 : int(ends[row])]

    def _dataset(self, file: h5py.File, name: str) -> h5py.Dataset:
        """Return a dataset that lies in this very file; others may be pipes or devices, or anybody's."""
        if not isinstance(file.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"{name} is not there, or a link")
        found = file[name]
        if not isinstance(found, h5py.Dataset) or found.external or found.is_virtual:
            raise ValueError(f"{name} holds no values of its own")
        wanted = {**FRAME_COLUMNS, **BOX_COLUMNS, **TRACKS, **VIDEO_COLUMNS}.get(name, "u1")
        if found.dtype != np.dtype(wanted):
            raise ValueError(f"{name} has the type {found.dtype}")
        return found

    def _damaged(self, what: object) -> VerificationError:
        text = " ".join(str(what).split())[:200]
        return VerificationError(
            f"{self.path} is damaged: {text}; delete it and make it again with `mmkd-cache boxes`"
        )
