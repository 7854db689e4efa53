"""The loop: it learns, it distils, it resumes to the same bits, and it refuses what is not the same run."""

import errno
import json
import shutil
import signal

import numpy as np
import pytest
import torch

from mmkd.cache_tools.cache.sealed import open_seal, seal
from mmkd.cache_tools.cache.softmax import log_softmax
from mmkd.cache_tools.tasks.folder_lock import folder_lock, lock_files
from mmkd.data_manifests.errors import (
    FingerprintError,
    InputError,
    InterruptedByUserError,
    StorageError,
    VerificationError,
)
from mmkd.student.evaluation.metrics import evaluate
from mmkd.student.networks.networks import build_network, headed_network
from mmkd.student.recipes.loop import LoopRecipe
from mmkd.student.recipes.loss import LossOptions
from mmkd.student.recipes.train import TrainRecipe
from mmkd.student.training import checkpoint as checkpoint_module
from mmkd.student.training.checkpoint import checkpoints, latest_checkpoint
from mmkd.student.training.loop import fit
from mmkd.student.training.optimiser import learning_rate, make_optimizer
from mmkd.student.training.predict import predict
from tests.helpers.array_targets import ArrayTargets
from tests.helpers.moving_bars import Interrupting, MovingBars

HEADS = {"direction": 4}
LEARN = TrainRecipe(
    network="small3d", epochs=14, batch_size=16, learning_rate=3e-3, loader_threads=2, jitter={"hue": 0.0}
)
SHORT = TrainRecipe(network="small3d", epochs=3, batch_size=4, learning_rate=1e-3, loader_threads=2)


def new_network(recipe):
    return build_network(recipe, heads=HEADS, modality="rgb")


def run(recipe, dataset, network=None, **options):
    network = new_network(recipe) if network is None else network
    return network, fit(network, dataset, recipe, progress=False, **options)


def test_the_loop_learns_motion_from_labels():
    network, report = run(LEARN, MovingBars(96))
    test = MovingBars(40, seed=1)
    logits = predict(network, test, np.arange(40), np.array([0]), progress=False)["direction"]
    assert logits.shape == (40, 1, 4)
    assert evaluate(logits[:, 0], test.classes).top1 > 0.9
    assert report.steps == 14 * 6
    assert report.final_loss < 0.4


def test_a_student_without_labels_approaches_a_fixed_teacher():
    # A teacher that is unsure between opposite directions: labels alone could not teach this.
    table = np.array([[2, 1, 0, 0], [1, 2, 0, 0], [0, 0, 2, 1], [0, 0, 1, 2]], np.float32)
    train, test = MovingBars(96, views=4, labelled=False), MovingBars(40, seed=1)
    teacher = ArrayTargets({"direction": table[train.classes][:, None].repeat(4, 1)})
    network, _ = run(LEARN, train, targets=teacher, loss=LossOptions(temperature=2.0))
    logits = predict(network, test, np.arange(40), np.array([0]), progress=False)["direction"][:, 0]
    student, wanted = (
        log_softmax(logits.astype(np.float64)),
        log_softmax(table[test.classes].astype(np.float64)),
    )
    divergence = (np.exp(wanted) * (wanted - student)).sum(1).mean()
    uniform = (np.exp(wanted) * (wanted + np.log(4))).sum(1).mean()
    assert divergence < 0.25 * uniform
    assert (logits.argmax(1) == test.classes).mean() > 0.8


@pytest.mark.parametrize("with_targets", [False, True])
def test_stopped_and_resumed_is_bitwise_the_undisturbed_run(tmp_path, with_targets):
    options = {}
    if with_targets:
        draw = np.random.default_rng(0)
        options["targets"] = ArrayTargets({"direction": draw.normal(size=(18, 3, 4)).astype(np.float32)})
    whole, report = run(SHORT, MovingBars(18, views=3), run_dir=tmp_path / "whole", **options)
    stops = [0]
    for at, number in ((10, signal.SIGUSR1), (12, signal.SIGTERM)):
        recipe = SHORT.model_copy(update={"loader_threads": 1 + at % 3, "prefetch_batches": 1})
        dataset = Interrupting(18, views=3, at=at, number=number)
        with pytest.raises(InterruptedByUserError, match="of 15 steps are kept; run the same command again"):
            run(recipe, dataset, run_dir=tmp_path / "parts", **options)
        stops.append(int(latest_checkpoint(tmp_path / "parts").name.split("-")[1]))
    assert stops[0] < stops[1] < stops[2] < 15
    assert stops[1] % 5 or stops[2] % 5  # at least one of them within an epoch
    parts, resumed = run(SHORT, MovingBars(18, views=3), run_dir=tmp_path / "parts", **options)
    assert (resumed.steps, resumed.resumed_at) == (15, stops[2])
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert resumed.final_loss == report.final_loss


