"""Frames as picture files in a folder or in a tar archive: numbered without a gap, from 0 or 1.

Official frames of EPIC-KITCHENS are `frame_0000000001.jpg` and on; other programs write `img_00001.jpg` or
`0001.jpg`. Frame i of a video is the i-th in the order of the numbers. A tar archive is not unpacked: its headers
are read once, and a frame where it lies. It gives up compressed archives, in which nothing can be found without
unpacking.
"""

import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mmkd.cache_tools.frames.stills import FOLDER, MAX_FRAME_BYTES, TAR, StillFrames
from mmkd.data_manifests.errors import VideoError
from mmkd.data_manifests.regular_file import open_regular, read_regular

FRAME_NAME = re.compile(r"(.*?)([0-9]{1,18})\.(jpe?g|png)", re.IGNORECASE)
TAR_SUFFIX = ".tar"
BLOCK_BYTES = 512
COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7z": "unxz", b"(\xb5/": "unzstd"}
"""First bytes of a compressed file -> what unpacks it."""


def in_order(names: Iterable[str]) -> list[str]:
    """Return the names of frames in the order of their numbers; other names are passed over.

    Raises VideoError where there is none, a number is missing or there twice, they do not begin at 0 or 1, or there
    are frames of several kinds.
    """
    found: dict[int, str] = {}
    kinds: Counter[str] = Counter()
    for name in names:
        own = PurePosixPath(name).name
        match = FRAME_NAME.fullmatch(own)
        if match is None or own.startswith("."):
            continue
        kinds[f"{match[1]}N.{match[3]}"] += 1
        if (number := int(match[2])) in found and len(kinds) == 1:
            raise VideoError(f"frame {number} is there twice: {found[number]} and {name}")
        found[number] = name
    if not found:
        raise VideoError("no frame: none of its files is named like frame_0000000001.jpg")
    if len(kinds) > 1:
        raise VideoError(f"frames of several kinds: {', '.join(kind for kind, _ in kinds.most_common(3))}")
    numbers = sorted(found)
    if numbers[0] not in (0, 1):
        raise VideoError(f"its first frame is {found[numbers[0]]}; frames are counted from 0 or 1")
    if numbers[-1] - numbers[0] + 1 != len(numbers):
        missing = next(number for place, number in enumerate(numbers, numbers[0]) if number != place) - 1
        raise VideoError(f"a frame is missing before {found[missing + 1]}")
    return [found[number] for number in numbers]


@dataclass(frozen=True)
class FolderFrames(StillFrames):
    """Picture files of one folder."""

    folder: Path
    """Where they lie."""
    names: list[str]
    """(frames,) their names, in order."""
    kind = FOLDER

    @classmethod
    def open(cls, folder: Path) -> "FolderFrames":
        """List a folder; raises as `in_order`, and OSError where the machine cannot."""
        with os.scandir(folder) as entries:
            return cls(folder, in_order([entry.name for entry in entries]))

    @property
    def count(self) -> int:
        """Number of frames."""
        return len(self.names)

    def read(self, frame: int) -> bytes:
        """Return a frame's file."""
        return read_regular(self.folder / self.names[frame])

    def name(self, frame: int) -> str:
        """Return a frame's file name."""
        return self.names[frame]

    def size_bytes(self, frame: int) -> int:
        """Return the size of a frame's file."""
        return (self.folder / self.names[frame]).stat().st_size


@dataclass(frozen=True)
class TarFrames(StillFrames):
    """Picture files of a tar archive."""

    path: Path
    """The archive."""
    names: list[str]
    """(frames,) their names, in order."""
    places: list[tuple[int, int]]
    """(frames,) where each begins in the archive, and how long it is, in bytes."""
    kind = TAR

    @classmethod
    def open(cls, path: Path) -> "TarFrames":
        """Read the headers of an archive; VideoError where it is none, compressed, cut short or not in order."""
        members = tar_members(path)
        names = in_order(members)
        return cls(path, names, [members[name] for name in names])

    @property
    def count(self) -> int:
        """Number of frames."""
        return len(self.names)

    def read(self, frame: int) -> bytes:
        """Return a frame's file; VideoError where the archive ends before it does."""
        begin, size = self.places[frame]
        with open_regular(self.path) as file:
            file.seek(begin)
            data = file.read(size)
        if len(data) < size:
            raise VideoError(f"frame {self.names[frame]}: the archive is cut short")
        return data

    def name(self, frame: int) -> str:
        """Return a frame's name in the archive."""
        return self.names[frame]

    def size_bytes(self, frame: int) -> int:
        """Return the size of a frame's file."""
        return self.places[frame][1]


def tar_members(path: Path) -> dict[str, tuple[int, int]]:
    """Return name -> (place, size) of the regular files of an archive: links, devices and folders are passed
    over."""
    with open_regular(path) as file:
        head = file.read(8)
    if unpack := next((tool for magic, tool in COMPRESSED.items() if head.startswith(magic)), None):
        raise VideoError(f"the archive is compressed; unpack it first: {unpack} {path.name}")
    size = path.stat().st_size
    members: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(path, "r:", errorlevel=1) as archive:
            for member in archive:
                if member.size < 0:  # tarfile would step back, and come by for ever
                    raise VideoError(f"the header of {member.name} is damaged: its size is {member.size}")
                if member.isreg() and member.size <= MAX_FRAME_BYTES:
                    members[member.name] = member.offset_data, member.size
                if member.offset_data + member.size > size:
                    raise VideoError(f"the archive is cut short in {member.name}")
                archive.members.clear()  # type: ignore[attr-defined]  # it keeps every header otherwise
            end = archive.offset
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise VideoError(f"no tar archive, or a damaged one: {error}") from error
    # A header that is damaged ends the list for tarfile as the empty block does that should: look which it was.
    with open_regular(path) as file:
        file.seek(end)
        block = file.read(BLOCK_BYTES)
    if block.strip(b"\0") or size % BLOCK_BYTES:
        raise VideoError("the archive is cut short, or one of its headers is damaged")
    return members
