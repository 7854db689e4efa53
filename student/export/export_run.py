"""Exporting a finished run into a folder of its own: the ONNX file, and what it says of itself beside it."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mmkd.cache_tools.frames.clip_set import ClipSet, DataRecipe
from mmkd.cache_tools.frames.records import UInt8Array
from mmkd.cache_tools.process.interrupt import stop_on_signals
from mmkd.cache_tools.process.progress import Progress
from mmkd.data_manifests.errors import InputError
from mmkd.student.evaluation.run_files import RunRecord, read_run
from mmkd.student.evaluation.trained import TrainedStudent, load_student
from mmkd.student.export.check import Agreement, check, onnx_runner
from mmkd.student.export.folder import recover, refuse_foreign, whole_path, write_folder
from mmkd.student.export.onnx_file import onnx_bytes, refuse_large, require_onnx
from mmkd.student.export.program import exported_program
from mmkd.student.export.real_frames import Frames, noise, of_clips, of_videos

ONNX_FILE = "model.onnx"
CHECK_CLIPS = 16
"""Clips of a manifest through which a file is checked, at most."""
NOTHING = "nothing was written"


@dataclass(frozen=True)
class ExportOptions:
    """What an export is asked for beside its run and its folder."""

    check: Sequence[Path] = ()
    """Videos whose frames the files are checked with."""
    data: DataRecipe | None = None
    """Manifest and videos whose evaluation clips they are checked with."""
    trusted: Collection[str] = ()
    """Networks that are not mmkd's and may run."""

    def __post_init__(self) -> None:
        """Raise InputError for both kinds of frames."""
        if self.check and self.data is not None:
            raise InputError(
                "give --check or --manifest, not both: each says which frames the files are checked with"
            )


def export_run(run: Path, out: Path, options: ExportOptions = ExportOptions()) -> dict[str, Any]:
    """Write the student of a finished run into the folder `out`, whole or not at all; return its card.

    Raises InputError for a folder with other contents, frames that cannot be read, and as `load_student`,
    `exported_program` and `onnx_bytes`; VerificationError as `check`; InterruptedByUserError at a stop signal.
    """
    out = whole_path(out)
    require_onnx()
    recover(out)
    refuse_foreign(out)
    record, student = read_run(run), load_student(run, trusted=options.trusted)
    refuse_large(student)
    with stop_on_signals() as stop:
        frames = frames_to_check(student, record, options)
        description = describe(record, student)
        file = onnx_bytes(student, exported_program(student), description)
        with stop.at_once(NOTHING):
            agreement = checked(file, student, frames)
        card = {**description, "check": {"frames": frames.told, ONNX_FILE: asdict(agreement)}}
        stop.check(NOTHING)
        write_folder(out, card, {ONNX_FILE: file})
    return card


def frames_to_check(student: TrainedStudent, record: RunRecord, options: ExportOptions) -> Frames:
    """Return the frames that were asked for; noise where none were."""
    if options.check:
        return of_videos(student, options.check)
    if options.data is None:
        return noise(student)
    clip_set = ClipSet(options.data)
    train = record.recipe.get("train_split")
    splits = [name for name in clip_set.manifest.splits if name != train]
    if not splits:
        raise InputError(f"{options.data.manifest} has no split but {train!r}, which the student learned from")
    return of_clips(student, clip_set, splits, most=CHECK_CLIPS)


def checked(file: bytes, student: TrainedStudent, frames: Frames) -> Agreement:
    """Check an ONNX file on frames; raises as `check`."""
    with Progress("checking", total=frames.clips * frames.views, unit="view") as progress:
        return check(onnx_runner(file, student), student, each_view(frames, progress), what="ONNX")


def each_view(frames: Frames, progress: Progress) -> Iterator[UInt8Array]:
    """Yield every view, uint8 (T, S, S, 3), of all clips, one after the other."""
    for clip in frames.read():
        for view in clip.pixels:
            yield view
            progress.advance()


def describe(record: RunRecord, student: TrainedStudent) -> dict[str, Any]:
    """Return what a user of the file needs to know: class names by head, views, normalisation, where it is from."""
    normalisation = student.network.normalisation
    return {
        "classes": student.heads,
        "views": student.policy.model_dump(mode="json"),
        "normalisation": {"inside": True, "mean": list(normalisation.mean), "std": list(normalisation.std)},
        "model_sha256": record.model_sha256,
        "cache": record.cache,
        "mmkd": version("mmkd"),
    }