def losses(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    return [(line["loss"], line["learning_rate"], line["steps"]) for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("finished")
    return run_dir, *run(SHORT, MovingBars(6), run_dir=run_dir)


def test_a_finished_run_is_not_done_again(finished):
    run_dir, network, report = finished
    again, second = run(SHORT, MovingBars(6), run_dir=run_dir)
    assert (second.resumed_at, second.steps, second.clips_per_second) == (report.steps, report.steps, 0.0)
    assert second.final_loss == report.final_loss
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    assert not again.training
    assert [path.name for path in checkpoints(run_dir)] == ["checkpoint-000000006", "checkpoint-000000004"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"recipe": {"learning_rate": 0.01}}, "recipe.learning_rate: checkpoint 0.001, now 0.01"),
        ({"dataset": MovingBars(7)}, "clips.count: checkpoint 6, now 7"),
        ({"dataset": MovingBars(6, views=2)}, "clips.views"),
        ({"dataset": MovingBars(6, labelled=False)}, "labels.direction"),
        ({"identity": {"cache": "other"}}, "extra.cache"),
        ({"network": new_network(SHORT.model_copy(update={"seed": 5}))}, "initial_weights"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_difference(finished, change, field):
    recipe = SHORT.model_copy(update=change.get("recipe", {}))
    dataset = change.get("dataset", MovingBars(6))
    targets = None
    if (dataset.labels["direction"] < 0).all():
        targets = ArrayTargets({"direction": np.zeros((6, 9, 4), np.float32)})
    with pytest.raises(FingerprintError, match=field):
        run(
            recipe,
            dataset,
            change.get("network"),
            run_dir=finished[0],
            identity=change.get("identity"),
            targets=targets,
        )


@pytest.mark.parametrize("name", ["network.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_of_a_damaged_checkpoint_the_one_before_is_taken_and_without_one_it_is_refused(
    finished, tmp_path, caplog, name, damage
):
    run_dir = shutil.copytree(finished[0], tmp_path / "copy")
    newest, before = checkpoints(run_dir)
    spoil(newest / name, damage)
    network, report = run(SHORT, MovingBars(6), run_dir=run_dir)
    assert report.resumed_at == 4
    assert f"continuing from the one before it, {before}" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), finished[1].parameters(), strict=True))
    assert checkpoints(run_dir) == [newest, before]
    for path in (newest, before):
        spoil(path / name, damage)
    with pytest.raises(VerificationError, match="to start over"):
        run(SHORT, MovingBars(6), run_dir=run_dir)


