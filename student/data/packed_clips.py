"""Clips as columns, for the processes that read them: a million are shared by all, and not copied to each."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mmkd.cache_tools.frames.clip_set import ClipVideo
from mmkd.cache_tools.frames.records import ClipFacts, Float64Array, VideoFacts, facts_table
from mmkd.data_manifests.manifest import Clip
from mmkd.student.data.shared_arrays import SharedArrays, SharedTexts, text_arrays


class PackedClips(Sequence[ClipVideo]):
    """The clips of a data set with all that reading them takes: neither labels, splits nor groups.

    A process that it is sent to maps the columns, and makes a record when one is asked for.
    """

    def __init__(self, clips: Sequence[ClipVideo]) -> None:
        """Copy what is known of clips into columns."""
        numbers: dict[str, int] = {}
        videos: list[VideoFacts] = []
        video = np.zeros(len(clips), np.int32)
        for row, item in enumerate(clips):
            number = video[row] = numbers.setdefault(item.clip.video, len(numbers))
            if number == len(videos):
                videos.append(item.video)
        ends = np.zeros(len(videos) + 1, np.int64)
        np.cumsum([facts.frame_count for facts in videos], out=ends[1:])
        self._decoders = tuple(dict.fromkeys(facts.decoder for facts in videos))
        times = [facts.times_seconds for facts in videos]
        self._arrays = SharedArrays.of(
            {
                "video": video,
                "facts": facts_table([item.facts for item in clips]),
                "size": np.array([(facts.width, facts.height) for facts in videos], np.int32).reshape(-1, 2),
                "decoder": np.array([self._decoders.index(facts.decoder) for facts in videos], np.int16),
                "times": np.concatenate(times) if times else np.zeros(0),
                "times.ends": ends,
                **text_arrays("clip_id", [item.clip.clip_id for item in clips]),
                **text_arrays("name", list(numbers)),
                **text_arrays("identity", [facts.identity for facts in videos]),
            }
        )
        self._open()

    def _open(self) -> None:
        arrays = dict(self._arrays)
        self._columns = arrays
        self.clip_ids: Sequence[str] = SharedTexts(arrays, "clip_id")
        self._names, self._identities = SharedTexts(arrays, "name"), SharedTexts(arrays, "identity")

    def __getstate__(self) -> tuple[Any, ...]:
        """Hand over the columns."""
        return self._arrays, self._decoders

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Map the columns."""
        self._arrays, self._decoders = state
        self._open()

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self._columns["video"])

    def __getitem__(self, row: Any) -> Any:
        """Return a clip with its facts; it has no labels, and its split is called `packed`."""
        columns = self._columns
        number = int(columns["video"][row])
        width, height = columns["size"][number].tolist()
        video = VideoFacts(
            width,
            height,
            self._times(number),
            self._decoders[columns["decoder"][number]],
            self._identities[number],
        )
        clip = Clip(self.clip_ids[row], self._names[number], "packed", {})
        return ClipVideo(clip, video, ClipFacts(*columns["facts"][row].tolist()))

    def _times(self, number: int) -> Float64Array:
        start, end = self._columns["times.ends"][number : number + 2].tolist()
        found: Float64Array = self._columns["times"][start:end]
        return found

    def __iter__(self) -> Iterator[ClipVideo]:
        """Yield every clip."""
        return (self[row] for row in range(len(self)))
