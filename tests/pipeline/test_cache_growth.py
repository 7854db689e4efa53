"""A cache that grows: more views, more experts, another expert; nothing that is there is computed again."""

import json
import re

import pytest

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.storage.open import open_store
from mmkd.cache_tools.tasks.finish import IncompleteError, finalize_cache
from mmkd.pipeline.build import build
from tests.helpers.forked import Forked, contents


def written(before: dict[str, int], out) -> set[str]:
    """The objects of shards that were written since `before`."""
    return {key for key, modified in times(out).items() if before.get(key) != modified}


def times(out) -> dict[str, int]:
    """Object of a shard -> when it was written."""
    objects = [path for path in (out / "targets.zarr").rglob("c/*/*") if path.is_file()]
    objects += [path for path in (out / "targets.zarr").rglob("c/*/*/*") if path.is_file()]
    found = {path.relative_to(out / "targets.zarr").as_posix(): path.stat().st_mtime_ns for path in objects}
    return {key: modified for key, modified in found.items() if re.search(r"/(thumbprint|rgb|boxes)/", key)}


@pytest.fixture(scope="module")
def wide(quick: Forked, tmp_path_factory):
    """The bytes of a build of four views at once."""
    out = tmp_path_factory.mktemp("wide") / "cache"
    assert quick.build(out, "--views", 4).code == 0
    return contents(out)


def test_more_views_later_give_the_bytes_of_all_at_once_and_touch_no_old_shard(quick, wide, tmp_path):
    out = quick.copy(tmp_path / "cache")
    before = times(out)
    grown = quick.build(out, "--views", 4, "--json")
    assert grown.code == 0, grown.err
    report = json.loads(grown.out)
    assert (report["shards"], report["skipped_shards"], report["clips"]) == (3, 6, 14)
    assert contents(out) == wide
    new = written(before, out)
    assert new
    assert all(re.fullmatch(r"train/.*/c/\d/1(/0)?", key) for key in new), new
    assert CacheReader(out).layouts["train"].views == 4
    fewer = quick.build(out)
    assert fewer.code == 5
    assert "Views can only be added" in fewer.err
    assert contents(out) == wide


def test_views_grow_by_the_block_of_the_cache_when_none_is_named(quick, tmp_path):
    whole_block = "--set", "build.shard_views=null"
    out = tmp_path / "cache"
    assert quick.build(out, *whole_block, "--views", 2).code == 0
    refused = quick.build(out, *whole_block, "--views", 5)
    assert refused.code == 2
    assert "the cache has 2 views in blocks of 2, and grows by whole blocks; give 4 or 6" in refused.err
    assert "give 4 or" not in quick.build(out, *whole_block, "--views", 3).err, "one answer is enough there"
    for views in (4, 6):
        explicit = quick.copy(tmp_path / f"explicit-{views}")
        assert quick.build(explicit, "--set", "build.shard_views=2", "--views", views).code == 0
        grown = quick.build(out, *whole_block, "--views", views)
        assert grown.code == 0, grown.err
        assert contents(out) == contents(explicit)
    fewer = quick.build(out, *whole_block, "--views", 4)
    assert (fewer.code, "Views can only be added" in fewer.err) == (5, True)
    plan = quick.run("plan", *quick.options(), "-o", out, *whole_block, "--views", 7)
    assert "give 8" in plan.err


def test_another_layout_is_refused_with_the_options_that_keep_the_cache_s_own(quick):
    refused = quick.build(quick.cache, "--set", "build.shard_rows=7", "--set", "build.shard_views=1")
    assert refused.code == 5
    advice = "give --set build.shard_rows=6 --set build.shard_views=2"
    assert advice in refused.err
    assert quick.build(quick.cache, *advice.removeprefix("give ").split()).code == 0
    fewer = quick.build(quick.cache, "--set", "build.splits=[train]")
    assert "Give --set build.splits=[train,standard], the cache's" in fewer.err


