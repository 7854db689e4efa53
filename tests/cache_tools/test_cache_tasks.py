"""Several tasks on one cache: what one holds no other computes, what a dead one held is taken over."""

import json
import os
import threading
import time
from contextlib import contextmanager

import pytest

from mmkd.cache_tools.upkeep.verify import verify_cache
from tests.helpers.forked import Forked, contents
from tests.helpers.sleeping import stop_at, take_for_dead, told_that_it_slept

SHARD = "train/0-0"
FIRST_OBJECT = r"opened targets\.zarr/train/rgb/.*/c/0/0.*"
RECORD = r"opened commits/train/rgb/\w+/0-0\.json"


def status_of(quick: Forked, out) -> dict:
    return json.loads(quick.run("status", out, "--json").out)


def wait_until(reached, what: str) -> None:
    deadline = time.monotonic() + 120
    while not reached():
        assert time.monotonic() < deadline, f"{what} never happened"
        time.sleep(0.02)


def test_four_tasks_two_of_them_alike_share_a_build_from_an_empty_directory(quick, tmp_path):
    out = tmp_path / "cache"
    children = [quick.start_build(out, "--task", i, "--of", 4, "--json") for i in (0, 1, 2, 2)]
    results = [child.wait() for child in children]
    assert [result.code for result in results] == [0] * 4, [result.err for result in results]
    built = [json.loads(result.out)["shards"] for result in results]
    assert sum(built) == 6, "a shard that a task at work holds is nobody else's"
    assert contents(out) == contents(quick.cache)
    assert len(list((out / "journal").iterdir())) == sum(count > 0 for count in built)


def test_of_two_tasks_on_an_empty_directory_one_starts_the_cache_and_the_other_waits(quick, tmp_path):
    out = tmp_path / "cache"
    first = quick.start_build(out, faults=stop_at(r"opened init\.json"))
    first.wait_stopped()
    second = quick.start_build(out)
    wait_until(lambda: len(list((out / "tasks").glob("*.json"))) == 2, "the second task")
    time.sleep(0.5)
    assert not (out / "init.json").exists()
    first.go_on()
    assert [child.wait().code for child in (first, second)] == [0, 0]
    assert contents(out) == contents(quick.cache)


@contextmanager
def living(sign):
    """Renew a sign of life all the time."""
    ended = threading.Event()

    def beat():
        while not ended.wait(0.2):
            sign.touch()

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.fixture
def elsewhere(quick, tmp_path):
    """A cache that lacks a shard, which a task of another machine holds; and the file of its sign of life."""
    out = tmp_path / "cache"
    killed = quick.start_build(out, faults={"acts": [{"match": RECORD, "do": "kill"}]})
    killed.wait()
    ours = next((out / "claims" / SHARD).glob("*.json"))
    theirs = "0123456789ab-1-1-01234567"
    ours.write_text(json.dumps({"task": theirs}))
    sign = out / "tasks" / f"{theirs}.json"
    sign.write_text("{}")
    return out, sign


def test_a_build_waits_until_a_task_killed_elsewhere_is_surely_dead_and_does_its_work(quick, elsewhere):
    out, sign = elsewhere
    killed = time.time() - 115  # taken for dead after 120 seconds, as of the build's second sign of life
    os.utime(sign, (killed, killed))
    result = quick.start_build(out, "--json").wait()
    assert result.code == 0, result.err
    assert "waiting for a sign of life of other tasks: 0/1 task" in result.err
    assert json.loads(result.out)["left_shards"] == 0
    assert contents(out) == contents(quick.cache)


def test_a_build_leaves_to_a_task_elsewhere_what_that_works_on(quick, elsewhere):
    out, sign = elsewhere
    with living(sign):
        result = quick.start_build(out, "--json").wait()
    assert result.code == 0, result.err
    assert json.loads(result.out)["left_shards"] == 1
    assert json.loads((out / "claims" / SHARD / "0.json").read_text())["task"] == sign.stem
    assert status_of(quick, out)["running"] == {SHARD: sign.stem}


@pytest.mark.parametrize("point", [FIRST_OBJECT, RECORD], ids=["before its first object", "before its record"])
@pytest.mark.parametrize("late", [True, False], ids=["wakes after", "wakes before"])
def test_a_task_taken_for_dead_wakes_and_does_no_harm(quick, tmp_path, point, late):
    out = tmp_path / "cache"
    sleeper = quick.start_build(out, faults=stop_at(point))
    sleeper.wait_stopped()
    other = json.loads(quick.build(out, "--json").out)
    assert (other["shards"], other["left_shards"]) == (5, 1), "a live task's shard is left to it"
    assert not (out / "root.json").exists(), "who leaves something to others does not finalize"
    take_for_dead(out, sleeper)
    heir = quick.start_build(out, faults={} if late else stop_at(point))
    if late:
        assert heir.wait().code == 0
        assert verify_cache(out).damaged == {}
        sleeper.go_on()
        told_that_it_slept(sleeper)
    else:
        heir.wait_stopped()
        sleeper.go_on()
        told_that_it_slept(sleeper)
        assert not (out / "root.json").exists()
        heir.go_on()
        assert heir.wait().code == 0
    assert contents(out) == contents(quick.cache)


