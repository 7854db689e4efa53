"""Tasks that sleep in the middle of changing a cache, are taken for dead, and wake up when others have gone on."""

import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mmkd.cache_tools.storage import local_store
from mmkd.cache_tools.storage.local_store import LocalStore
from mmkd.cache_tools.storage.open import open_store
from mmkd.cache_tools.storage.store import TakenOverError
from mmkd.cache_tools.tasks.finish import finalize_cache
from mmkd.cache_tools.tasks.heartbeat import OtherTasks, Task, live_tasks, new_task_id
from mmkd.cache_tools.upkeep.hdf5 import export_cache
from mmkd.cache_tools.upkeep.hdf5_import import import_cache
from mmkd.cache_tools.upkeep.merge import merge_caches
from mmkd.cache_tools.upkeep.verify import verify_cache
from mmkd.data_manifests.errors import InputError, MmkdError
from tests.helpers.forked import Forked, contents
from tests.helpers.many_clips import files_of, logits_of, manifest_of
from tests.helpers.sleeping import stop_at, take_for_dead, told_that_it_slept
from tests.helpers.small_cache import write_cache

MANIFEST = manifest_of([1, 2, 4])
LOGITS = "targets.zarr/train/rgb/logits/verb/c/0/0/0"
WAIT_SECONDS = 60


class Sleeper(threading.Thread):
    """A task in a thread, whose changes of a store are numbered steps; before one of them it falls asleep."""

    def __init__(self, action: Callable[[Path], object], out: Path, at: int = -1) -> None:
        super().__init__(daemon=True)
        self.steps: list[str] = []
        self.error: BaseException | None = None
        self.asleep, self.awake = threading.Event(), threading.Event()
        self._action, self._out, self._at = action, out, at

    def run(self) -> None:
        try:
            self._action(self._out)
        except MmkdError as error:
            self.error = error
        finally:
            self.asleep.set()

    def reach(self, what: str, path: object) -> None:
        if threading.current_thread() is self:
            self.steps.append(f"{what} {os.path.relpath(path, self._out)}")
            if len(self.steps) - 1 == self._at:
                self.asleep.set()
                assert self.awake.wait(WAIT_SECONDS)