def test_another_manifest_is_refused_with_the_names_of_its_clips(quick, tmp_path):
    lines = (quick.root / "manifest.jsonl").read_text().splitlines()
    ids = [json.loads(line)["clip_id"] for line in lines[1:]]

    def refused(name: str, *changed: str) -> str:
        (tmp_path / name).write_text("\n".join((lines[0], *changed)) + "\n")
        done = quick.build(quick.cache, "--manifest", tmp_path / name, "--facts", tmp_path / "facts")
        assert done.code == 5, done.err
        return done.err

    fewer = refused("fewer.jsonl", *lines[2:])
    assert f"differs: the manifest: the manifest's split 'train' lacks clip '{ids[0]}'" in fewer
    relabelled = [re.sub(r'"action": (\d+)', lambda m: f'"action": {int(m[1]) ^ 1}', line) for line in lines[1:6]]
    assert "the cache has other labels for 5 clips" in refused("labels.jsonl", *relabelled, *lines[6:])
    swapped = refused("swapped.jsonl", lines[2], lines[1], *lines[3:])
    assert "the clips of split 'train' stand in another order" in swapped
    assert "of the manifest differ" in refused("groups.jsonl", lines[1].replace("[]", '["tail"]'), *lines[2:])


def test_one_more_expert_later_gives_the_bytes_of_all_at_once_and_computes_nothing_else(quick, tmp_path):
    out = tmp_path / "cache"
    assert quick.build(out, experts=("rgb",)).code == 0
    assert CacheReader(out).experts == ("rgb",)
    before = times(out)
    grown = quick.build(out, experts=("boxes",))
    assert grown.code == 0, grown.err
    assert contents(out) == contents(quick.cache)
    new = written(before, out)
    assert len(new) == 6 * 3
    assert all("/boxes/" in key for key in new), new


def test_an_expert_is_replaced_only_when_told_so_and_the_others_stay(quick, tmp_path):
    out, whole = quick.copy(tmp_path / "cache"), tmp_path / "whole"
    refused = quick.build(out, experts=("other",))
    assert refused.code == 5
    assert re.search(r"experts\.rgb\.weights: cache .*, now .*", refused.err), refused.err
    assert "Give --replace NAME to compute that expert again" in refused.err
    assert contents(out) == contents(quick.cache)
    before = times(out)
    replaced = quick.build(out, "--replace", "rgb", experts=("other",))
    assert replaced.code == 0, replaced.err
    new = written(before, out)
    assert len(new) == 6 * 3
    assert all("/rgb/" in key for key in new), new
    assert quick.build(whole, experts=("other", "boxes")).code == 0
    assert contents(out) == contents(whole)
    assert quick.build(out, "--replace", "rgb", experts=("rgb",)).code == 0
    assert contents(out) == contents(quick.cache), "and back"


def test_a_replacement_that_was_interrupted_can_be_taken_back(quick, tmp_path):
    out = quick.copy(tmp_path / "cache")
    acts = [{"match": r"opened commits/train/rgb/.*", "nth": 2, "do": "kill"}]
    killed = quick.build(out, "--replace", "rgb", experts=("other",), faults={"acts": acts})
    assert killed.code == -9
    assert quick.build(out, "--replace", "rgb", experts=("rgb",)).code == 0
    assert contents(out) == contents(quick.cache), "no record of the old expert may vouch for the new one's logits"


@pytest.mark.parametrize(
    "where",
    [
        r"deleted root\.json",
        r"synced targets\.zarr/train/rgb/status/zarr\.json",
        r"half init\.json",
        r"opened commits/train/rgb/\w+/1-1\.json",
        r"written root\.json",
    ],
)
def test_growing_interrupted_anywhere_goes_on(quick, wide, tmp_path, where):
    out = quick.copy(tmp_path / "cache")
    killed = quick.build(out, "--views", 4, faults={"acts": [{"match": where, "do": "kill"}]})
    assert killed.code == -9
    assert quick.run("export", out, tmp_path / "x.h5").code == 2, "a cache that is growing is not finished"
    resumed = quick.build(out, "--views", 4)
    assert resumed.code == 0, resumed.err
    assert contents(out) == wide


def test_a_cache_that_grows_as_a_build_ends_is_left_to_who_made_it_grow(quick, tmp_path, monkeypatch):
    """The build has done its own share: that more is to come is no damage (exit code 4)."""
    out = quick.copy(tmp_path / "cache")
    store = open_store(out)

    def grown(*_):
        for record in (out / "commits" / "train").rglob("0-0.json"):
            record.unlink()
        raise IncompleteError("not complete")

    monkeypatch.setattr(build, "finish", grown)
    assert build.finish_or_leave(store, None, None) == 1
    with pytest.raises(IncompleteError, match="is not complete: it lacks thumbprint of train/0-0"):
        finalize_cache(store)
