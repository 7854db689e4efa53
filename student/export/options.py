"""What an export may be asked for beside its run and its folder."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmkd.cache_tools.frames.clip_set import DataRecipe
from mmkd.data_manifests.errors import InputError
from mmkd.student.export.card_text import UNKNOWN

CARD_TEXT_FILE = "README.md"
ONNX_FILE, PT2_FILE, INT8_FILE = "model.onnx", "model.pt2", "model.int8.onnx"
FORMATS = {"onnx": (ONNX_FILE,), "pt2": (PT2_FILE,), "both": (ONNX_FILE, PT2_FILE)}
"""What --format takes -> the files that it makes."""
LICENSE = re.compile("[a-z0-9][a-z0-9.-]*")


@dataclass(frozen=True)
class ExportOptions:
    """What to write, what to try it on, and what to measure."""

    format: str = "onnx"
    """A key of `FORMATS`."""
    check: Sequence[Path] = ()
    """Videos whose frames the files are checked with."""
    data: DataRecipe | None = None
    """Manifest and videos whose evaluation clips they are checked with."""
    int8: bool = False
    """Whether to write `INT8_FILE`, too: training clips of `data` set its ranges, the others tell its price."""
    latency: bool = True
    """Whether to measure times and memory on this machine."""
    license: str = UNKNOWN
    """Identifier of the licence, as Hugging Face's hub has them: lower case, such as apache-2.0."""
    trusted: Collection[str] = ()
    """Networks that are not mmkd's and may run."""

    def __post_init__(self) -> None:
        """Raise InputError for options that exclude each other, and for a licence that is no identifier."""
        if self.check and self.data is not None:
            raise InputError(
                "give --check or --manifest, not both: each says which frames the files are checked with"
            )
        if self.int8 and (self.data is None or ONNX_FILE not in self.files):
            raise InputError(
                "--int8 needs --manifest and --videos, whose training clips set its ranges and whose other clips "
                "tell what it costs, and --format onnx or both"
            )
        if not LICENSE.fullmatch(self.license):
            raise InputError(
                f"--license {self.license!r} is no identifier of a licence: lower case, such as apache-2.0, "
                "cc-by-nc-4.0, or other"
            )

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files in 32 bits."""
        return FORMATS[self.format]
