"""What a build would do, for people and for programs."""

from dataclasses import asdict, dataclass, field
from typing import Any

from mmkd.cache_tools.process.progress import duration
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import StorageError


@dataclass(frozen=True)
class SplitForecast:
    """What is to be done for one split."""

    clips: int
    """Rows."""
    views: int
    """Views of each clip."""
    shards: int
    """Shards of the finished cache."""
    shards_left: int
    """Those of which something has to be computed."""
    clips_left: int
    """Usable clips in them, counted once for each block of views: each pass decodes the clip."""
    unusable: int = 0
    """Rows that cannot be used: their video is missing or broken. They cost no time."""
    prepare_seconds: float = 0.0
    """Seconds of a clip, in one decoding process."""
    device_seconds: float = 0.0
    """Seconds of a clip, in the build's own process."""
    clip_seconds: float = 0.0
    """Seconds from one clip to the next."""
    shard_seconds: float = 0.0
    """Seconds of a whole shard."""


@dataclass(frozen=True)
class Sizes:
    """Bytes and objects of the cache."""

    bytes_per_view: dict[str, int]
    """Expert -> bytes of one view of one clip, before compression: logits of all heads and status."""
    raw_bytes: int
    """All arrays that a build fills, before compression; exact."""
    bytes: int
    """The finished cache, at most."""
    bytes_left: int
    """Of these to be written, at most."""
    objects_left: int
    """Objects to be written."""


@dataclass(frozen=True)
class Disk:
    """Where the cache will lie."""

    folder: str
    """The nearest folder that exists, or the URL of an object store."""
    free_bytes: int | None
    """Free space; None for an object store, which does not tell."""
    needed_bytes: int
    """What the cache takes there at most, each object in whole blocks of the file system."""
    bytes_per_second: float
    """Bytes a second of a large synced write."""
    object_seconds: float
    """Seconds of a small synced write."""
    writing_seconds: float
    """Time that writing the cache takes at this rate, one object after the other."""


@dataclass(frozen=True)
class PlanReport:
    """What a build would do."""

    out: str
    """The cache."""
    exists: bool
    """Whether it was started."""
    splits: dict[str, SplitForecast]
    """Split -> rows, shards, times."""
    sizes: Sizes
    """Bytes."""
    device: str
    """Kind of device that the experts run on, `cpu` or `cuda`."""
    workers: int
    """Decoding processes."""
    clips_per_second: float
    """Clips a second of one task."""
    seconds: float
    """Seconds of one task that does everything."""
    core_hours: float
    """Hours of all processor cores that are kept busy, together."""
    tasks: int
    """Tasks suggested."""
    disk: Disk
    """Whether there is room, and how fast it is written."""
    advice: list[str] = field(default_factory=list)
    """What to change before starting."""

    @property
    def gpu_hours(self) -> float:
        """Hours of a GPU; 0 on a CPU."""
        return self.seconds / 3600 if self.device == "cuda" else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self) | {"gpu_hours": self.gpu_hours}

    def lines(self) -> list[str]:
        """Return the report for people."""
        lines = [f"{self.out}: " + ("is there; what it lacks:" if self.exists else "would be a new cache:")]
        for name, split in self.splits.items():
            done = split.shards - split.shards_left
            lines.append(
                f"  {name}: {counted(split.clips, 'clip')} x {counted(split.views, 'view')}"
                + (f" ({split.unusable} unusable)" if split.unusable else "")
                + f", {counted(split.shards, 'shard')}, {done} done"
                + (f"; {split.shard_seconds:.1f} s a shard" if split.shards_left else "")
            )
        each = ", ".join(f"{name} {count} B" for name, count in self.sizes.bytes_per_view.items())
        lines.append(f"view      {each}, before compression")
        lines.append(
            f"size      arrays {size(self.sizes.raw_bytes)} before compression; cache at most "
            f"{size(self.sizes.bytes)}; to write {size(self.sizes.bytes_left)} in "
            f"{counted(self.sizes.objects_left, 'object')}"
        )
        if self.seconds:
            lines += self._time_lines()
        free = "" if self.disk.free_bytes is None else f"{size(self.disk.free_bytes)} free in "
        lines.append(
            f"disk      {free}{self.disk.folder}; writes "
            f"{size(self.disk.bytes_per_second)}/s, {1000 * self.disk.object_seconds:.1f} ms an object, "
            f"{duration(self.disk.writing_seconds)} in all"
        )
        return lines + [f"advice    {text}" for text in self.advice]

    def _time_lines(self) -> list[str]:
        left = [split for split in self.splits.values() if split.shards_left]
        passes = sum(split.clips_left for split in left)
        prepare, device = (
            1000 * sum(getattr(split, name) * split.clips_left for split in left) / passes
            for name in ("prepare_seconds", "device_seconds")
        )
        cost = f"{self.gpu_hours:.2g} GPU-hours, " if self.device == "cuda" else ""
        shards = sum(split.shards_left for split in left)
        return [
            f"speed     {self.clips_per_second:.1f} clips/s on {self.device}: prepare {prepare:.0f} ms in each of "
            f"{self.workers} workers, device {device:.0f} ms",
            f"time      {duration(self.seconds)} for {counted(passes, 'clip')} by one task: "
            f"{cost}{self.core_hours:.2g} "
            "core-hours",
            f"tasks     {self.tasks} of {duration(self.seconds / self.tasks)} and {shards / self.tasks:.0f} shards "
            "each",
        ]

    def check(self) -> None:
        """Raise StorageError when the disk cannot hold the cache."""
        if self.disk.free_bytes is not None and self.disk.needed_bytes > self.disk.free_bytes:
            raise StorageError(
                f"{self.out} needs up to {size(self.disk.needed_bytes)} more, and {size(self.disk.free_bytes)} are "
                f"free in {self.disk.folder}; free some space, or choose another place with -o or a smaller format "
                "with --precision"
            )


def size(count: float) -> str:
    """Return bytes as e.g. `1.4 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
