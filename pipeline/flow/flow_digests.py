"""What tells a data set's flow files apart: one hash for an expert's fingerprint, of content and never of paths.

Of each video it covers how many fields there are and all bytes of five of them, so it costs ten pictures a video
(100 kB at 340 x 256) beside the list of its files; what changes in the others alone goes unnoticed. Videos
without flow do not count: their clips have a status. Caches of earlier versions keep the hash that they have, which
covers the sizes of three fields and names videos without flow.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from mmkd.cache_tools.frames.clip_set import ClipVideo, ClipVideos
from mmkd.cache_tools.process.progress import Progress
from mmkd.data_manifests.errors import InputError, VideoError
from mmkd.pipeline.flow.flow_files import FlowFiles
from mmkd.pipeline.missing import FlowMissingError
from mmkd.pipeline.recipe import FlowRecipe

BY_CONTENT = "content-1"
"""Begins every digest of this version."""
BY_SIZES = "sizes"
"""How earlier versions made them; theirs have no beginning of their own."""


def rules_of(digest: str) -> str:
    """Return how a stored digest was made."""
    return BY_CONTENT if digest.startswith(f"{BY_CONTENT}:") else BY_SIZES


class FlowDigests:
    """The identities of the flow of all clips that a command reads, each asked for once."""

    def __init__(self, files: FlowFiles, splits: Sequence[Iterable[ClipVideo | VideoError]]) -> None:
        """Ask nothing yet."""
        self.files = files
        self._splits = splits
        self._found: dict[str, Mapping[str, str]] = {}

    def digest(
        self, rules: str = BY_CONTENT, *, absent: Collection[str] = (), unknown: Collection[str] = ()
    ) -> str:
        """Return the hash over all flow, as if that of the sources `absent` were not there.

        And as if the videos of the sources `unknown` were not readable. Raises InputError where no video has flow:
        another folder was meant, or its disk is not there.
        """
        left = set(absent) | set(unknown)
        found = self.identities(rules)
        if rules == BY_CONTENT:
            lines = (f"{key} {value}" for key, value in sorted(found.items()) if value and key not in left)
            return f"{BY_CONTENT}:{_sha256(lines)}"
        known = ((key, value) for key, value in sorted(found.items()) if key not in unknown)
        return _sha256(f"{key} {'' if key in left else value}" for key, value in known)

    def identities(self, rules: str = BY_CONTENT) -> Mapping[str, str]:
        """Return source -> identity of its flow, empty where there is none; raises as `digest`."""
        if rules not in self._found:
            self._found[rules] = self._ask(self.files.check if rules == BY_CONTENT else self.files.check_sizes)
        return self._found[rules]

    def _ask(self, check: Callable[[ClipVideo], str]) -> dict[str, str]:
        found: dict[str, str] = {}
        first = ""
        sources = {self.files.source_of(item): item for item in self._items()}
        with Progress("looking at flow", total=len(sources), unit="video") as progress:
            for key, item in sources.items():
                try:
                    found[key] = check(item)
                except FlowMissingError as error:
                    found[key] = ""
                    first = first or f"{item.clip.video}: {error}"
                progress.advance()
        if found and not any(found.values()):
            path = self.files.files.path
            raise InputError(f"no video has flow in {path} (--flow-files, flow.files.path); the first, {first}")
        return found

    def _items(self) -> Iterator[ClipVideo]:
        return (item for items in self._splits for item in items if not isinstance(item, VideoError))


def digest_of_clips(recipe: FlowRecipe, items: Iterable[ClipVideo | VideoError]) -> str | None:
    """Return the hash over the flow files of some clips; None where flow is computed."""
    return None if recipe.files is None else FlowDigests(FlowFiles(recipe.files, recipe), [items]).digest()


def sources_of(files: FlowFiles, items: ClipVideos, rows: Collection[int]) -> set[str]:
    """Return the sources of some rows' flow, of those whose video can be read."""
    clips = (items[row] for row in rows)
    return {files.source_of(item) for item in clips if not isinstance(item, VideoError)}


def _sha256(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
