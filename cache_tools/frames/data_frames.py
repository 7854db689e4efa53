"""A data set's frames, wherever they lie: video files, folders or tars of pictures, or one HDF5 file of them.

`--videos` names a folder, in which each clip's `video` is a file, a folder or a `.tar`, or an HDF5 file. A video
file that is not there is looked for as a folder and as a tar of its name. What a frame is stays the same: the i-th
of its video, at a time in seconds; pictures without times have those of the rate that the manifest states.
"""

import stat
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import numpy as np

from mmkd.cache_tools.frames.packets import Limits
from mmkd.cache_tools.frames.records import ClipFrames, Float64Array, IntArray, UInt8Array, VideoFacts
from mmkd.cache_tools.frames.source import DECODER_RULES, DEFAULT_LIMITS, VideoFiles, check_indices
from mmkd.cache_tools.frames.still_files import TAR_SUFFIX, FolderFrames, TarFrames
from mmkd.cache_tools.frames.stills import FOLDER, RATE_ADVICE, STILL_RULES, STILLS, StillFrames, still_size
from mmkd.cache_tools.frames.video_paths import ADVICE, Links, reading, video_path
from mmkd.data_manifests.errors import InputError, StorageError, VideoError
from mmkd.data_manifests.manifest import FrameRate

KEPT_INDICES = 16
"""Folders and archives whose list of frames is kept in a process: clips of a long video follow each other."""
_KEPT: "OrderedDict[tuple[object, ...], StillFrames]" = OrderedDict()


WITH_STILLS = f"{DECODER_RULES}; {STILL_RULES}"
"""Name of the rules where some of the videos are pictures."""


def decoder_rules(videos: Iterable[VideoFacts]) -> str:
    """Return the name of the rules by which these videos' frames are decoded, for fingerprints."""
    return WITH_STILLS if any(facts.decoder in STILLS for facts in videos) else DECODER_RULES


