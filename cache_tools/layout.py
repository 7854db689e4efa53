"""Every key, array name, shape and block of a cache, in one place.

CACHE/
  init.json                      what was asked for: recipe, fingerprints, blocks, hashes of the static objects
  targets.zarr/                  one Zarr v3 group
    <split>/clip_id              (rows,) string        written by init, as are all up to `flip`
    <split>/label/<head>         (rows,) int64         -1 where absent
    <split>/video_identity       (rows,) string        hash of the video's packets, empty if unreadable
    <split>/facts                (rows, 4) int32       width, height, first frame, frame count; 0 if unreadable
    <split>/frame_index          (rows, views, T) int32
    <split>/crop_xywh            (rows, views, 4) int32
    <split>/flip                 (rows, views) bool
    <split>/thumbprint/hash      (padded rows, views) uint64           written shard by shard, as is all below
    <split>/thumbprint/thumbnail (padded rows, views, 144) uint8
    <split>/<expert>/logits/<head>   (padded rows, views, classes) float16, minus the row's maximum; or packed bytes
    <split>/<expert>/maximum/<head>  (padded rows, views) float32; packed logits have <split>/<expert>/range, too
    <split>/<expert>/status          (padded rows, views) uint8, see Status
  commits/<split>/<node>/<fingerprint>/<row block>-<view block>.json   the commit records; a node is `thumbprint`
                                 or an expert, the folder after it the start of its fingerprint
  index.jsonl                    all commit records in one object, so that a reader opens three
  root.json                      written last: hashes of init.json and index.jsonl; readers start here
  journal/                       hosts, times and rates; the only part that differs from build to build
  tasks/, claims/, .tmp/         who is at work on what; gone when the build is finished
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum

from mmkd.data_manifests.typed_json import STRICT

SCHEMA = "mmkd-cache-2"
THUMBPRINT = "thumbprint"
INIT, ROOT, INDEX = "init.json", "root.json", "index.jsonl"
GROUP, COMMITS, CLAIMS, TASKS, JOURNAL = "targets.zarr", "commits", "claims", "tasks", "journal"
RESERVED_NAMES = {THUMBPRINT, "clip_id", "label", "video_identity", "facts", "frame_index", "crop_xywh", "flip"}
"""Names beside the experts' within a split: no expert may have one."""
OBJECT_KEY = re.compile(r"(?:\w+/)*(?:zarr\.json|c(?:/\d+)+)")
"""What a key within the group looks like; names of splits, experts and heads are identifiers."""
VIEW_ARRAYS = {"frame_index", "crop_xywh", "flip"}
"""The static arrays whose second axis is the view."""
TASK_ID = r"[0-9a-f]*-[0-9]+-[0-9]*-[0-9a-f]{8}"
"""Pattern of the id of a task, see mmkd.cache_tools.tasks.heartbeat."""
TEMPORARY = ".tmp"
"""Folder of what is being written; below it, one for each writer."""
WRITER = re.compile(rf"{TASK_ID}|[0-9a-f]{{16}}")
"""Names of writers: tasks, and others that write a little."""
_ARRAY = (
    r"\w+/(clip_id|video_identity|facts|frame_index|crop_xywh|flip|label/\w+|thumbprint/(hash|thumbnail)"
    r"|\w+/status|\w+/(logits|maximum|range)/\w+)"
)
_OWN_KEYS = re.compile(
    rf"{INIT}|{ROOT}|{INDEX}"
    rf"|{GROUP}/(\w+/){{0,3}}zarr\.json"  # of the group, a split, and what is within
    rf"|{GROUP}/{_ARRAY}/(zarr\.json|c(/[0-9]+)+)"
    rf"|{COMMITS}/\w+/\w+/[0-9a-f]{{16}}/[0-9]+-[0-9]+\.json"
    rf"|{CLAIMS}/(init|\w+/[0-9]+-[0-9]+)/[0-9]{{1,18}}\.json"
    rf"|{TASKS}/{TASK_ID}\.json"
    rf"|{JOURNAL}/{TASK_ID}-[0-9]+\.jsonl"
)


class Status(IntEnum):
    """What became of one row x view for one expert."""

    OK = 0
    DECODE_FAILED = 1
    BOXES_MISSING = 2
    FLOW_FAILED = 3
    NON_FINITE = 4
    SOUND_MISSING = 5
    NOT_COMPUTED = 255


