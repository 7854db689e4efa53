"""`init.json`: what a cache was asked to hold; the contract between the two commands.

It is written once when a cache starts, and again when it grows; every reader and writer of a cache begins with it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmkd.cache_tools.cache.array_forms import split_forms, static_keys
from mmkd.cache_tools.cache.arrays import ArrayForm
from mmkd.cache_tools.cache.fingerprints import fingerprint
from mmkd.cache_tools.cache.logit_formats import format_of
from mmkd.cache_tools.cache.sealed import SEAL, damaged, open_seal, seal
from mmkd.cache_tools.layout import (
    COMMITS,
    INIT,
    RESERVED_NAMES,
    SCHEMA,
    THUMBPRINT,
    Shard,
    SplitLayout,
    commit_key,
    require_safe_keys,
)
from mmkd.cache_tools.storage.store import MissingObjectError, Store
from mmkd.cache_tools.views.drawing import ViewPolicy
from mmkd.cache_tools.views.held_out import HeldOut
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.kinds import it_is
from mmkd.data_manifests.manifest import Head
from mmkd.data_manifests.typed_json import PART, STRICT, typed


@dataclass(frozen=True)
class _Base:
    """Those fields of the base node that readers use; it has others, which only count for the fingerprint."""

    __pydantic_config__ = PART
    dataset: str
    manifest: str
    heads: dict[str, tuple[str, ...]]
    train_split: str
    views: dict[str, Any]
    view_seed: int


@dataclass(frozen=True)
class _Expert:
    """Those fields of an expert's node that readers use."""

    __pydantic_config__ = PART
    modality: str
    weights: str
    precision: str


