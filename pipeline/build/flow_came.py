"""Flow files that were missing when a cache was built and are there now: the rows that lacked them, and no others.

An expert's fingerprint has a hash over all flow, so flow that came changes it. The cache stays the same
one where the hash without what came is the stored one; then records of shards that lacked nothing are written again
under the new fingerprint, beside the old ones, and those of the others are left for the build to compute.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mmkd.cache_tools.cache.clip_rows import static_array
from mmkd.cache_tools.cache.commits import read_commit
from mmkd.cache_tools.cache.init_record import CacheInit
from mmkd.cache_tools.layout import Shard, Status, commit_key
from mmkd.cache_tools.storage.store import Store
from mmkd.pipeline.build.work import FLOW_FIELD, BuildPlan
from mmkd.pipeline.flow.flow_digests import FlowDigests, rules_of, sources_of

Rows = Mapping[str, set[int]]
"""Split -> rows."""


@dataclass(frozen=True)
class FlowCame:
    """What came of the flow of a cache's experts."""

    before: dict[str, str] = field(default_factory=dict)
    """Expert -> the stored hash, where it differs from today's by what came alone."""
    rows: dict[str, Rows] = field(default_factory=dict)
    """Expert -> its rows that lacked flow which is there now."""

    def as_before(self, fields: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
        """Return the experts' fields with the hashes that the cache has."""
        return {
            name: {**own, FLOW_FIELD: self.before[name]} if name in self.before else own
            for name, own in fields.items()
        }

    def as_now(self, init: CacheInit, plan: BuildPlan) -> CacheInit:
        """Return the cache's record with today's hashes."""
        now = {name: plan.nodes[name].fields[FLOW_FIELD] for name in self.before}
        fields = {
            name: {**own, FLOW_FIELD: now[name]} if name in now else own for name, own in init.experts.items()
        }
        return replace(init, experts=fields)

    def lacks(self, shard: Shard, node: str) -> bool:
        """Return whether a node's shard has rows whose flow came."""
        return not self.rows.get(node, {}).get(shard.split.name, set()).isdisjoint(shard.rows)


def flow_that_came(store: Store, init: CacheInit, plan: BuildPlan) -> FlowCame:
    """Return what came of the flow of the given experts since; nothing where other flow changed."""
    came = FlowCame()
    if plan.flow is None:
        return came
    unknown = sources_without_video(store, init, plan)
    for name, node in plan.nodes.items():
        stored = init.experts.get(name, {}).get(FLOW_FIELD)
        if stored is None or FLOW_FIELD not in node.fields:
            continue
        failed = rows_without_flow(store, init, name)
        if stored != node.fields[FLOW_FIELD]:
            absent = sources_of_rows(plan, plan.flow, failed)
            rules = rules_of(stored)
            # Some were there, and damaged: then those count as they are now.
            tried = (plan.flow.digest(rules, absent=some, unknown=unknown) for some in (absent, ()))
            if stored not in tried:
                continue
            came.before[name] = stored
        came.rows[name] = rows_with_flow(plan, plan.flow, failed)
    return came


def rows_without_flow(store: Store, init: CacheInit, name: str) -> Rows:
    """Return the rows that an expert's commit records call without flow."""
    found: dict[str, set[int]] = {}
    for shard, node, fingerprint in init.wanted():
        record = read_commit(store, shard, node, fingerprint) if node == name else None
        rows = {item.row for item in record.unusable if item.status == Status.FLOW_FAILED} if record else set()
        found.setdefault(shard.split.name, set()).update(rows)
    return found


def rows_with_flow(plan: BuildPlan, flow: FlowDigests, rows: Rows) -> Rows:
    """Return those of some rows whose flow is there now."""
    identities = flow.identities()
    items = {split.layout.name: split.items for split in plan.splits}
    return {
        split: {row for row in own if any(identities[key] for key in sources_of(flow.files, items[split], [row]))}
        for split, own in rows.items()
        if split in items
    }


def sources_of_rows(plan: BuildPlan, flow: FlowDigests, rows: Rows) -> set[str]:
    """Return the sources of the flow of some rows."""
    found = (sources_of(flow.files, split.items, rows.get(split.layout.name, set())) for split in plan.splits)
    return set().union(*found)


def sources_without_video(store: Store, init: CacheInit, plan: BuildPlan) -> set[str]:
    """Return the sources of flow none of whose rows has a video in the cache."""
    lacked, known = dict[str, set[int]](), dict[str, set[int]]()
    for split in plan.splits:
        name = split.layout.name
        there = (
            static_array(store, init, f"{name}/video_identity") != ""
            if name in init.layouts()
            else np.ones(0, bool)
        )
        lacked[name], known[name] = (set(np.flatnonzero(part).tolist()) for part in (~there, there))
    if plan.flow is None:
        return set()
    return sources_of_rows(plan, plan.flow, lacked) - sources_of_rows(plan, plan.flow, known)


def write_again(
    store: Store, came: FlowCame, before: CacheInit, after: CacheInit, lacking: Collection[tuple[str, str]]
) -> None:
    """Write records under the fingerprints of `after`, but those of the (shard, node) lacking."""
    new = after.fingerprints()
    for shard, node, fingerprint in before.wanted():
        if node in came.before and (shard.name, node) not in lacking:
            record = read_commit(store, shard, node, fingerprint)
            if record is not None:
                renewed = replace(record, fingerprint=new[node])
                store.write(commit_key(shard, node, new[node]), renewed.to_bytes())
