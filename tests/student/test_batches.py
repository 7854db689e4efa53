"""Which clips and views make up which step, and reading them ahead."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkd.data_manifests.errors import InputError, VideoError
from mmkd.student.data.batches import Schedule
from mmkd.student.data.reading import read_by_threads


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 90),
    batch_size=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 50),
)
def test_an_epoch_holds_each_clip_once_in_even_batches(rows, batch_size, seed, epoch):
    steps = Schedule(rows, None, batch_size, seed).epoch(epoch)
    sizes = [len(step_rows) for step_rows, _ in steps]
    assert sorted(np.concatenate([step_rows for step_rows, _ in steps]).tolist()) == list(range(rows))
    assert len(steps) == Schedule(rows, None, batch_size, seed).steps_per_epoch
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert all((views == epoch).all() for _, views in steps)


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 30), views=st.integers(1, 9), seed=st.integers(0, 2**32 - 1), start=st.integers(0, 20))
def test_any_run_of_v_epochs_uses_each_view_once(rows, views, seed, start):
    schedule = Schedule(rows, views, 4, seed)
    seen = np.stack([schedule.views_at(start + number) for number in range(views)])
    assert (np.sort(seen, 0) == np.arange(views)[:, None]).all()


def test_rows_go_through_their_views_in_different_orders():
    schedule = Schedule(64, 8, 8, seed=1)
    assert len({tuple(schedule.views_at(epoch)[row] for epoch in range(8)) for row in range(64)}) > 50


def test_order_is_a_pure_function_of_seed_and_epoch():
    def order(seed, epoch):
        return np.concatenate([rows for rows, _ in Schedule(50, 3, 8, seed).epoch(epoch)]).tolist()

    assert order(1, 4) == order(1, 4)
    assert order(1, 4) != order(1, 5)
    assert order(1, 4) != order(2, 4)
    assert order(7, 0)[:6] == [34, 37, 8, 29, 48, 16]  # a resumed run of another version must not reorder


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 60),
    clips=st.integers(1, 6),
    repeats=st.integers(1, 4),
    epoch=st.integers(0, 20),
    fresh=st.booleans(),
)
def test_with_repeats_an_epoch_holds_each_clip_once_under_its_next_views(rows, clips, repeats, epoch, fresh):
    views = None if fresh else 4
    schedule, plain = Schedule(rows, views, clips * repeats, 3, repeats), Schedule(rows, views, clips, 3)
    steps = schedule.epoch(epoch)
    assert len(steps) == schedule.steps_per_epoch == plain.steps_per_epoch
    for (row, view), (plain_rows, _) in zip(steps, plain.epoch(epoch), strict=True):
        assert row.tolist() == [r for r in plain_rows.tolist() for _ in range(repeats)]  # the same order of clips
        turns = [epoch * repeats + n for n in range(repeats)]
        wanted = [turn if fresh else plain.views_at(turn)[r] for r in plain_rows for turn in turns]
        assert view.tolist() == wanted
        assert len({*zip(row.tolist(), view.tolist(), strict=True)}) == len(row)  # no view twice in a step


def test_with_repeats_each_view_is_used_equally_often():
    schedule = Schedule(10, 6, 8, 0, 4)  # 3 epochs of 4 turns are two rounds of 6 views
    used = np.zeros((10, 6), int)
    for rows, views in schedule.steps(0, 3 * schedule.steps_per_epoch):
        np.add.at(used, (rows, views), 1)
    assert (used == 2).all()


def test_the_steps_of_a_run_are_its_epochs_one_after_the_other_from_any_step():
    schedule = Schedule(11, 3, 4, 5)
    whole = [step for epoch in range(4) for step in schedule.epoch(epoch)]
    for first in (0, 2, 3, 7, 12):
        np.testing.assert_equal(list(schedule.steps(first, 11)), whole[first:11])


def test_the_order_of_views_does_not_depend_on_how_many_rows_are_ordered_together(monkeypatch):
    whole = Schedule(37, 5, 4, 9).views_at(7)
    monkeypatch.setattr("mmkd.student.data.batches.VIEW_ROWS", 8)
    np.testing.assert_array_equal(Schedule(37, 5, 4, 9).views_at(7), whole)


def test_more_repeats_than_views_are_refused():
    with pytest.raises(InputError, match=r"train\.repeats=3, and each clip has 2 views"):
        Schedule(8, 2, 6, 0, 3)


class Slow:
    """Items take a time that depends on the row; counts how many are being read."""

    def __init__(self, rows=24):
        self.rows, self.views, self.labels = rows, None, {}
        self.clip_ids = [f"clip-{row}" for row in range(rows)]
        self.started = 0
        self.lock = threading.Lock()

    def item(self, row, view):
        with self.lock:
            self.started += 1
        time.sleep(0.002 * (row % 5))
        return {"rgb": np.array([row, view])}


@pytest.mark.parametrize("threads", [1, 7])
def test_batches_come_in_order_whatever_the_threads_do(threads):
    steps = Schedule(24, None, 5, seed=0).epoch(2)
    batches = list(read_by_threads(Slow(), steps, threads=threads, ahead=3))
    assert len(batches) == len(steps)
    for batch, (rows, views) in zip(batches, steps, strict=True):
        np.testing.assert_array_equal(batch.rows, rows)
        np.testing.assert_array_equal(batch.inputs["rgb"], np.stack([rows, views], 1))


def test_reading_ahead_is_bounded_and_stops_when_nobody_reads_on():
    dataset = Slow(100)
    steps = Schedule(100, None, 5, seed=0).epoch(0)
    batches = read_by_threads(dataset, steps, threads=4, ahead=2)
    next(batches)
    time.sleep(0.2)
    assert dataset.started <= (1 + 1 + 2) * 5
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-clips")]


def test_an_unreadable_clip_is_named():
    class Broken(Slow):
        def item(self, row, view):
            raise VideoError("truncated")

    with pytest.raises(InputError, match=r"clip 'clip-3', view 9: truncated"):
        list(read_by_threads(Broken(), [(np.array([3]), np.array([9]))], threads=1, ahead=1))


def test_a_clip_is_decoded_once_for_all_of_its_views_in_a_step():
    decoded = []

    class Decoding(Slow):
        def items(self, row, views):
            decoded.append(row)
            return [self.item(row, view) for view in views]

    schedule = Schedule(7, None, 6, 0, 3)
    for batch, (rows, views) in zip(
        read_by_threads(Decoding(7), schedule.epoch(1), threads=3, ahead=2), schedule.epoch(1), strict=True
    ):
        np.testing.assert_array_equal(batch.inputs["rgb"], np.stack([rows, views], 1))
    assert sorted(decoded) == list(range(7))


def test_an_unreadable_view_among_several_of_a_clip_is_named():
    class Broken(Slow):
        def item(self, row, view):
            if view == 5:
                raise VideoError("truncated")
            return super().item(row, view)

    with pytest.raises(InputError, match=r"clip 'clip-3', view 5: truncated"):
        list(read_by_threads(Broken(), [(np.array([3, 3, 3]), np.array([4, 5, 6]))], threads=1, ahead=1))