@pytest.fixture
def sleepers(monkeypatch):
    """Let sleepers see the steps of local stores; a list to put them into. Nothing is synced: no power fails."""
    running: list[Sleeper] = []
    place, delete, sweep = local_store.place_once, LocalStore.delete, LocalStore.sweep

    def reach(what, path):
        for sleeper in running:
            sleeper.reach(what, path)

    def placing(temporary, path, *, data, move):
        def moving(source, target):
            reach("moving", path)
            move(source, target)
            reach("moved", path)

        reach("writing", path)
        place(temporary, path, data=data, move=moving)

    def deleting(self, key):
        reach("deleting", self.root / key)
        delete(self, key)
        reach("deleted", self.root / key)

    def sweeping(self, writer):
        reach("sweeping", self.root / writer)
        sweep(self, writer)

    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(local_store, "place_once", placing)
    monkeypatch.setattr(LocalStore, "delete", deleting)
    monkeypatch.setattr(LocalStore, "sweep", sweeping)
    return running


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A finished cache, its export, an unfinished and a damaged copy."""
    root = tmp_path_factory.mktemp("world")
    write_cache(root / "cache", MANIFEST, logits_of(MANIFEST), shard_rows=4, shard_views=4)
    export_cache(root / "cache", root / "cache.h5")
    unfinished, damaged = (shutil.copytree(root / "cache", root / name) for name in ("unfinished", "damaged"))
    for name in ("root.json", "index.jsonl"):
        (unfinished / name).unlink()
    (damaged / LOGITS).write_bytes(b"torn")
    return root


def repair_and_import(world: Path, out: Path) -> None:
    verify_cache(out, repair=True)
    import_cache(world / "cache.h5", out)


SCENES = {
    "import": (None, import_cache_of := lambda world, out: import_cache(world / "cache.h5", out), import_cache_of),
    "merge": (None, lambda world, out: merge_caches([world / "cache"], out, MANIFEST), import_cache_of),
    "finalize": ("unfinished", finish := lambda _, out: finalize_cache(open_store(out)), finish),
    "repair": ("damaged", lambda _, out: verify_cache(out, repair=True), repair_and_import),
    "repair of what is finished meanwhile": ("unfinished", lambda _, out: verify_cache(out, repair=True), finish),
}
"""What is asleep -> (what is there before, what it does, what the other task does)."""


def kind(step: str) -> str:
    """Steps of one kind have the same code before and behind them."""
    return re.sub(r"[0-9a-f]{8,}|[0-9]+", "N", re.sub(r"(targets\.zarr|commits)/.*", r"\1/...", step))


def start(world: Path, scene: str, out: Path, at: int, sleepers: list[Sleeper]) -> Sleeper:
    before, action, _ = SCENES[scene]
    if before is not None:
        shutil.copytree(world / before, out)
    sleepers[:] = [Sleeper(lambda place: action(world, place), out, at)]
    sleepers[0].start()
    assert sleepers[0].asleep.wait(WAIT_SECONDS)
    return sleepers[0]


@pytest.mark.parametrize("scene", SCENES)
def test_who_sleeps_before_any_step_and_wakes_late_changes_nothing(world, scene, tmp_path, sleepers):
    whole = start(world, scene, tmp_path / "whole", -1, sleepers)
    kinds = [kind(step) for step in whole.steps]
    chosen = sorted({kinds.index(name) for name in kinds})
    assert len(chosen) >= 10
    told = 0
    for at in chosen[:: 2 if scene == "merge" else 1]:  # which writes as an import does
        out = tmp_path / f"{at}"
        sleeper = start(world, scene, out, at, sleepers)
        hour_ago = time.time() - 3600
        for sign in (out / "tasks").glob("*.json"):
            os.utime(sign, (hour_ago, hour_ago))
        SCENES[scene][2](world, out)
        sleeper.awake.set()
        sleeper.join(WAIT_SECONDS)
        assert isinstance(sleeper.error, (TakenOverError, InputError, type(None))), sleeper.error
        told += isinstance(sleeper.error, TakenOverError)
        where = f"{scene}, {sleeper.steps[at]}"
        assert verify_cache(out).damaged == {}, where
        left = {key: data for key, data in files_of(out).items() if not key.startswith((".tmp/", "tasks/"))}
        assert left == files_of(world / "cache"), where
    assert told >= 4


def test_a_buried_task_gives_no_sign_of_life_any_more(tmp_path):
    first, second = LocalStore(tmp_path), LocalStore(tmp_path)
    with Task(first, new_task_id(), beat_seconds=60) as dead, Task(second, new_task_id()) as own:
        assert live_tasks(first) == {dead.id, own.id}
        OtherTasks(own).bury(dead.id)
        for change in (dead.beat, lambda: first.create("claims/init/0.json", b""), lambda: first.sweep(own.id)):
            with pytest.raises(TakenOverError, match="another task went on while this one slept; run it again"):
                change()
        second.write("init.json", b"theirs")
        with pytest.raises(TakenOverError):
            first.delete("init.json")
        assert second.read("init.json") == b"theirs"
        assert live_tasks(first) == {own.id}
    assert files_of(tmp_path) == {"init.json": b"theirs"}


def test_a_task_that_has_just_begun_is_not_taken_for_dead(tmp_path):
    first, second = LocalStore(tmp_path), LocalStore(tmp_path)
    first.begin(new_task_id())  # and its first sign of life is still to come
    with Task(second, new_task_id()) as own:
        OtherTasks(own).sweep()
        first.write("init.json", b"mine")
        hour_ago = time.time() - 3600
        for folder in (tmp_path / ".tmp").iterdir():
            os.utime(folder, (hour_ago, hour_ago))
        OtherTasks(own).sweep()
        with pytest.raises(TakenOverError):
            first.write("init.json", b"mine")


def test_who_names_no_task_in_a_claim_buries_nobody(tmp_path):
    store = LocalStore(tmp_path / "cache")
    (tmp_path / "mine").mkdir()
    with Task(store, new_task_id()) as own:
        for name in ("", ".", "..", "../..", "../../mine", "/tmp", own.id):
            OtherTasks(own).bury(name) if name != own.id else store.sweep(name)
        store.write("init.json", b"x")
    assert (tmp_path / "mine").is_dir()


# ---- builds, in processes that are stopped


GROWN = (("--views", 4), ())
REPLACED = (("--replace", "rgb"), ("other", "boxes"))
"""Options of a build, and its experts."""


def sleep_through(quick: Forked, out: Path, where: str, *, asleep: tuple, awake: tuple) -> None:
    """Let a build be taken for dead where it stops, and go on after another's end."""
    sleeper = quick.start_build(out, *asleep[0], faults=stop_at(where), experts=asleep[1])
    sleeper.wait_stopped()
    take_for_dead(out, sleeper)
    other = quick.build(out, *awake[0], experts=awake[1])
    assert other.code == 0, other.err
    before = contents(out)
    assert verify_cache(out).damaged == {}
    sleeper.go_on()
    told_that_it_slept(sleeper)
    assert contents(out) == before


@pytest.fixture(scope="module")
def wide(quick, tmp_path_factory):
    out = tmp_path_factory.mktemp("wide") / "cache"
    assert quick.build(out, "--views", 4).code == 0
    return contents(out)


@pytest.fixture(scope="module")
def replaced(quick, tmp_path_factory):
    out = tmp_path_factory.mktemp("replaced") / "cache"
    assert quick.build(out, experts=("other", "boxes")).code == 0
    return contents(out)


GROWING = [
    r"deleting root\.json",
    r"written targets\.zarr/train/rgb/status/zarr\.json",
    r"written targets\.zarr/train/rgb/.*/c/0/1.*",
    r"written root\.json",
]
REPLACING = [
    r"deleting commits/train/rgb/.*",
    r"written targets\.zarr/train/rgb/.*/c/0/0.*",
    r"written index\.jsonl",
]


@pytest.mark.parametrize("where", GROWING)
def test_a_task_asleep_while_growing_the_cache_changes_nothing(quick, wide, tmp_path, where):
    out = quick.copy(tmp_path / "cache")
    sleep_through(quick, out, where, asleep=GROWN, awake=GROWN)
    assert contents(out) == wide


@pytest.mark.parametrize("where", REPLACING)
def test_a_task_asleep_while_replacing_an_expert_changes_nothing(quick, replaced, tmp_path, where):
    out = quick.copy(tmp_path / "cache")
    sleep_through(quick, out, where, asleep=REPLACED, awake=REPLACED)
    assert contents(out) == replaced


@pytest.mark.parametrize("where", [r"written targets\.zarr/train/rgb/.*/c/0/0.*", r"written root\.json"])
def test_a_task_asleep_while_others_replace_and_grow_changes_nothing(quick, replaced, wide, tmp_path, where):
    out = tmp_path / "replaced"
    sleep_through(quick, out, where, asleep=((), ()), awake=REPLACED)
    assert contents(out) == replaced
    sleep_through(quick, tmp_path / "wide", where, asleep=((), ()), awake=GROWN)
    assert contents(tmp_path / "wide") == wide
