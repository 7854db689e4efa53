"""Which videos a command line names: files, folders and lists, each with the name of its result."""

import codecs
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mmkd.data_manifests.atomic import storage_errors
from mmkd.data_manifests.errors import InputError

SUFFIXES = frozenset(
    {".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".flv", ".wmv", ".asf", ".ogv", ".ogg", ".3gp", ".3g2", ".ts"}
)
"""Endings that make a file in a folder a video; a file that is named is taken whatever it is called."""


@dataclass(frozen=True)
class NamedVideo:
    """A video and what its result is called."""

    name: str
    """Name below the output, `/` between folders."""
    path: str
    """Whole path of the file."""
    was_named: bool = True
    """Whether the file itself was named, and not a folder that it lies in."""

    @property
    def stamp(self) -> str:
        """Size and time of change; OSError when it is missing."""
        stat = Path(self.path).stat()
        return f"{stat.st_size}:{stat.st_mtime_ns}"


@dataclass(frozen=True)
class Naming:
    """How results are called after their videos."""

    class_folder: bool = False
    """CLASS/NAME for a file, CLASS the folder it lies in; as denseflow's `-cf`."""
    keep_ending: bool = False
    """NAME.mp4 in place of NAME."""

    def of_file(self, path: Path) -> str:
        """Return the result's name of a file that was named."""
        name = path.name if self.keep_ending else path.stem
        return f"{path.parent.name}/{name}" if self.class_folder else name

    def below(self, path: Path) -> str:
        """Return the result's name of a file found in a folder, `path` being relative to that."""
        return (path if self.keep_ending else path.with_suffix("")).as_posix()


PLAIN = Naming()


def find_videos(
    arguments: Sequence[str], *, lists: Sequence[Path] = (), naming: Naming = PLAIN
) -> list[NamedVideo]:
    """Return videos as `named_videos`, each once; InputError for two whose results would have one name, too."""
    return _without_repeats(named_videos(arguments, lists=lists, naming=naming), naming)


def named_videos(
    arguments: Sequence[str], *, lists: Sequence[Path] = (), naming: Naming = PLAIN
) -> list[NamedVideo]:
    """Return the videos of files, folders (searched whole) and `@LIST` files (a path a line), in that order.

    A file's result is called by `naming`; a folder's videos keep their path below it. Raises InputError for what
    is not there, StorageError for a folder that cannot be read.
    """
    found: list[NamedVideo] = []
    for argument in arguments:
        if argument.startswith("@"):
            found += _listed(Path(argument[1:]), naming)
        elif Path(argument).is_dir():
            found += _below(Path(argument), naming)
        else:
            found.append(_file(Path(argument), naming))
    for path in lists:
        found += _listed(path, naming)
    if not found:
        raise InputError("no video is named; give files, folders, or @LIST, a text file with a path on each line")
    return found


def _file(path: Path, naming: Naming) -> NamedVideo:
    whole = path.absolute()  # not resolved: a link's own name is the one that was chosen
    if not whole.is_file():
        raise InputError(f"video not found: {path}")
    return NamedVideo(naming.of_file(whole), str(whole))


def _below(folder: Path, naming: Naming) -> list[NamedVideo]:
    whole = folder.absolute()
    paths = sorted(path for path in _walk(whole) if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise InputError(f"no video lies below {folder}; known endings: {' '.join(sorted(SUFFIXES))}")
    return [NamedVideo(naming.below(path.relative_to(whole)), str(path), was_named=False) for path in paths]


def _walk(top: Path) -> Iterator[Path]:
    """Yield the files below a folder, linked ones and those in linked folders included, hidden ones not.

    Each folder is entered once, however many links lead to it: so a link to a folder above it ends, and folders
    that link to each other do not multiply. Links wait until the folders proper are done, whose names come first.
    A link to nothing is yielded: it is a video that is missing, and is to be named as one.
    """
    folders, linked, entered = deque([top]), deque[Path](), set[tuple[int, int]]()
    while folders or linked:
        folder = folders.popleft() if folders else linked.popleft()
        with storage_errors(folder, verb="read"):
            status = folder.stat()
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = Path(entry.path)
            if path.is_dir():
                (linked if path.is_symlink() else folders).append(path)
            elif path.is_file() or not path.exists():  # a pipe is neither, a link to nothing the latter
                yield path


def _listed(path: Path, naming: Naming) -> list[NamedVideo]:
    found = []
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            # As it stands, if that is there: a name may begin or end with a space.
            name = line if Path(line).is_file() else line.strip()
            try:
                found.append(_file(Path(name), naming))
            except InputError as error:
                raise InputError(f"{path}:{number}: {error}") from error
    return found


def _lines(path: Path) -> list[str]:
    """Return a list's lines, of Unix or Windows, with or without a byte order mark; names may be any bytes."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"list of videos {path} cannot be read: {error.strerror}") from error
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        with suppress(UnicodeDecodeError):
            data = data.decode("utf-16").encode()
    if b"\0" in data:
        raise InputError(f"list of videos {path} is not a text file; give one with a video's path on each line")
    # The file system's own decoding, so that a name that is not UTF-8 is found.
    text = os.fsdecode(data.removeprefix(codecs.BOM_UTF8))
    return [line.removesuffix("\r") for line in text.split("\n")]


def _without_repeats(videos: Sequence[NamedVideo], naming: Naming) -> list[NamedVideo]:
    """Return the videos, each once; raise InputError for two of one name and for names that no result may have."""
    by_name: dict[str, NamedVideo] = {}
    for video in videos:
        if any(part.startswith(".") for part in video.name.split("/")):
            raise InputError(
                f"{video.path} is a hidden file; leave it out, or give it a name that does not begin with a dot"
            )
        other = by_name.setdefault(video.name, video)
        if other is not video and not _same_file(other, video):
            advice = _advice(other, video, naming)
            raise InputError(f"{other.path} and {video.path} would both be {video.name!r}; {advice}")
    for video in by_name.values():
        for depth in range(1, video.name.count("/") + 1):
            parent = "/".join(video.name.split("/")[:depth])
            if parent in by_name:
                raise InputError(
                    f"{by_name[parent].path} would lie where the folder of {video.path} does; rename one"
                )
    return list(by_name.values())


def _same_file(one: NamedVideo, other: NamedVideo) -> bool:
    try:
        return one.path == other.path or Path(one.path).samefile(other.path)
    except OSError:
        return False


def _advice(one: NamedVideo, other: NamedVideo, naming: Naming) -> str:
    """Return what tells two videos of one name apart."""
    first, second = Path(one.path), Path(other.path)
    if first.suffix != second.suffix and not naming.keep_ending:
        return "give --keep-ending, and their results keep the endings"
    if one.was_named and other.was_named and not naming.class_folder and first.parent.name != second.parent.name:
        return "give --class-folder, and they are called after their folders, too"
    above = os.path.commonpath([first.parent, second.parent])
    return f"name the folder {above}, and results keep the paths below it; or rename one"
