"""Exporting a finished run into a folder of its own: model files, each checked, and their card."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
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
from mmkd.student.export.check import Agreement, check, onnx_runner
from mmkd.student.export.folder import recover, refuse_foreign, whole_path, write_folder
from mmkd.student.export.latency import measured
from mmkd.student.export.onnx_file import onnx_bytes, refuse_large, require_onnx
from mmkd.student.export.options import CARD_TEXT_FILE, ONNX_FILE, PT2_FILE, ExportOptions
from mmkd.student.export.program import exported_program
from mmkd.student.export.pt2_file import pt2_bytes, pt2_runner
from mmkd.student.export.real_frames import Frames, noise, of_clips, of_videos

RUNNERS = {ONNX_FILE: onnx_runner, PT2_FILE: pt2_runner}
CHECK_CLIPS = 16
"""Clips of a manifest through which a file is checked, at most."""
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
        files = model_files(student, options.files, describe(record, student))
        with stop.at_once(NOTHING):
            found = {name: asdict(checked(name, file, student, frames)) for name, file in files.items()}
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
    train = record.recipe.get("train_split")
    splits = [name for name in clip_set.manifest.splits if name != train]
    if not splits:
        raise InputError(f"{options.data.manifest} has no split but {train!r}, which the student learned from")
    return of_clips(student, clip_set, splits, most=CHECK_CLIPS)


def checked(name: str, file: bytes, student: TrainedStudent, frames: Frames) -> Agreement:
    """Check a model file on frames; raises as `check`."""
    with Progress(f"checking {name}", total=frames.clips * frames.views, unit="view") as progress:
        return check(RUNNERS[name](file, student), student, each_view(frames, progress), what=name)


def each_view(frames: Frames, progress: Progress) -> Iterator[UInt8Array]:
    """Yield every view, uint8 (T, S, S, 3), of all clips, one after the other."""
    for clip in frames.read():
        for view in clip.pixels:
            yield view
            progress.advance()
