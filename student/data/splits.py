"""Where a student's clips and views come from: a cache, or a manifest and its videos alone."""

import hashlib
from collections.abc import Collection
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mmkd.cache_tools.cache.fingerprints import canonical_json, fingerprint
from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.cache.split_table import SplitTable
from mmkd.cache_tools.frames.clip_set import ClipSet, ClipVideo, ClipVideos, decoder_of, unusable_line
from mmkd.cache_tools.views.canonical import CANONICAL_RULES
from mmkd.cache_tools.views.coverage import short_views_line
from mmkd.cache_tools.views.drawing import VIEW_RULES, ViewPolicy, evaluation_view_table
from mmkd.cache_tools.views.view import ViewTable
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.manifest import Manifest
from mmkd.student.data.evaluation_views import EvaluationLook, seen_under
from mmkd.student.data.rgb_views import RGBViews, label_numbers
from mmkd.student.data.split_data import SplitData, check_manifest, open_split
from mmkd.student.data.view_streams import DrawnViews, StoredViews, ViewStream
from mmkd.student.recipes.student import StudentRecipe

WITHOUT_CACHE = "manifest:"
"""Begins the fingerprint of what was trained or evaluated from a manifest alone."""
OTHER_VIEWS = "views:"
"""Begins the fingerprint of what was evaluated on a cache's clips under other views than it holds."""


@dataclass(frozen=True)
class SplitNames:
    """The splits that there are, before any is opened."""

    names: tuple[str, ...]
    """All of them, in order."""
    training: str | None
    """The one that has random training views."""
    of_cache: bool = True
    """Whether they are a cache's, or a manifest's alone."""

    @classmethod
    def cached(cls, reader: CacheReader) -> "SplitNames":
        """Return those of a cache."""
        return cls(tuple(reader.layouts), reader.init.train_split)

    @classmethod
    def labelled(cls, manifest: Manifest, train_split: str) -> "SplitNames":
        """Return those of a manifest in which some clip has a label."""
        names = (name for name in manifest.splits if manifest.unlabelled(name) < len(manifest.split(name)))
        return cls(tuple(names), train_split, of_cache=False)


class CachedSplits:
    """The splits of a cache, under the views that the teacher saw."""

    def __init__(self, reader: CacheReader, clip_set: ClipSet, look: EvaluationLook | None = None) -> None:
        """Join both; with a `look` clips are seen under its views, which no cache has to hold.

        Raises InputError for a manifest of other clips than the cache's.
        """
        check_manifest(reader, clip_set.manifest)
        self.clip_set, self.reader = clip_set, reader
        self.policy = reader.init.policy if look is None else look.of(reader.init.policy)
        """How views look at a clip."""
        self.heads = reader.heads
        """What clips are labelled with."""
        self.names = SplitNames.cached(reader)
        """The splits that can be opened."""
        self.fingerprint = reader.fingerprint if self.is_stored else other_views_fingerprint(reader, self.policy)
        """Of all that could change an evaluation."""

    @property
    def is_stored(self) -> bool:
        """Whether the cache holds the evaluation views that are asked for."""
        return self.policy == self.reader.init.policy

    def open(
        self, split: str, *, memory_bytes: int, fresh_views: bool = False, only: Collection[str] | None = None
    ) -> SplitData:
        """Open a split under its stored views, or under a fresh one every epoch; raises as `open_split`."""
        found = open_split(
            self.reader, self.clip_set, split, memory_bytes=memory_bytes, fresh_views=fresh_views, only=only
        )
        return (
            found
            if self.is_stored or fresh_views
            else seen_under(found, self.clip_set.source, self.heads, self.policy)
        )

    def seen(self) -> dict[str, Any]:
        """Return what run.json says of the views: `views`, `view_rules`, `canonical`, `decoder`."""
        base = self.reader.init.base
        return {"views": dict(base["views"])} | {
            name: str(base[name]) for name in ("view_rules", "canonical", "decoder")
        }

    def identity(self, training: SplitData) -> dict[str, str]:
        """Return what a checkpoint is checked against, beyond ids and labels of the clips to learn from."""
        return {"cache": self.fingerprint}


