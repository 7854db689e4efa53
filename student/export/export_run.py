"""Exporting a finished run into a folder of its own: model files, each checked, and their card."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmkd.cache_tools.frames.clip_set import ClipSet
from mmkd.cache_tools.frames.records import UInt8Array
from mmkd.cache_tools.process.interrupt import stop_on_signals
from mmkd.cache_tools.process.progress import Progress
from mmkd.data_manifests.errors import InputError
from mmkd.student.evaluation.run_files import RunRecord, read_run
from mmkd.student.evaluation.trained import TrainedStudent, load_student
from mmkd.student.export.card import card_of, describe
from mmkd.student.export.card_text import card_text
from mmkd.student.export.check import Agreement, agreement, check, onnx_runner
from mmkd.student.export.folder import recover, refuse_foreign, whole_path, write_folder
from mmkd.student.export.int8 import int8_bytes, price
from mmkd.student.export.latency import measured
from mmkd.student.export.onnx_file import onnx_bytes, refuse_large, require_onnx
from mmkd.student.export.options import CARD_TEXT_FILE, INT8_FILE, ONNX_FILE, PT2_FILE, ExportOptions
from mmkd.student.export.program import exported_program
from mmkd.student.export.pt2_file import pt2_bytes, pt2_runner
from mmkd.student.export.real_frames import ClipViews, Frames, noise, of_clips, of_videos

RUNNERS = {ONNX_FILE: onnx_runner, PT2_FILE: pt2_runner}
CHECK_CLIPS = 16
"""Clips of a manifest through which a file is checked, at most."""
CALIBRATION_CLIPS = 64
"""Training clips that set the ranges of 8 bits, at most."""
PRICE_CLIPS = 512
"""Evaluation clips over which the accuracy in 8 bits is counted, at most."""
NOTHING = "nothing was written"


def export_run(run: Path, out: Path, options: ExportOptions) -> dict[str, Any]:
    """Write the student of a finished run into the folder `out`, whole or not at all; return its card.

    Raises InputError for a folder with other contents, frames that cannot be read, and as `load_student`,
    `exported_program` and `onnx_bytes`; VerificationError as `check`; InterruptedByUserError at a stop signal.
    """
    out = whole_path(out)
    if ONNX_FILE in options.files:
        require_onnx()
    recover(out)
    refuse_foreign(out)
    record, student = read_run(run), load_student(run, trusted=options.trusted)
    if ONNX_FILE in options.files:
        refuse_large(student)
    card = card_of(run, record, student, options.license)
    with stop_on_signals() as stop:
        frames = frames_to_check(student, record, options)
        small = Int8Export.of(student, record, options)
        files = model_files(student, options.files, describe(record, student))
        with stop.at_once(NOTHING):
            found = {name: asdict(checked(name, file, student, frames)) for name, file in files.items()}
            card["int8"] = None
            if small is not None:
                full = files[ONNX_FILE]
                files[INT8_FILE] = small.made(full, describe(record, student))
                found[INT8_FILE] = asdict(small.compared(files[INT8_FILE], frames))
                card["int8"] = small.priced(full, files[INT8_FILE])
            card["check"] = {"frames": frames.told, "real": frames.real, "files": found}
            card["cost"] = measured(student, files) if options.latency else None
        stop.check(NOTHING)
        write_folder(out, card, {CARD_TEXT_FILE: card_text(card).encode(), **files})
    return card


def model_files(student: TrainedStudent, names: Sequence[str], description: dict[str, Any]) -> dict[str, bytes]:
    """Return the model files of these names; raises as `exported_program` and `onnx_bytes`."""
    program = exported_program(student)
    make = {
        ONNX_FILE: lambda: onnx_bytes(student, program, description),
        PT2_FILE: lambda: pt2_bytes(program, description),
    }
    return {name: make[name]() for name in names}


def frames_to_check(student: TrainedStudent, record: RunRecord, options: ExportOptions) -> Frames:
    """Return the frames that were asked for; noise where none were."""
    if options.check:
        return of_videos(student, options.check)
    if options.data is None:
        return noise(student)
    clip_set = ClipSet(options.data)
    return of_clips(student, clip_set, evaluation_splits(clip_set, record), most=CHECK_CLIPS)


def evaluation_splits(clip_set: ClipSet, record: RunRecord) -> list[str]:
    """Return the splits of a manifest that a student did not learn from; InputError where there is none."""
    train = record.recipe.get("train_split")
    splits = [name for name in clip_set.manifest.splits if name != train]
    if not splits:
        raise InputError(f"{clip_set.recipe.manifest} has no split but {train!r}, which the student learned from")
    return splits


@dataclass(frozen=True)
class Int8Export:
    """A student in 8 bits: made, compared with the student, and its accuracy counted."""

    student: TrainedStudent
    """In 32 bits."""
    record: RunRecord
    """Of its run."""
    clip_set: ClipSet
    """Where training and evaluation clips are."""

    @classmethod
    def of(cls, student: TrainedStudent, record: RunRecord, options: ExportOptions) -> "Int8Export | None":
        """Return what makes the file, None where it is not asked for; InputError without training clips."""
        if not options.int8 or options.data is None:
            return None
        clip_set, train = ClipSet(options.data), record.recipe.get("train_split")
        if train not in clip_set.manifest.splits:
            raise InputError(
                f"--int8: {options.data.manifest} has no split {train!r}, which the student learned from, and "
                "whose clips set the ranges"
            )
        return cls(student, record, clip_set)

    def made(self, full: bytes, description: dict[str, Any]) -> bytes:
        """Return the file in 8 bits of the one in 32; raises as `int8_bytes`."""
        train = str(self.record.recipe["train_split"])
        frames = of_clips(self.student, self.clip_set, [train], most=CALIBRATION_CLIPS)
        with Progress("calibrating 8 bits", total=frames.clips * frames.views, unit="view") as progress:
            return int8_bytes(full, each_view(frames, progress), description)

    def compared(self, small: bytes, frames: Frames) -> Agreement:
        """Return how far the file in 8 bits is from the student, which no bound is set for."""
        with Progress(f"comparing {INT8_FILE}", total=frames.clips * frames.views, unit="view") as progress:
            return agreement(onnx_runner(small, self.student), self.student, each_view(frames, progress))

    def priced(self, full: bytes, small: bytes) -> dict[str, Any]:
        """Return on which clips the accuracies of both forms were counted, and what they are by head."""
        splits = evaluation_splits(self.clip_set, self.record)
        frames = of_clips(self.student, self.clip_set, splits, most=PRICE_CLIPS)
        before, after = (onnx_runner(file, self.student) for file in (full, small))
        with Progress("accuracy in 8 bits", total=frames.clips, unit="clip") as progress:
            return {"frames": frames.told, "heads": price(before, after, each_clip(frames, progress))}


def checked(name: str, file: bytes, student: TrainedStudent, frames: Frames) -> Agreement:
    """Check a model file on frames; raises as `check`."""
    with Progress(f"checking {name}", total=frames.clips * frames.views, unit="view") as progress:
        return check(RUNNERS[name](file, student), student, each_view(frames, progress), what=name)


def each_clip(frames: Frames, progress: Progress) -> Iterator[ClipViews]:
    """Yield every clip, one after the other."""
    for clip in frames.read():
        yield clip
        progress.advance()


def each_view(frames: Frames, progress: Progress) -> Iterator[UInt8Array]:
    """Yield every view, uint8 (T, S, S, 3), of all clips, one after the other."""
    for clip in frames.read():
        for view in clip.pixels:
            yield view
            progress.advance()