def spoil(path, damage):
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        data[len(data) // 2] ^= 0x20
        path.write_bytes(bytes(data if damage == "flip" else data[:-9]))


def test_what_a_killed_save_leaves_is_ignored_and_removed(finished, tmp_path):
    run_dir = tmp_path / "copy"
    shutil.copytree(finished[0], run_dir)
    torn = run_dir / ".checkpoint-000000099.tmp"
    torn.mkdir()
    (torn / "network.safetensors").write_bytes(b"half")
    longer = SHORT.model_copy(update={"epochs": 3})
    _, report = run(longer, MovingBars(6), run_dir=run_dir)
    assert report.resumed_at == 6
    with pytest.raises(InterruptedByUserError):
        run(SHORT, Interrupting(6, at=2), run_dir=tmp_path / "new")
    (tmp_path / "new" / ".checkpoint-000000002.tmp").mkdir()
    run(SHORT, MovingBars(6), run_dir=tmp_path / "new")
    names = sorted(path.name for path in (tmp_path / "new").glob("*checkpoint*"))
    assert names == ["checkpoint-000000004", "checkpoint-000000006"]


def test_nothing_but_its_own_checkpoints_is_removed_or_read(tmp_path):
    """Names that resemble a checkpoint's are a user's: copies, notes, the best one."""
    foreign = ["checkpoint-best", "my-checkpoint-1", "checkpoint-000000003-copy", ".checkpoint-9.tmp"]
    for name in foreign:
        (tmp_path / name).mkdir()
        (tmp_path / name / "kept").write_text("")
    with pytest.raises(InterruptedByUserError):
        run(SHORT, Interrupting(6, at=2), run_dir=tmp_path)
    note = latest_checkpoint(tmp_path) / "note.txt"
    note.write_text("why it was stopped")
    _, report = run(SHORT, MovingBars(6), run_dir=tmp_path)
    assert report.resumed_at > 0
    assert all((tmp_path / name / "kept").exists() for name in foreign)
    assert [path.name for path in note.parent.iterdir()] == ["note.txt"]
    assert latest_checkpoint(tmp_path).name == "checkpoint-000000006"


def test_a_checkpoint_that_the_machine_cannot_read_is_not_called_damaged(finished, tmp_path, monkeypatch):
    def stale(path, **options):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(checkpoint_module, "read_regular", stale)
    with pytest.raises(StorageError, match=r"cannot read .*Stale file handle"):
        run(SHORT, MovingBars(6), run_dir=finished[0])


@pytest.mark.parametrize("damage", [lambda text: text[:-30], lambda text: "{" + text, lambda text: ""])
def test_damaged_metrics_are_written_again_from_the_checkpoint(finished, tmp_path, damage):
    run_dir = shutil.copytree(finished[0], tmp_path / "copy")
    path = run_dir / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(damage(whole))
    _, report = run(SHORT.model_copy(update={"epochs": 3}), MovingBars(6), run_dir=run_dir)
    assert report.final_loss == finished[2].final_loss
    assert path.read_text() == whole


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda lines: lines[:2], "it has not each of 3 epochs in order"),
        (lambda lines: [lines[0], "{", lines[2]], "Expecting property name"),
        (lambda lines: [lines[0], lines[1].replace("loss", "lass"), lines[2]], "loss: Field required"),
        (lambda lines: [lines[1], lines[0], lines[2]], "it has not each of 3 epochs in order"),
    ],
)
def test_damaged_metrics_of_an_earlier_version_are_left_out_with_a_warning(
    finished, tmp_path, caplog, damage, said
):
    run_dir = shutil.copytree(finished[0], tmp_path / "copy")
    state = latest_checkpoint(run_dir) / "state.json"
    fields = open_seal(state.read_bytes())
    del fields["metrics"]
    state.write_text(json.dumps(seal(fields)))
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines()
    _, whole = run(SHORT, MovingBars(6), run_dir=run_dir)
    assert whole.final_loss == finished[2].final_loss
    path.write_text("\n".join(damage(lines)) + "\n")
    _, report = run(SHORT, MovingBars(6), run_dir=run_dir)
    assert report.resumed_at == 6
    assert np.isnan(report.final_loss)
    assert "metrics.jsonl is damaged" in caplog.text
    assert said in caplog.text


def test_a_run_whose_folder_was_taken_over_writes_nothing_more(tmp_path):
    with folder_lock(tmp_path / "run") as lock:
        with pytest.raises(InterruptedByUserError):
            run(SHORT, Interrupting(6, at=2), run_dir=tmp_path / "run", lock=lock)
        before = sorted(tmp_path.rglob("*"))
        for path in lock_files(tmp_path / "run"):
            card = json.loads(path.read_text()) | {"id": "another", "host": "node7"}
            path.with_name(".mmkd-lock-000001.json").write_text(json.dumps(card))
        with pytest.raises(InputError, match=r"was taken over by process .* on host node7"):
            run(SHORT, MovingBars(6), run_dir=tmp_path / "run", lock=lock)
        assert before == sorted(set(tmp_path.rglob("*")) - {tmp_path / "run" / ".mmkd-lock-000001.json"})


def test_training_leaves_the_random_state_alone():
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    run(SHORT, MovingBars(4))
    assert torch.equal(torch.rand(3), expected)


class Flow(MovingBars):
    def item(self, row, view):
        flow = np.zeros((4, 2, 16, 16), np.float32)
        flow[0, 0, 0, 0] = np.nan if row == 5 else 1.0
        return {"flow": flow}


