"""The build as a whole beside each of its stages alone, in one run: clips/s and each stage's busy share.

    python tests/benchmarks/build.py [--clips N] [--views N] [--workers N] [--shard-rows N]

A demo data set is made, and the demo's three experts without training (their speed is the same). Then, over the
same clips and views: preparing alone (decoding, views and flow, in the same worker processes), experts alone (from
clips that lie prepared in memory), encoding and publishing alone, and `build`. Starting (probing, the first import
of a worker) is left out of every rate and printed apart. The target is a build at 0.9 of its slowest stage, where
there is a core for each worker and one for the experts; and writing below 1 % of the build's time.
"""

import argparse
import hashlib
import os
import platform
import tempfile
import time
from pathlib import Path

import torch

from mmkd.cache_tools.cache.commits import publish
from mmkd.cache_tools.frames.clip_set import ClipSet
from mmkd.cache_tools.process.pool import run_tasks
from mmkd.cache_tools.recipes.recipe import load_recipe
from mmkd.cache_tools.storage.local_store import LocalStore
from mmkd.data_manifests.demo.plan import DemoOptions
from mmkd.data_manifests.demo.write import write_demo, write_recipes
from mmkd.data_manifests.manifest_file import save_manifest
from mmkd.data_manifests.published.something import read_something_something
from mmkd.pipeline.build.build import build_cache
from mmkd.pipeline.build.open_shard import clip_job
from mmkd.pipeline.build.shard_block import NodeResult, ShardBlock
from mmkd.pipeline.build.start import initialise
from mmkd.pipeline.build.work import BuildPlan, ShardWork, pending_shards, plan_build
from mmkd.pipeline.experts.expert import Expert, ExpertCard, load_expert, make_network, save_expert
from mmkd.pipeline.experts.teach import expert_identity
from mmkd.pipeline.inputs.prepare import PreparedClip, prepare_clip
from mmkd.pipeline.recipe import TeacherRecipe
from mmkd.student.training.checkpoint import encode_network

Prepared = list[tuple[ShardWork, list[PreparedClip]]]


def make_data(root: Path, clips: int, build_options: dict[str, object]) -> TeacherRecipe:
    """Write a demo data set with `clips` training clips and return its recipe, which caches them alone."""
    write_demo(root, DemoOptions(train_clips=clips, standard_clips=14, compositional_clips=14), workers=2)
    write_recipes(root)
    made = read_something_something(
        {"train": root / "train.json"}, root / "labels.json", video_suffix=".webm", dataset="mmkd-demo"
    )
    save_manifest(made, root / "manifest.jsonl")
    named = {
        "data.manifest": str(root / "manifest.jsonl"),
        "data.videos": str(root / "videos"),
        "boxes.files": [str(root / "bounding_boxes.json")],
        "flow_scratch": str(root / "no-scratch"),
        **build_options,
    }
    return load_recipe(TeacherRecipe, files=[root / "teacher.yaml"], named=named)


def untrained_experts(root: Path, recipe: TeacherRecipe) -> tuple[Expert, ...]:
    """Return the recipe's experts with fresh weights."""
    clip_set, made = ClipSet(recipe.data), []
    heads = {head.name: len(head.classes) for head in clip_set.manifest.heads}
    for name, expert in recipe.experts.items():
        torch.manual_seed(0)
        state = encode_network(make_network(expert, heads))
        identity = expert_identity(recipe, expert, clip_set)
        sha256 = hashlib.sha256(state).hexdigest()
        save_expert(root / name, ExpertCard(name=name, weights_sha256=sha256, training={}, **identity), state)
        made.append(load_expert(root / name, torch.device("cpu")))
    return tuple(made)


def prepare_alone(plan: BuildPlan, works: list[ShardWork]) -> tuple[float, Prepared]:
    """Return clips/s of the decoding processes alone, and the prepared clips."""
    jobs = (clip_job(plan, work, row) for work in works for row in work.shard.rows)
    clips = run_tasks(prepare_clip, jobs, workers=plan.recipe.data.workers)
    first = next(clips)[1]
    began = time.perf_counter()
    found = [first, *(clip for _, clip in clips)]
    seconds = time.perf_counter() - began
    prepared, done = [], 0
    for work in works:
        prepared.append((work, found[done : done + len(work.shard.rows)]))
        done += len(work.shard.rows)
    return (len(found) - 1) / seconds, prepared


def experts_alone(plan: BuildPlan, prepared: Prepared) -> tuple[float, list[dict[str, NodeResult]]]:
    """Return clips/s of the experts alone, and the results of each shard."""
    results, count, began = [], 0, time.perf_counter()
    for work, clips in prepared:
        block = ShardBlock(work.shard, plan.experts, plan.recipe, boxes=plan.boxes)
        for row, clip in zip(work.shard.rows, clips, strict=True):
            block.add(row, work.split.items[row], work.views(row), clip)
        block.finish()
        results.append(block.results(work.split.clips))
        count += len(clips)
    return count / (time.perf_counter() - began), results


def write_alone(plan: BuildPlan, works: list[ShardWork], results: list[dict[str, NodeResult]], out: Path) -> float:
    """Return clips/s of encoding and publishing alone."""
    store = LocalStore(out)
    manifest = plan.clip_set.manifest
    _, metadata = initialise(store, plan.splits, manifest=manifest, base=plan.base, experts=plan.nodes)
    began = time.perf_counter()
    for work, nodes in zip(works, results, strict=True):
        for node, result in nodes.items():
            objects = result.encode(metadata)
            publish(store, work.shard, result.record(plan.fingerprints[node], objects), objects)
    return sum(len(work.shard.rows) for work in works) / (time.perf_counter() - began)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="the build beside its stages")
    parser.add_argument("--clips", type=int, default=128)
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--shard-rows", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="where to write [default: the system's temporary folder]")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, load before: {load}")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        root = Path(name)
        chosen = {"build.views": options.views, "build.shard_rows": options.shard_rows}
        recipe = make_data(root, options.clips, chosen | {"data.workers": options.workers})
        experts = untrained_experts(root / "experts", recipe)
        plan = plan_build(recipe, experts)
        works, _ = pending_shards(plan, (), task=(0, 1))
        experts_alone(plan, [(works[0], prepare_alone(plan, works[:1])[1][0][1])])  # warm
        rates = {}
        rates["prepare"], prepared = prepare_alone(plan, works)
        rates["experts"], results = experts_alone(plan, prepared)
        rates["write"] = write_alone(plan, works, results, root / "written")
        report = build_cache(recipe, experts, root / "cache")
    seconds = report.seconds["total"] - report.seconds["start"]
    whole = report.clips / seconds
    print(
        f"{options.clips} clips x {options.views} views, {len(works)} shards, {options.workers} workers, 1 thread"
    )
    for stage, rate in rates.items():
        print(f"{stage:8} alone {rate:8.1f} clips/s")
    print(f"build          {whole:8.1f} clips/s, {whole / min(rates.values()):.2f} of its slowest stage alone")
    busy = {stage: value / seconds for stage, value in report.seconds.items() if stage not in ("total", "start")}
    print(
        f"start {report.seconds['start']:.1f} s, then " + ", ".join(f"{k} {100 * v:.1f} %" for k, v in busy.items())
    )


if __name__ == "__main__":
    main()