@dataclass(frozen=True)
class SplitLayout:
    """Rows, views and blocks of one split."""

    __pydantic_config__ = STRICT
    name: str
    """Name of the split."""
    rows: int
    """Number of clips."""
    views: int
    """Number of views of each clip."""
    shard_rows: int
    """Rows of a shard; rows are padded to whole shards."""
    shard_views: int
    """Views of a shard; divides `views`."""

    def __post_init__(self) -> None:
        """Raise ValueError for no identifier as name, an empty split, or blocks that do not tile the views."""
        if not self.name.isidentifier():
            raise ValueError(f"{self.name!r} cannot name a split")
        if min(self.rows, self.views, self.shard_rows, self.shard_views) < 1 or self.views % self.shard_views:
            raise ValueError(
                f"split {self.name!r}: {self.shard_rows} rows x {self.shard_views} views do not tile "
                f"{self.rows} rows x {self.views} views"
            )

    @property
    def padded_rows(self) -> int:
        """Rows rounded up to whole shards."""
        return -(-self.rows // self.shard_rows) * self.shard_rows

    def shards(self) -> Iterator["Shard"]:
        """Yield the shards in the order in which one task computes them."""
        for view_block in range(self.views // self.shard_views):
            for row_block in range(self.padded_rows // self.shard_rows):
                yield Shard(self, row_block, view_block)


@dataclass(frozen=True)
class Shard:
    """A block of rows x views of one split, written whole."""

    split: SplitLayout
    """The split that it belongs to."""
    row_block: int
    """Position along the rows, in blocks."""
    view_block: int
    """Position along the views, in blocks."""

    @property
    def rows(self) -> range:
        """The rows that hold clips (the last shard may be padded beyond them)."""
        start = self.row_block * self.split.shard_rows
        return range(start, min(start + self.split.shard_rows, self.split.rows))

    @property
    def views(self) -> range:
        """The view numbers."""
        start = self.view_block * self.split.shard_views
        return range(start, start + self.split.shard_views)

    @property
    def name(self) -> str:
        """Name in commit records and messages, e.g. `train/3-0`."""
        return f"{self.split.name}/{self.row_block}-{self.view_block}"


def require_safe_keys(keys: Iterable[str]) -> None:
    """Raise ValueError for a key within the group that could name anything else than one of its objects."""
    if bad := next((key for key in keys if not OBJECT_KEY.fullmatch(key)), None):
        raise ValueError(f"objects: {bad[:100]!r} is not the key of an object")


def is_own_key(key: str) -> bool:
    """Return whether a cache of this schema can have an object of that key; what it cannot have is somebody else's.

    Names of splits, experts and heads are identifiers, so that nothing else looks like an array.
    """
    return _OWN_KEYS.fullmatch(key) is not None


def is_own_name(name: str) -> bool:
    """Return whether a cache has a file or folder of that name at its top."""
    return name in (INIT, ROOT, INDEX, GROUP, COMMITS, CLAIMS, TASKS, JOURNAL, TEMPORARY)


def own_keys(keys: Iterable[str], folder: str) -> list[str]:
    """Return those of `keys` that a cache can have in one of its folders; strangers are passed over."""
    return [key for key in keys if key.startswith(f"{folder}/") and is_own_key(key)]


def group_key(key: str) -> str:
    """Return the store's key of an object of the Zarr group."""
    return f"{GROUP}/{key}"


def commit_key(shard: Shard, node: str, fingerprint: str) -> str:
    """Return the key of the commit record of one node (thumbprint or expert) of one shard."""
    return f"{node_commits(shard.split.name, node, fingerprint)}/{shard.row_block}-{shard.view_block}.json"


def node_commits(split: str, node: str, fingerprint: str) -> str:
    """Return the folder of a node's commit records."""
    return f"{COMMITS}/{split}/{node}/{fingerprint[:16]}"


def block_key(array: str, shard: Shard, dimensions: int) -> str:
    """Return the key, within the group, of a shard's one object in an array of that many dimensions."""
    trailing = "/0" * (dimensions - 2)
    return f"{array}/c/{shard.row_block}/{shard.view_block}{trailing}"


def thumbprint_arrays(split: str) -> tuple[str, str]:
    """Return the names of the thumbprint arrays of a split: hash, thumbnail."""
    return f"{split}/{THUMBPRINT}/hash", f"{split}/{THUMBPRINT}/thumbnail"


def part_array(split: str, expert: str, part: str, *, head: str) -> str:
    """Return the name of one of the arrays of an expert's logits (see mmkd.cache_tools.cache.logit_formats)."""
    return f"{split}/{expert}/{part}/{head}"


def status_array(split: str, expert: str) -> str:
    """Return the name of an expert's status array."""
    return f"{split}/{expert}/status"


def label_array(split: str, head: str) -> str:
    """Return the name of a label array."""
    return f"{split}/label/{head}"