def test_a_clip_that_is_not_finite_is_named():
    network = build_network(SHORT, heads=HEADS, modality="flow")
    with pytest.raises(InputError, match=r"step 0: .* not finite; clips .*'bar-5'"):
        run(SHORT.model_copy(update={"batch_size": 8}), Flow(8), network)


def test_a_target_that_is_not_finite_is_named():
    class Infinite(ArrayTargets):
        def valid(self, rows, views):
            return np.ones(len(rows), bool)

    logits = np.zeros((8, 1, 4), np.float32)
    logits[2, 0, 1] = np.inf
    recipe = SHORT.model_copy(update={"batch_size": 8})
    with pytest.raises(InputError, match=r"clips 'bar-2'\. Lower learning_rate"):
        run(recipe, MovingBars(8, views=1), targets=Infinite({"direction": logits}))


def test_nothing_to_learn_is_refused():
    with pytest.raises(InputError, match="no clip to train on"):
        run(SHORT, MovingBars(0))
    with pytest.raises(InputError, match="no training clip has a label of head 'direction'"):
        run(SHORT, MovingBars(4, labelled=False))


def test_the_rate_rises_to_the_peak_and_falls_to_zero():
    recipe = LoopRecipe(epochs=10, warmup_epochs=2, learning_rate=0.4)
    rates = [learning_rate(recipe, step, 5) for step in range(50)]
    assert rates[0] == pytest.approx(0.04)
    assert rates[9] == rates[10] == pytest.approx(0.4)
    assert rates[30] == pytest.approx(0.2)
    assert rates[49] == pytest.approx(0.01)
    assert np.allclose(np.diff(rates[10:]), -0.01)
    assert learning_rate(recipe.model_copy(update={"warmup_epochs": 0}), 0, 5) == pytest.approx(0.4)
    assert learning_rate(LoopRecipe(epochs=1), 0, 1) == LoopRecipe().learning_rate


def test_norms_and_biases_do_not_decay():
    network = headed_network("swin3d_t", heads=HEADS, channels=3)
    optimizer = make_optimizer(network, LoopRecipe(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in network.named_parameters():
        plain = name.endswith(".bias") or "norm" in name or "relative_position_bias_table" in name
        assert decay[id(parameter)] == (0.0 if plain else 0.3), name


def test_gradients_are_clipped_to_the_norm():
    recipe = SHORT.model_copy(update={"epochs": 1, "batch_size": 8})
    network = new_network(recipe)
    run(recipe.model_copy(update={"clip_norm": 1e-3}), MovingBars(8), network)
    squares = [parameter.grad.square().sum() for parameter in network.parameters()]
    assert torch.stack(squares).sum().sqrt().item() == pytest.approx(1e-3, rel=1e-3)


def test_predict_pads_the_last_batch_and_does_not_depend_on_its_neighbours():
    dataset = MovingBars(7)
    network = new_network(SHORT).train()
    rows, views = np.array([4, 0, 6]), np.array([2, 5])
    logits = predict(network, dataset, rows, views, batch_size=4, progress=False)["direction"]
    assert network.training
    alone = predict(network, dataset, rows[2:], views[1:], batch_size=4, progress=False)["direction"]
    np.testing.assert_array_equal(logits[2, 1], alone[0, 0])
    frames = torch.from_numpy(np.stack([dataset.item(6, 5)["rgb"]] * 4))
    with torch.inference_mode():
        expected = network.eval()({"rgb": frames})["direction"][0]
    np.testing.assert_array_equal(logits[2, 1], expected.numpy())


def test_predict_computes_in_the_precision_that_is_asked_for():
    dataset, network = MovingBars(4), new_network(SHORT).eval()
    rows, view = np.arange(4), np.zeros(1, np.int64)
    frames = torch.from_numpy(np.stack([dataset.item(row, 0)["rgb"] for row in rows]))
    with torch.inference_mode():
        full = network({"rgb": frames})["direction"].numpy()
        with torch.autocast("cpu", torch.bfloat16):
            half = network({"rgb": frames})["direction"].float().numpy()
    assert not np.array_equal(full, half)
    for precision, wanted in (("auto", full), ("fp32", full), ("bf16", half)):
        found = predict(network, dataset, rows, view, batch_size=4, precision=precision, progress=False)
        np.testing.assert_array_equal(found["direction"][:, 0], wanted)
