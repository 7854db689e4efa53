"""`mmkd-student show`: what trainings did, in words, as CSV and as curves that are the numbers of their epochs."""

import csv
import io
import json
import shutil
import sys
from dataclasses import asdict
from itertools import pairwise

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg

from mmkd.cache_tools.tasks.folder_lock import folder_lock
from mmkd.data_manifests.errors import InputError
from mmkd.student.evaluation.run_files import RunRecord, write_run
from mmkd.student.looking.curves import draw, spread
from mmkd.student.looking.history import read_histories, read_history, short_names
from mmkd.student.networks.networks import build_network
from mmkd.student.recipes.train import TrainRecipe
from mmkd.student.training.best import best_epoch
from mmkd.student.training.loop import fit
from mmkd.student.training.step_log import Interval, intervals_csv
from tests.helpers.in_process import call, call_ok, refused
from tests.helpers.moving_bars import MovingBars
from tests.helpers.places import unpack_before

SHORT = TrainRecipe(network="small3d", epochs=2, batch_size=4, learning_rate=1e-3, loader_threads=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two epochs that were validated."""
    run = tmp_path_factory.mktemp("runs") / "bars"
    recipe = {"train": SHORT.model_dump(mode="json")}
    write_run(run, RunRecord(recipe, "", {}, labels_only=True, fresh_views=False, weights=None, versions={}))
    found = iter([{"direction": {"clips": 4.0, "top1": top1, "nll": 1.0}} for top1 in (0.75, 0.5)])
    network = build_network(SHORT, heads={"direction": 4}, modality="rgb")
    fit(network, MovingBars(8), SHORT, run_dir=run, validate=lambda _: next(found), progress=False)
    return run


def written(folder, name, losses, top1=None, epochs=60):
    """A run whose metrics are these."""
    run = folder / name
    recipe = {"train": {"epochs": epochs}}
    write_run(run, RunRecord(recipe, "", {}, labels_only=False, fresh_views=False, weights=None, versions={}))
    lines = [
        {
            "epoch": n,
            "steps": 3 * n + 3,
            "loss": loss,
            "learning_rate": 1e-4 / (n + 1),
            "clips_per_second": 50.0 + n,
        }
        | ({} if top1 is None else {"held_out": {"action": {"clips": 9.0, "top1": top1[n], "nll": 1.0}}})
        for n, loss in enumerate(losses)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_it_tells_what_a_training_wrote_and_which_epoch_was_the_best(trained):
    history = read_history(trained, "bars")
    stored = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [values.to_json() for values in history.metrics] == stored
    assert (history.kind, history.state, history.epochs) == ("baseline", "not finished", 2)
    assert history.best("direction") == (1, 0.75)
    out = call_ok("mmkd-student", "show", trained)
    assert f"bars: baseline, not finished, 2 of 2 epochs, loss {stored[-1]['loss']:.4f}" in out
    assert "held-out direction: best top-1 75.0 % after epoch 1, last 50.0 %" in out
    shown = json.loads(call_ok("mmkd-student", "show", trained, "--json"))["runs"][0]
    assert shown["epochs"] == stored
    assert shown["best_held_out"] == {"direction": {"epoch": 0, "top1": 0.75}}


def test_of_epochs_with_the_same_accuracy_the_one_of_the_least_cross_entropy_is_the_best(trained, tmp_path):
    """As the training itself has it, which keeps that epoch's weights."""
    run = shutil.copytree(trained, tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line, nll in zip(lines, (2.0, 1.0), strict=True):
        line["held_out"]["direction"] |= {"top1": 0.5, "nll": nll}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_history(run, "bars").best("direction") == (2, 0.5)
    assert best_epoch(read_history(run, "bars").metrics) == 1


def test_runs_and_experts_stand_side_by_side_with_their_accuracies(tmp_path, monkeypatch):
    root = unpack_before(tmp_path)
    monkeypatch.chdir(root)
    (root / "experts" / "half").mkdir()
    shutil.copytree(root / "experts" / "rgb" / "training", root / "experts" / "half" / "training")
    monkeypatch.setenv("COLUMNS", "80")
    shown = call("mmkd-student", "show", "run", "stopped", "experts/rgb", "experts/half", "experts/boxes/training")
    assert shown.code == 0, shown.err
    assert max(map(len, shown.out.splitlines())) <= 80
    text = " ".join(shown.out.split())
    assert "run: student, finished, 2 of 2 epochs, loss 0.0386, 151 clips/s" in text
    assert (
        "standard action: top-1 25.0, top-5 50.0, ECE 17.3 (4 clips); says what the teacher says on 0.0 %" in text
    )
    assert "stopped: student, not finished, 1 of 30 epochs, loss 0.0385" in text
    assert "rgb: expert, finished, 1 of 1 epoch, loss 2.6530, 36.1 clips/s" in text
    assert "half: expert, not finished, 1 of 1 epoch" in text
    assert "boxes: expert, finished" in text


def test_a_run_that_somebody_holds_is_at_work_and_one_that_nobody_holds_is_not(tmp_path):
    run = written(tmp_path, "run", [])
    with folder_lock(run):
        assert read_history(run, "run").state == "at work"
        assert "run: student, at work, 0 of 60 epochs\n" in call_ok("mmkd-student", "show", run)
    assert read_history(run, "run").state == "not finished"
    assert "no epoch is finished yet" in refused("mmkd-student", "show", run, "-o", tmp_path / "curves.png")


def test_an_epoch_that_is_not_finished_is_told_by_its_last_steps(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "bars")
    rows = [Interval(1, 2, 1, 1.5, 0.5, 1e-3, 9.0), Interval(3, 4, 2, 1.25, 0.5, 1e-3, 8.5)]
    (run / "steps.csv").write_text(intervals_csv(rows))
    assert "2 of 2 epochs, loss" in call_ok("mmkd-student", "show", run), "those steps are of finished epochs"
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().splitlines(keepends=True)[0])
    assert "1 of 2 epochs, step 4, loss 1.2500, 8.5 clips/s" in call_ok("mmkd-student", "show", run)
    (run / "metrics.jsonl").unlink()
    shown = json.loads(call_ok("mmkd-student", "show", run, "--json"))["runs"][0]
    assert shown["since"] == asdict(rows[1])


def test_the_csv_has_every_number_of_every_epoch(trained, tmp_path):
    other = written(tmp_path, "other", [0.5, 0.25, 0.125])
    out = tmp_path / "numbers.csv"
    for _ in range(2):  # its own file is written over
        call_ok("mmkd-student", "show", trained, other, "--csv", out)
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    assert [row["run"] for row in rows] == ["bars"] * 2 + ["other"] * 3
    for row, history in zip(rows, [read_history(trained, "")] * 2 + [read_history(other, "")] * 3, strict=True):
        values = history.metrics[int(row["epoch"]) - 1]
        for field in ("steps", "loss", "learning_rate", "clips_per_second"):
            assert float(row[field]) == getattr(values, field), "every digit"
    assert [row["held_out_direction_top1"] for row in rows] == ["0.75", "0.5", "", "", ""]


def test_the_curves_are_the_numbers_of_the_epochs(tmp_path):
    draws = np.random.default_rng(0)
    losses, accuracies = draws.random((3, 20)) + 0.1, draws.random((3, 20))
    runs = [written(tmp_path, f"run {n}", losses[n, : 20 - 5 * n], accuracies[n]) for n in range(3)]
    histories = read_histories(runs)
    figure = draw(histories)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert [title.split()[0] for title in titles] == ["Training", "Top-1", "Learning", "Clips"]
    assert "units of $10^{-4}$" in titles[2]
    for axes, expected in zip(
        figure.axes,
        (
            losses,
            100 * accuracies,
            np.tile(1 / np.arange(1, 21), (3, 1)),
            np.tile(50 + np.arange(20), (3, 1)),
        ),
        strict=True,
    ):
        lines = [line for line in axes.lines if len(line.get_xdata()) > 2]
        assert len({line.get_color() for line in lines}) == 3
        for n, line in enumerate(lines):
            assert list(line.get_xdata()) == list(range(1, 21 - 5 * n))
            np.testing.assert_allclose(line.get_ydata(), expected[n][: 20 - 5 * n], rtol=1e-12)
        named = {text.get_text(): text.get_color() for text in axes.texts}
        assert [named[name] for name in sorted(named)] == [line.get_color() for line in lines]
    best = {text.get_text() for text in figure.axes[1].texts}
    assert best == {f"run {n} {100 * accuracies[n, : 20 - 5 * n].max():.1f}" for n in range(3)}


@pytest.mark.parametrize("count", [2, 6, 14])
def test_names_do_not_overlap_and_are_inside_the_picture(tmp_path, count):
    runs = [written(tmp_path, f"with a name, ${n}_x$", [2.0, 1 + 1e-3 * n], [0.3, 0.5]) for n in range(count)]
    figure = draw(read_histories(runs))
    FigureCanvasAgg(figure).draw()  # places are final
    width, height = figure.get_size_inches() * figure.dpi
    for axes in figure.axes:
        boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
        assert len(boxes) == count
        assert all(below.y0 + 0.8 * below.height <= above.y0 for below, above in pairwise(boxes))
        assert all(box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height for box in boxes)


def test_the_picture_is_a_png_that_depends_on_the_numbers_alone(trained, tmp_path):
    out = tmp_path / "curves.png"
    call_ok("mmkd-student", "show", trained, "-o", out)
    first = out.read_bytes()
    call_ok("mmkd-student", "show", trained, "-o", out)  # its own picture is drawn over
    assert out.read_bytes() == first
    image = cv2.imread(str(out))
    assert image.shape == (1050, 1650, 3)
    blue = (image == (0xB2, 0x72, 0x00)).all(-1)  # the first colour, in OpenCV's order
    assert blue.sum() > 1000


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.floats(0, 0.12))
def test_names_are_spread_in_their_order_and_stay_where_there_is_room(heights, gap):
    found = spread(heights, gap)
    order = np.argsort(heights, kind="stable")
    placed = np.array(found)[order]
    assert (np.diff(placed) >= gap - 1e-9).all()
    assert placed[0] >= -1e-9
    assert placed[-1] <= 1 + 1e-9
    if (np.diff(np.sort(heights)) >= gap).all():
        np.testing.assert_allclose(found, heights, atol=1e-9)


