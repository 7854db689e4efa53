"""Exporting a finished run into a folder of its own: model files, each checked, and their card."""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmkd.cache_tools.frames.clip_set import ClipSet, DataRecipe
from mmkd.cache_tools.frames.records import UInt8Array
from mmkd.cache_tools.process.interrupt import stop_on_signals
from mmkd.cache_tools.process.progress import Progress
from mmkd.data_manifests.errors import InputError
from mmkd.student.evaluation.run_files import RunRecord, read_run
from mmkd.student.evaluation.trained import TrainedStudent, load_student
from mmkd.student.export.card import card_of, describe
from mmkd.student.export.card_text import UNKNOWN, card_text
from mmkd.student.export.check import Agreement, check, onnx_runner
from mmkd.student.export.folder import recover, refuse_foreign, whole_path, write_folder
from mmkd.student.export.onnx_file import onnx_bytes, refuse_large, require_onnx
from mmkd.student.export.program import exported_program
from mmkd.student.export.pt2_file import pt2_bytes, pt2_runner
from mmkd.student.export.real_frames import Frames, noise, of_clips, of_videos

CARD_TEXT_FILE = "README.md"
ONNX_FILE, PT2_FILE = "model.onnx", "model.pt2"
FORMATS = {"onnx": (ONNX_FILE,), "pt2": (PT2_FILE,), "both": (ONNX_FILE, PT2_FILE)}
"""What --format takes -> the files that it makes."""
RUNNERS = {ONNX_FILE: onnx_runner, PT2_FILE: pt2_runner}
CHECK_CLIPS = 16
"""Clips of a manifest through which a file is checked, at most."""
NOTHING = "nothing was written"
LICENSE = re.compile("[a-z0-9][a-z0-9.-]*")


@dataclass(frozen=True)
class ExportOptions:
    """What an export is asked for beside its run and its folder."""

    format: str = "onnx"
    """A key of `FORMATS`."""
    check: Sequence[Path] = ()
    """Videos whose frames the files are checked with."""
    data: DataRecipe | None = None
    """Manifest and videos whose evaluation clips they are checked with."""
    license: str = UNKNOWN
    """Identifier of the licence, as Hugging Face's hub has them: lower case, such as apache-2.0."""
    trusted: Collection[str] = ()
    """Networks that are not mmkd's and may run."""

    def __post_init__(self) -> None:
        """Raise InputError for both kinds of frames, and for a licence that is no identifier."""
        if self.check and self.data is not None:
            raise InputError(
                "give --check or --manifest, not both: each says which frames the files are checked with"
            )
        if not LICENSE.fullmatch(self.license):
            raise InputError(
                f"--license {self.license!r} is no identifier of a licence: lower case, such as apache-2.0, "
                "cc-by-nc-4.0, or other"
            )


def export_run(run: Path, out: Path, options: ExportOptions = ExportOptions()) -> dict[str, Any]:
    """Write the student of a finished run into the folder `out`, whole or not at all; return its card.

    Raises InputError for a folder with other contents, frames that cannot be read, and as `load_student`,
    `exported_program` and `onnx_bytes`; VerificationError as `check`; InterruptedByUserError at a stop signal.
    """
    out = whole_path(out)
    names = FORMATS[options.format]
    if ONNX_FILE in names:
        require_onnx()
    recover(out)
    refuse_foreign(out)
    record, student = read_run(run), load_student(run, trusted=options.trusted)
    if ONNX_FILE in names:
        refuse_large(student)
    card = card_of(run, record, student, options.license)
    with stop_on_signals() as stop:
        frames = frames_to_check(student, record, options)
        files = model_files(student, names, describe(record, student))
        with stop.at_once(NOTHING):
            found = {name: asdict(checked(name, file, student, frames)) for name, file in files.items()}
        card["check"] = {"frames": frames.told, "real": frames.real, "files": found}
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