@dataclass(frozen=True)
class DataFrames:
    """The frames of a data set's videos. Nothing is held open, so it can be sent to workers."""

    root: Path
    """Folder that the videos are below, or an HDF5 file of pictures."""
    limits: Limits = DEFAULT_LIMITS
    """What a video may cost at most."""
    links: Links = "own"
    """Which symbolic links may lead out of the root."""
    frame_rates: tuple[FrameRate, ...] = ()
    """Rates of pictures without times, as in the manifest."""

    @property
    def files(self) -> VideoFiles:
        """The video files among them."""
        return VideoFiles(self.root, self.limits, links=self.links)

    def stamp(self, video: str) -> str:
        """Return a cheap text that changes when video, limits, rate or rules do; VideoError if it is missing."""
        path = self._stills_path(video)
        if path is None:
            return self.files.stamp(video)
        with reading(self.root):
            found = path.stat()
            rate = self._rate(video)
            return f"{found.st_size}:{found.st_mtime_ns}:{self.limits.max_pixels}:{rate}:{STILL_RULES}"

    def is_there(self, video: str) -> bool:
        """Return whether something of the video's name is there, which may yet be no video."""
        try:
            path = self._stills_path(video)
            if path is not None and path == self.root:
                with reading_stills(path):
                    self._open(path, video)
        except VideoError:
            return False
        return True

    def probe(self, video: str) -> VideoFacts:
        """Return the video's facts from its headers and its first frame; VideoError if it cannot be used."""
        path = self._stills_path(video)
        if path is None:
            return self.files.probe(video)
        with reading_stills(path):
            stills = self._open(path, video)
            (first,) = stills.decoded([0], self.limits)
            last = still_size(stills.read(stills.count - 1))
            height, width = first.shape[:2]
            if (last.width, last.height) != (width, height):
                raise VideoError(f"its frames are {width} x {height}, and {last.width} x {last.height}")
            return VideoFacts(width, height, self._times(stills, video), stills.kind, stills.identity())

    def read(self, video: str, frame_indices: IntArray, facts: VideoFacts) -> ClipFrames:
        """Return the frames at strictly ascending indices, exactly these; VideoError otherwise."""
        if facts.decoder not in STILLS:
            return self.files.read(video, frame_indices, facts)
        frames = np.stack(list(self.stream(video, frame_indices, facts)))
        return ClipFrames(frames, frame_indices, facts.times_seconds[frame_indices])

    def stream(self, video: str, frame_indices: IntArray, facts: VideoFacts) -> Iterator[UInt8Array]:
        """Yield the frames (H, W, 3) at strictly ascending indices one by one; raises what `read` raises."""
        if facts.decoder not in STILLS:
            yield from self.files.stream(video, frame_indices, facts)
            return
        check_indices(frame_indices, facts)
        try:
            path = self._stills_path(video)
        except VideoError as error:
            raise StorageError(f"{error}, though it was there before, below {self.root}; {ADVICE}") from error
        if path is None:
            raise VideoError("the video has changed since it was probed; run the command again")
        with reading_stills(path):
            stills = self._open(path, video)
            if stills.kind != facts.decoder or stills.identity() != facts.identity:
                # A folder's own time does not change with the pictures in it, so only a touch has it probed again.
                advice = f"`touch {path}`, and run" if stills.kind == FOLDER else "run"
                raise VideoError(f"the video has changed since it was probed; {advice} the command again")
            for index, frame in zip(
                frame_indices.tolist(), stills.decoded(frame_indices, self.limits), strict=True
            ):
                if frame.shape[:2] != (facts.height, facts.width):
                    height, width = frame.shape[:2]
                    raise VideoError(
                        f"frame {stills.name(index)} is {width} x {height}, the first is {facts.width} x "
                        f"{facts.height}"
                    )
                yield frame

    def _stills_path(self, video: str) -> Path | None:
        """Return the folder, archive or HDF5 file of a video's pictures; None for a video file.

        Raises VideoError, as for video files, where there is nothing of that name.
        """
        if self._is_one_file():
            return self.root
        missing: VideoError | None = None
        for name in (
            video,
            str(PurePosixPath(video).with_suffix("")),
            f"{PurePosixPath(video).with_suffix('')}.tar",
        ):
            try:
                path = video_path(self.root, name, self.links, folders=True)
            except VideoError as error:
                missing = missing or error
                continue
            return path if path.is_dir() or path.suffix.lower() == TAR_SUFFIX else None
        raise missing or VideoError(f"video not found: {video}")

    def _is_one_file(self) -> bool:
        try:
            return stat.S_ISREG(self.root.stat().st_mode)
        except OSError:
            return False

    def _open(self, path: Path, video: str) -> StillFrames:
        """Open a video's pictures; the lists of frames of a few are kept."""
        if path == self.root:
            from mmkd.cache_tools.frames.still_hdf5 import Hdf5Frames  # not at the top: recipes import this module

            return Hdf5Frames.open(path, video)
        found = path.stat()
        key = (path, found.st_size, found.st_mtime_ns, found.st_ino)
        if key not in _KEPT:
            open_it: Callable[[Path], StillFrames] = FolderFrames.open if path.is_dir() else TarFrames.open
            _KEPT[key] = open_it(path)
            while len(_KEPT) > KEPT_INDICES:
                _KEPT.popitem(last=False)
        return _KEPT[key]

    def _rate(self, video: str) -> float | None:
        rates = (rate for rate in self.frame_rates if fnmatchcase(video, rate.pattern))
        return next((rate.frames_per_second for rate in rates), None)

    def _times(self, stills: StillFrames, video: str) -> Float64Array:
        times = stills.times_seconds()
        if times is not None:
            return times
        rate = self._rate(video)
        if rate is None:
            raise VideoError(RATE_ADVICE)
        seconds = stills.count / rate
        if seconds > self.limits.max_duration_seconds:
            raise VideoError(
                f"the video takes {seconds:.0f} s; the limit is {self.limits.max_duration_seconds:g} s"
            )
        return np.arange(stills.count) / rate


@contextmanager
def reading_stills(path: Path) -> Iterator[None]:
    """Tell the machine's faults from the pictures' while they are read: any OSError is the machine's."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}; {ADVICE}") from error


def open_data_frames(
    root: Path, limits: Limits, links: Links, frame_rates: tuple[FrameRate, ...] = ()
) -> DataFrames:
    """Return the frames below a folder or in an HDF5 file; InputError where there is neither."""
    if root.is_dir():
        return DataFrames(root, limits, links, frame_rates)
    if not root.is_file():
        raise InputError(f"the video folder {root} does not exist; give it with --videos")
    from mmkd.cache_tools.frames.still_hdf5 import open_frames_file  # as above

    try:
        with reading_stills(root):
            open_frames_file(root)
    except VideoError as error:
        raise InputError(
            f"{root} is no HDF5 file, or a damaged one; --videos names an HDF5 file of frames, or the folder that "
            "videos, folders or tars of frames lie in"
        ) from error
    return DataFrames(root, limits, links, frame_rates)