class ManifestSplits:
    """The splits of a manifest, under views that are drawn as `mmkd-cache build` draws them."""

    reader: None = None
    """No cache, and so no teacher."""

    def __init__(self, clip_set: ClipSet, policy: ViewPolicy, *, train_split: str, view_seed: int = 0) -> None:
        """Draw views by `policy`, random ones for training by `view_seed`."""
        self.clip_set, self.policy, self._seed = clip_set, policy, view_seed
        self.heads = clip_set.manifest.heads
        self.names = SplitNames.labelled(clip_set.manifest, train_split)
        self.fingerprint = manifest_fingerprint(clip_set.manifest, policy)
        self._probed: dict[str, ClipVideos] = {}

    def open(
        self, split: str, *, memory_bytes: int, fresh_views: bool = False, only: Collection[str] | None = None
    ) -> SplitData:
        """Open a split under its evaluation views, or fresh ones; InputError where no clip of it can be read."""
        manifest, found = self.clip_set.manifest, self._probe(split)
        clips = found.clips
        wanted = np.array([only is None or clip.clip_id in only for clip in clips], np.bool_)
        rows = np.flatnonzero(wanted & (found.facts[:, 3] > 0))
        if not len(rows):
            raise InputError(f"no clip of split {split!r} can be read: {unusable_line([found])}")
        usable = tuple(item for row in rows.tolist() if isinstance(item := found[row], ClipVideo))
        drawn = ViewTable.zeros(0, 0, self.policy.frames) if fresh_views else self._evaluation_views(found, wanted)
        table = SplitTable(
            name=split,
            clip_ids=tuple(clip.clip_id for clip in clips),
            labels=label_numbers(clips, self.heads),
            facts=found.facts.astype(np.int64),
            drawn=drawn,
        )
        stream: ViewStream = StoredViews(table, rows.tolist())
        if fresh_views:
            stream = DrawnViews(
                usable,
                self.policy,
                dataset=manifest.dataset,
                seed=self._seed,
                flip_allowed=manifest.flip_allowed,
                views=None,
            )
        data = RGBViews(
            self.clip_set.source,
            usable,
            stream,
            heads=self.heads,
            size_px=self.policy.size_px,
            memory_bytes=memory_bytes,
        )
        return SplitData(table, rows, usable, data, int(wanted.sum()) - len(rows))

    def _probe(self, split: str) -> ClipVideos:
        if split not in self._probed:
            self._probed[split] = self.clip_set.probe(self.clip_set.manifest.split(split))
        return self._probed[split]

    def _evaluation_views(self, found: ClipVideos, wanted: npt.NDArray[np.bool_]) -> ViewTable:
        """Draw the views of the wanted clips; what is left zero of a large table takes no memory."""
        facts = np.where(wanted[:, None], found.facts, 0)
        return evaluation_view_table(facts, self.policy, found.times() if self.policy.is_timed else None)

    def warnings(self) -> list[str]:
        """Return what is to be said of the splits that were opened: clips without use, views of too little time."""
        found = list(self._probed.values())
        return [line for line in (unusable_line(found), short_views_line(self.policy, found)) if line]

    def seen(self) -> dict[str, Any]:
        """Return what run.json says of the views; `decoder` is that of the splits that were opened."""
        rules = {
            "view_rules": VIEW_RULES,
            "canonical": CANONICAL_RULES,
            "decoder": decoder_of(self._probed.values()),
        }
        return {"views": self.policy.identity(), **rules}

    def identity(self, training: SplitData) -> dict[str, str]:
        """Return hashes of the views, and of the videos of the clips to learn from."""
        videos = hashlib.sha256()
        for item in training.clips:
            facts = [item.video.identity, item.video.decoder, *astuple(item.facts)]
            videos.update(f"{canonical_json(facts)}\n".encode())
        views = {"views": self.policy.identity(), "view_seed": self._seed, "view_rules": VIEW_RULES}
        flips = {"dataset": self.clip_set.manifest.dataset, "flip_allowed": self.clip_set.manifest.flip_allowed}
        return {"fresh_views": fingerprint(views | flips), "videos": videos.hexdigest()}


Splits = CachedSplits | ManifestSplits
"""Clips and views of splits, ready to be opened."""


def other_views_fingerprint(reader: CacheReader, policy: ViewPolicy) -> str:
    """Return the fingerprint of an evaluation on a cache's clips under views that it does not hold."""
    views = {"views": policy.identity(), "view_rules": VIEW_RULES, "canonical": CANONICAL_RULES}
    return OTHER_VIEWS + fingerprint({"cache": reader.fingerprint, **views})


def manifest_fingerprint(manifest: Manifest, policy: ViewPolicy) -> str:
    """Return the fingerprint of an evaluation without a cache: the manifest, and how it is looked at."""
    views = {"views": policy.identity(), "view_rules": VIEW_RULES, "canonical": CANONICAL_RULES}
    return WITHOUT_CACHE + fingerprint({"manifest": manifest.fingerprint(), **views})


def check_views(recipe: StudentRecipe, policy: ViewPolicy, *, of: str, seed: int | None = None) -> None:
    """Raise InputError where the recipe states other views than those `of` a cache or a run."""
    given = (
        {} if recipe.views is None else recipe.views.model_dump(mode="json", include=recipe.views.model_fields_set)
    )
    own = policy.identity()
    other = [
        f"views.{name} is {value}, and {of}'s {own.get(name)}"
        for name, value in given.items()
        if value != own.get(name)
    ]
    if seed is not None and "view_seed" in recipe.model_fields_set and recipe.view_seed != seed:
        other.append(f"view_seed is {recipe.view_seed}, and {of}'s {seed}")
    if other:
        raise InputError(f"{'; '.join(other)}: leave them out, since {of} says how clips are looked at")