def test_two_names_of_one_height_part_by_half_a_gap_each():
    np.testing.assert_allclose(spread([0.5, 0.5, 0.9], 0.1), [0.45, 0.55, 0.9])
    np.testing.assert_allclose(spread([0.0, 0.0, 0.0], 0.1), [0.0, 0.1, 0.2])
    np.testing.assert_allclose(spread([1.0, 1.0], 0.1), [0.9, 1.0])


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [tmp_path / "seed-0" / "student", tmp_path / "seed-1" / "student"]
    assert short_names(folders) == ["seed-0/student", "seed-1/student"]
    assert short_names([*folders[:1], tmp_path / "b"]) == ["student", "b"]
    with pytest.raises(InputError, match="named twice"):
        read_histories([folders[0], tmp_path / "seed-0" / "." / "student"])


def test_what_cannot_be_shown_is_refused_in_one_line_and_nothing_is_written(trained, tmp_path, monkeypatch):
    run = shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "empty").mkdir()
    assert "is not a run of `mmkd-student train`" in refused("mmkd-student", "show", run, tmp_path / "empty")
    for out, words in {"curves.pdf": r"name it *.png", "taken.png": "is not a picture that"}.items():
        (tmp_path / "taken.png").write_text("somebody's")
        assert words in refused("mmkd-student", "show", run, "-o", tmp_path / out)
    assert (tmp_path / "taken.png").read_text() == "somebody's"
    (tmp_path / "notes.csv").write_text("a,b\n")
    error = refused("mmkd-student", "show", run, "--csv", tmp_path / "notes.csv")
    assert "name another file with --csv" in error
    lines = (run / "metrics.jsonl").read_text().splitlines()
    for broken in ("{", json.dumps({**json.loads(lines[1]), "loss": "low"}), lines[0]):
        (run / "metrics.jsonl").write_text(f"{lines[0]}\n{broken}\n")
        assert "metrics.jsonl line 2 is damaged" in refused("mmkd-student", "show", run)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    error = refused("mmkd-student", "show", trained, "-o", tmp_path / "curves.png")
    assert "pip install 'mmkd[plots]'" in error
    assert not (tmp_path / "curves.png").exists()
    call_ok("mmkd-student", "show", trained, "--csv", tmp_path / "numbers.csv")
