"""A finished student's word on videos: the views, batches and network of its evaluation, without cache or manifest.

    student = load_student(Path("runs/student"))
    found = predict_videos(student, [Path("a.webm"), Path("b.webm")])
    found.best(0, top_k=3)["action"]      # [Guess("Moving something up", 0.91, 7.3), ...]

Views are drawn by the run's own policy and the rules of `mmkd-cache build`, pixels made by the function that
evaluation calls, and batches have evaluation's shape, the last one padded: so a clip has the logits, bit for bit,
that `mmkd-student evaluate` averages.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmkd.cache_tools.frames.records import UInt8Array
from mmkd.cache_tools.views.drawing import ViewPolicy
from mmkd.data_manifests.errors import VerificationError, VideoError
from mmkd.student.data.evaluation_views import evaluation_data
from mmkd.student.data.reading import Reading
from mmkd.student.data.rgb_views import RGBViews
from mmkd.student.evaluation.run_evaluation import EVALUATION_BATCH
from mmkd.student.evaluation.trained import TrainedStudent
from mmkd.student.prediction.named_files import NamedFiles
from mmkd.student.prediction.predictions import Predictions
from mmkd.student.prediction.video_clips import Unread, Windows, absolute, clips_of
from mmkd.student.training.predict import predict

THREADS = 4
"""Threads that decode ahead."""


def predict_videos(
    student: TrainedStudent,
    paths: Sequence[Path],
    *,
    windows: Windows | None = None,
    batch_size: int = EVALUATION_BATCH,
    workers: int = 0,
    progress: bool = True,
) -> Predictions:
    """Return what a student says of each video, or of each of the `windows` over it.

    What cannot be read is among `Predictions.unread`, and changes no bit of the others. A `batch_size` other than
    evaluation's gives logits that differ from it by rounding. `workers` processes probe the videos, or this one.
    Raises VerificationError where the student gives NaN or infinity, and as `clips_of`.
    """
    source = NamedFiles(absolute(paths))
    clips, unread = clips_of(source, windows, workers=workers)
    if not clips:
        return Predictions((), {}, student.heads, tuple(unread))
    items = [clip.item for clip in clips]
    data = Tolerant(evaluation_data(source, items, [], student.policy, memory_bytes=0), student.policy)
    logits = predict(
        student.network,
        data,
        np.arange(len(clips)),
        np.arange(student.policy.evaluation_views),
        batch_size=batch_size,
        device=student.device,
        precision=student.precision,
        reading=Reading(THREADS, processes=0),  # threads, for what could not be read is noted in this process
        progress=progress,
        what="predicting",
    )
    if not all(np.isfinite(value).all() for value in logits.values()):
        raise VerificationError("the student gives NaN or infinity: no finished training has such weights")
    for row, fault in sorted(data.faults.items()):
        clip = clips[row]
        span = (None, None) if windows is None else (clip.start_seconds, clip.end_seconds)
        unread.append(Unread(clip.path, str(fault), *span))
    read = [row for row in range(len(clips)) if row not in data.faults]
    kept = {head: value[read] for head, value in logits.items()}
    return Predictions(tuple(clips[row] for row in read), kept, student.heads, tuple(unread))


class Tolerant:
    """Views of clips of which some turn out to be unreadable: black ones take their place, and why is noted."""

    def __init__(self, data: RGBViews, policy: ViewPolicy) -> None:
        """Serve `data`, whose views are those of `policy`."""
        self._data = data
        self._black = np.zeros((policy.frames, policy.size_px, policy.size_px, 3), np.uint8)
        self.rows, self.views = data.rows, data.views
        self.clip_ids, self.labels = data.clip_ids, data.labels
        self.faults: dict[int, VideoError] = {}
        """Row -> why it could not be read."""

    def item(self, row: int, view: int) -> dict[str, UInt8Array]:
        """Return {"rgb": uint8 (T, S, S, 3)} of one view."""
        return self.items(row, [view])[0]

    def items(self, row: int, views: Sequence[int]) -> list[dict[str, UInt8Array]]:
        """Return several views of a clip, as `item`."""
        try:
            return self._data.items(row, views)
        except VideoError as error:
            self.faults[row] = error
            return [{"rgb": self._black} for _ in views]
