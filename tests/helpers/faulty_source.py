"""A video source on which one video meets a fault, once or always, in whatever process reads it."""

import errno
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from mmkd.cache_tools.frames.data_frames import DataFrames
from mmkd.cache_tools.frames.records import ClipFrames, IntArray, VideoFacts
from mmkd.data_manifests.errors import StorageError, VideoError


@dataclass(frozen=True)
class FaultySource(DataFrames):
    """Videos below a root, one of them bad."""

    video: str = ""
    """The bad one."""
    fault: str = ""
    """`eio`: reading fails as on a bad disk; `broken`: it does not decode; `death`: the process dies;
    `lost`: the video folder is moved away, as when its disk is lost."""
    marks: str = ""
    """File that grows by a byte with each fault."""
    times: int = 10**9
    """How often it happens."""

    def read(self, video: str, frame_indices: IntArray, facts: VideoFacts) -> ClipFrames:
        """Return the frames, or meet the fault."""
        marks = Path(self.marks)
        happened = marks.stat().st_size if marks.exists() else 0
        if video == self.video and happened < self.times:
            with marks.open("ab") as file:
                file.write(b".")
            if self.fault == "death":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "lost":
                self.root.rename(f"{self.root}-elsewhere")
                if "empty" in self.marks:
                    self.root.mkdir()
            elif self.fault == "broken":
                raise VideoError("a fault of the test")
            else:
                raise StorageError(f"cannot read {video}: {os.strerror(errno.EIO)}")
        return super().read(video, frame_indices, facts)