@dataclass(frozen=True)
class CacheInit:
    """What `init.json` says."""

    __pydantic_config__ = STRICT
    base: Mapping[str, Any]
    """Fields of the base node: everything that could change what a view shows or means."""
    experts: Mapping[str, Mapping[str, Any]]
    """Expert -> the fields of its node: everything that could change its logits, over the base."""
    splits: tuple[SplitLayout, ...]
    """Rows, views and blocks of each split."""
    held_out: Mapping[str, HeldOut]
    """Expert -> the part of the training clips that it did not see."""
    objects: Mapping[str, str]
    """Object key within the group -> SHA-256, of what is written when the cache starts or grows."""
    environment: Mapping[str, str]
    """Package -> the version that the numbers were made with; part of no fingerprint."""

    def __post_init__(self) -> None:
        """Raise ValueError for fields that no reader could use."""
        try:
            base = typed(_Base, dict(self.base))
            _ = self.heads, self.policy
        except InputError as error:
            raise ValueError(f"base.{error}") from error
        except ValueError as error:
            raise ValueError(f"base.{' '.join(str(error).split())}") from error
        if not base.heads:
            raise ValueError("base.heads: there is none")
        for name, fields in self.experts.items():
            if name in RESERVED_NAMES or not name.isidentifier():
                raise ValueError(f"experts: {name!r} cannot name one")
            try:
                format_of(typed(_Expert, dict(fields)).precision)
            except (ValueError, InputError) as error:
                raise ValueError(f"experts.{name}.{error}") from error
        if self.experts.keys() != self.held_out.keys():
            raise ValueError("held_out: its experts are not those of `experts`")
        if not self.splits or len({split.name for split in self.splits}) < len(self.splits):
            raise ValueError("splits: there is none, or one is there twice")
        require_safe_keys(self.objects)

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "CacheInit":
        """Parse `init.json`.

        Raises InputError for one of another schema, and VerificationError, naming `where` and the field, for one
        that is damaged or lacks what every cache has.
        """
        check_schema(data, where)
        try:
            fields = open_seal(data)
            if "schema" not in fields:
                raise ValueError("it has no schema")
            del fields["schema"]
            init = typed(cls, fields)
            init.require_static_objects()
        except ValueError as error:
            raise damaged(where, error) from error
        return init

    def require_static_objects(self) -> None:
        """Raise ValueError unless every object that is written when a cache starts is named.

        This bounds the rows and views that a record can claim by its own size.
        """
        heads = [head.name for head in self.heads]
        for split in self.splits:
            keys = static_keys(split, heads, frames=self.policy.frames)
            if absent := next((key for key in keys if key not in self.objects), None):
                raise ValueError(f"objects: {absent} is not there")

    def to_bytes(self) -> bytes:
        """Return the contents of `init.json`."""
        fields = {
            "schema": SCHEMA,
            "base": dict(self.base),
            "experts": {name: dict(fields) for name, fields in self.experts.items()},
            "splits": [asdict(layout) for layout in self.splits],
            "held_out": {name: asdict(part) for name, part in self.held_out.items()},
            "objects": dict(self.objects),
            "environment": dict(self.environment),
        }
        return (json.dumps(seal(fields), indent=1) + "\n").encode()

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return str(self.base["dataset"])

    @property
    def manifest(self) -> str:
        """Fingerprint of the manifest."""
        return str(self.base["manifest"])

    @property
    def heads(self) -> tuple[Head, ...]:
        """Heads with their ordered class lists."""
        return tuple(Head(name, tuple(classes)) for name, classes in self.base["heads"].items())

    @property
    def train_split(self) -> str:
        """Name of the split whose views are random."""
        return str(self.base["train_split"])

    @property
    def policy(self) -> ViewPolicy:
        """How views look at a clip."""
        return ViewPolicy.model_validate(self.base["views"])

    @property
    def view_seed(self) -> int:
        """Seed of the random views."""
        return int(self.base["view_seed"])

    def layouts(self) -> dict[str, SplitLayout]:
        """Return split -> its rows, views and blocks."""
        return {layout.name: layout for layout in self.splits}

    def forms(self) -> dict[str, ArrayForm]:
        """Return array name -> shape, blocks and type, of all arrays."""
        experts = {name: format_of(fields["precision"]) for name, fields in self.experts.items()}
        heads = {head.name: len(head.classes) for head in self.heads}
        forms: dict[str, ArrayForm] = {}
        for split in self.splits:
            forms |= split_forms(split, experts, heads, frames=self.policy.frames)
        return forms

    def fingerprints(self) -> dict[str, str]:
        """Return node (thumbprint or expert) -> fingerprint."""
        base = fingerprint(self.base)
        experts = {name: expert_fingerprint(base, fields) for name, fields in self.experts.items()}
        return {THUMBPRINT: base} | experts

    def wanted(self) -> Iterator[tuple[Shard, str, str]]:
        """Yield (shard, node, fingerprint) of everything that the finished cache holds, in a fixed order."""
        nodes = self.fingerprints()
        for layout in self.splits:
            for shard in layout.shards():
                for node, node_fingerprint in nodes.items():
                    yield shard, node, node_fingerprint

    def missing(self, store: Store) -> list[tuple[Shard, str]]:
        """Return (shard, node) of what has no commit record yet; one listing, however large the cache is."""
        there = store.list(COMMITS)
        return [(shard, node) for shard, node, own in self.wanted() if commit_key(shard, node, own) not in there]


def read_init(store: Store) -> CacheInit:
    """Return `init.json`; raise as `CacheInit.from_bytes`, and InputError when there is none."""
    try:
        data = store.read(INIT)
    except MissingObjectError:
        place = store.locate()
        told = it_is(Path(place)) or "; make one with `mmkd-cache build`"
        raise InputError(f"{place} is not a cache{told}") from None
    return CacheInit.from_bytes(data, store.locate(INIT))


def expert_fingerprint(base: str, fields: Mapping[str, Any]) -> str:
    """Return the fingerprint of an expert's node: its own fields over the base's fingerprint."""
    return fingerprint({"base": base, "expert": dict(fields)})


def check_schema(data: bytes, where: str) -> None:
    """Raise InputError for an init or root record of another schema; a damaged one passes, for its seal tells."""
    try:
        fields = json.loads(data)
        schema = fields["schema"]
        if SEAL in fields:
            open_seal(data)
    except (ValueError, KeyError, TypeError, RecursionError):
        return
    if schema != SCHEMA:
        raise InputError(
            f"{where} has schema {schema!r}; this version reads {SCHEMA!r}: read it with the mmkd that wrote it, "
            "or build the cache again"
        )