def test_a_task_that_slept_through_the_start_of_the_cache_changes_nothing(quick, tmp_path):
    out = tmp_path / "cache"
    sleeper = quick.start_build(out, "--views", 4, faults=stop_at(r"synced targets\.zarr/train/clip_id/.*"))
    sleeper.wait_stopped()
    take_for_dead(out, sleeper)
    assert quick.build(out).code == 0
    sleeper.go_on()
    told_that_it_slept(sleeper)
    assert contents(out) == contents(quick.cache)


def test_status_and_finalize_at_every_stage(quick, tmp_path):
    out = tmp_path / "cache"
    nothing = quick.run("status", out)
    assert (nothing.code, "is not a cache" in nothing.err) == (2, True)
    child = quick.start_build(out, faults=stop_at(r"opened commits/train/boxes/\w+/1-0\.json"))
    child.wait_stopped()
    found = status_of(quick, out)
    assert (found["finished"], found["done"], found["shards"], found["tasks"]) == (False, 1, 6, 1)
    assert list(found["running"]) == ["train/1-0"]
    assert found["missing"] == {"boxes": 5, "rgb": 4, "thumbprint": 4}
    assert found["rows_left"] == 22
    assert "running   1 task, 1 shard in work" in quick.run("status", out).out
    refused = quick.run("finalize", out)
    assert refused.code == 4
    assert "lacks boxes of train/1-0, thumbprint of train/2-0" in refused.err
    assert "8 more; run `mmkd-cache build` again" in refused.err
    os.kill(child.pid, 9)
    assert child.wait().code == -9
    found = status_of(quick, out)
    assert (found["running"], found["abandoned"], found["tasks"]) == ({}, ["train/1-0"], 0)
    assert "abandoned 1 shard" in quick.run("status", out).out
    killed = quick.build(out, faults={"acts": [{"match": r"opened root\.json", "do": "kill"}]})
    assert killed.code == -9
    found = status_of(quick, out)
    assert (found["finished"], found["done"], found["rows_left"]) == (False, 6, 0)
    assert "complete, not finalized" in quick.run("status", out).out
    assert quick.run("finalize", out).code == 0
    assert status_of(quick, out)["finished"]
    assert "finished: 6 of 6 shards done, 28 of 28 rows" in quick.run("status", out).out
    assert contents(out) == contents(quick.cache)


def test_a_task_of_the_old_command_leaves_a_cache_that_is_given_more_views_meanwhile(quick, tmp_path):
    out, whole = tmp_path / "cache", tmp_path / "whole"
    old = quick.start_build(out, faults=stop_at(RECORD))
    old.wait_stopped()
    assert quick.build(out, "--views", 4).code == 0
    old.go_on()
    ended = old.wait()
    assert ended.code == 0, ended.err
    for place in (out, whole):
        assert quick.build(place, "--views", 4).code == 0
    assert contents(out) == contents(whole)


def test_a_task_of_an_expert_that_is_replaced_meanwhile_stops_and_leaves_no_old_logits(quick, tmp_path):
    out, whole = tmp_path / "cache", tmp_path / "whole"
    old = quick.start_build(out, faults=stop_at(FIRST_OBJECT))
    old.wait_stopped()
    assert quick.build(out, "--replace", "rgb", experts=("other", "boxes")).code == 0
    old.go_on()
    ended = old.wait()
    assert ended.code in (0, 5), ended.err
    for place in (out, whole):
        assert quick.build(place, experts=("other", "boxes")).code == 0
    assert contents(out) == contents(whole)


def test_a_task_that_computes_with_a_replaced_expert_is_told_so(quick, tmp_path):
    out, whole = tmp_path / "cache", tmp_path / "whole"
    old = quick.start_build(out, faults={"acts": [{"match": "decoded", "nth": 2, "do": "stop"}]})
    old.wait_stopped()
    assert quick.build(out, "--replace", "rgb", experts=("other", "boxes")).code == 0
    old.go_on()
    ended = old.wait()
    assert ended.code == 5, ended.err
    assert "'rgb' was replaced while this task was at work; run the build again with the new expert" in ended.err
    for place in (out, whole):
        assert quick.build(place, experts=("other", "boxes")).code == 0
    assert contents(out) == contents(whole)
