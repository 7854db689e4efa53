"""Which videos a command line names: files, folders and lists, each with the name of its result."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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

    @property
    def stamp(self) -> str:
        """Size and time of change; OSError when it is missing."""
        stat = Path(self.path).stat()
        return f"{stat.st_size}:{stat.st_mtime_ns}"


def find_videos(
    arguments: Sequence[str], *, lists: Sequence[Path] = (), class_folder: bool = False
) -> list[NamedVideo]:
    """Return the videos of files, folders (searched whole) and `@LIST` files (a path a line), in that order.

    A file's result has the file's name without its ending, as denseflow's, or with `class_folder` CLASS/NAME
    after the folder it lies in; a folder's videos keep their path below it. Raises InputError for what is not
    there and for two videos of one name.
    """
    found: list[NamedVideo] = []
    for argument in arguments:
        if argument.startswith("@"):
            found += _listed(Path(argument[1:]), class_folder)
        elif Path(argument).is_dir():
            found += _below(Path(argument))
        else:
            found.append(_file(Path(argument), class_folder))
    for path in lists:
        found += _listed(path, class_folder)
    found = list(dict.fromkeys(found))
    if not found:
        raise InputError("no video is named; give files, folders, or @LIST, a text file with a path on each line")
    _check_names(found)
    return found


def _file(path: Path, class_folder: bool) -> NamedVideo:
    whole = path.absolute()  # not resolved: a link's own name is the one that was chosen
    if not whole.is_file():
        raise InputError(f"video not found: {path}")
    return NamedVideo(f"{whole.parent.name}/{whole.stem}" if class_folder else whole.stem, str(whole))


def _below(folder: Path) -> list[NamedVideo]:
    whole = folder.absolute()
    paths = sorted(path for path in whole.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise InputError(f"no video lies below {folder}; known endings: {' '.join(sorted(SUFFIXES))}")
    return [NamedVideo(path.relative_to(whole).with_suffix("").as_posix(), str(path)) for path in paths]


def _listed(path: Path, class_folder: bool) -> list[NamedVideo]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"list of videos {path} cannot be read: {error}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                found.append(_file(Path(line.strip()), class_folder))
            except InputError as error:
                raise InputError(f"{path}:{number}: {error}") from error
    return found


def _check_names(videos: Sequence[NamedVideo]) -> None:
    by_name: dict[str, NamedVideo] = {}
    for video in videos:
        if any(part.startswith(".") for part in video.name.split("/")):
            raise InputError(f"{video.path}: a result cannot be called {video.name!r}; rename the video")
        other = by_name.setdefault(video.name, video)
        if other is not video:
            raise InputError(
                f"{other.path} and {video.path} would both be {video.name!r}; use --class-folder or name folders"
            )
    for video in videos:
        for depth in range(1, video.name.count("/") + 1):
            parent = "/".join(video.name.split("/")[:depth])
            if parent in by_name:
                raise InputError(
                    f"{by_name[parent].path} would lie where the folder of {video.path} does; rename one"
                )
