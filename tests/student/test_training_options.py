"""What a recipe may ask of the loop beyond its defaults: each option against torch's own, or a closed form."""

import copy
import json
import logging
import math
import os
import signal
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mmkd.data_manifests.errors import InputError, InterruptedByUserError
from mmkd.student.data.batches import Schedule
from mmkd.student.networks.blocks import blocks
from mmkd.student.networks.networks import build_network, headed_network
from mmkd.student.networks.recompute import recompute_blocks
from mmkd.student.recipes.augment import JitterRecipe
from mmkd.student.recipes.loop import AveragingRecipe, LoopRecipe
from mmkd.student.recipes.loss import LossOptions
from mmkd.student.recipes.train import TrainRecipe
from mmkd.student.training.averaging import Average
from mmkd.student.training.best import best_epoch, is_over
from mmkd.student.training.checkpoint import checkpoints
from mmkd.student.training.devices import repeating_gradients, reproducible
from mmkd.student.training.epoch_metrics import EpochMetrics
from mmkd.student.training.late import LateResults
from mmkd.student.training.loop import fit
from mmkd.student.training.optimiser import layer_depths, learning_rate, make_optimizer
from mmkd.student.training.predict import predict
from mmkd.student.training.watch import Watch
from tests.helpers.array_targets import ArrayTargets
from tests.helpers.moving_bars import Interrupting, MovingBars
from tests.helpers.plain_network import Plain, plain

HEADS = {"direction": 4}
SHORT = TrainRecipe(network="small3d", epochs=3, batch_size=4, learning_rate=1e-3, loader_threads=1)


STILL = JitterRecipe(brightness=0, contrast=0, saturation=0, hue=0)


def changed(**fields):
    return SHORT.model_copy(update=fields)


def run(recipe, dataset, network=None, **options):
    network = build_network(recipe, heads=HEADS, modality="rgb") if network is None else network
    return network, fit(network, dataset, recipe, progress=False, **options)


def same_weights(one, other):
    return all(
        torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("without_target", ["drop", "label-only"])
def test_a_step_in_parts_is_the_step_in_one(without_target):
    """Also where rows without targets or labels lie unevenly in the parts."""
    dataset = MovingBars(13, views=2)
    dataset.labels["direction"][[0, 3, 4]] = -1
    logits = np.random.default_rng(0).normal(size=(13, 2, 4)).astype(np.float32)
    logits[[1, 2, 3, 7]] = np.nan
    options = {"targets": ArrayTargets({"direction": logits})}
    options["loss"] = LossOptions(label_weight=0.4, temperature=2.0, without_target=without_target)
    recipe = changed(batch_size=7, optimizer="sgd", clip_norm=1e9)  # sgd: AdamW divides rounding by itself
    whole, report = run(recipe, dataset, plain(), **options)
    parts, other = run(recipe.model_copy(update={"accumulate": 3}), dataset, plain(), **options)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert other.final_loss == pytest.approx(report.final_loss, rel=1e-6)


def test_more_parts_than_clips_are_as_many_as_clips():
    network, _ = run(changed(batch_size=4, accumulate=4), MovingBars(5), plain())
    assert all(value.isfinite().all() for value in network.parameters())


def test_the_average_is_the_closed_form():
    network = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    average = Average(network, AveragingRecipe(decay=0.8))
    wanted = None
    for n, value in enumerate([1.0, 5.0, -2.0, 7.0, 7.0, 3.0]):
        for tensor in [*network.parameters(), network[1].running_mean]:
            tensor.data.fill_(value)
        network[1].num_batches_tracked.fill_(n)
        average.update(network)
        decay = min(0.8, (1 + n) / (10 + n))
        wanted = value if n == 0 else decay * wanted + (1 - decay) * value
        for tensor in [*average.network.parameters(), average.network[1].running_mean]:
            assert tensor.item() == pytest.approx(wanted, rel=1e-6)
        assert average.network[1].num_batches_tracked == n


def test_an_averaged_run_leaves_the_average_and_trains_as_without():
    network, _ = run(changed(averaging=AveragingRecipe(decay=0.9)), MovingBars(12))
    without, _ = run(SHORT, MovingBars(12))
    seen = []

    def validate(network):
        seen.append({name: value.clone() for name, value in network.state_dict().items()})
        return {"direction": {"top1": 0.5, "nll": -float(len(seen))}}

    best, _ = run(changed(averaging=AveragingRecipe(decay=0.9)), MovingBars(12), validate=validate)
    assert not same_weights(network, without)
    assert all(torch.equal(value, seen[2][name]) for name, value in network.state_dict().items())
    # Of equal accuracies the lowest cross-entropy is the best, here the last: and it is the average that was seen.
    assert same_weights(network, best)


def test_the_cosine_schedule_is_torchs():
    recipe = LoopRecipe(epochs=10, warmup_epochs=0, learning_rate=0.3, schedule="cosine")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    for step in range(50):
        assert learning_rate(recipe, step, 5) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        theirs.step()
    warm = recipe.model_copy(update={"warmup_epochs": 2})
    assert learning_rate(warm, 9, 5) == learning_rate(warm, 10, 5) == 0.3
    assert learning_rate(warm, 30, 5) == pytest.approx(0.15)


def test_the_rate_grows_with_the_batch_where_asked_for_and_is_printed(caplog):
    caplog.set_level(logging.INFO)
    recipe = changed(batch_size=8, rate_for_batch=2)
    run(recipe, MovingBars(8))
    assert recipe.peak_rate == pytest.approx(4e-3)
    assert learning_rate(recipe, 2, 1) == pytest.approx(4e-3 / 3)
    assert "learning rate 0.004: 0.001 is for batches of 2 clips, and these are of 8" in caplog.text


def test_layers_decay_towards_the_stem():
    network = nn.Sequential()
    network.stem = nn.Linear(2, 2)
    network.layers = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(3)))
    network.norm = nn.LayerNorm(2)
    network.heads = nn.ModuleDict({"a": nn.Linear(2, 2)})
    depths = dict(layer_depths(network))
    wanted = {"stem": 4, "layers.0": 3, "layers.1": 2, "layers.2": 1, "norm": 1, "heads": 0}
    assert depths == {n: next(d for prefix, d in wanted.items() if n.startswith(prefix)) for n in depths}
    optimizer = make_optimizer(network, LoopRecipe(layer_decay=0.5, weight_decay=0.1))
    shares = {id(p): (g["share"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in network.named_parameters():
        assert shares[id(parameter)] == (0.5 ** depths[name], 0.1 if parameter.ndim > 1 else 0.0), name


def test_the_blocks_of_known_networks():
    found = [name for name, _ in blocks(headed_network("swin3d_t", heads=HEADS, channels=3))]
    assert sum(name.count(".") == 3 for name in found) == 2 + 2 + 6 + 2  # Video Swin-T's depths
    assert len(blocks(headed_network("mvit_v2_s", heads=HEADS, channels=3))) == 16
    assert len(blocks(headed_network("tsm_resnet50", heads=HEADS, channels=3))) == 3 + 4 + 6 + 3
    assert len(blocks(headed_network("small3d", heads=HEADS, channels=3))) == 6


@pytest.mark.parametrize(("part", "learns"), [("backbone", {"heads"}), ("batch_norm", {"heads", "conv"})])
def test_what_is_frozen_stays_with_its_statistics(part, learns):
    recipe = changed(freeze=part, weight_decay=0.1)
    before = build_network(recipe, heads=HEADS, modality="rgb").state_dict()
    pixels = np.arange(4)

    def validate(network):  # as a real one does: it leaves the network in training mode, and all of it
        predict(network, MovingBars(4), pixels, np.array([0]), progress=False)
        network.train()
        return {"direction": {"top1": 0.5, "nll": -float(next(network.parameters()).detach().sum())}}

    network, _ = run(recipe, MovingBars(12), validate=validate)
    layers = dict(network.named_modules())
    for name, value in network.state_dict().items():
        is_norm = isinstance(layers[name.rpartition(".")[0]], nn.BatchNorm3d)
        kind = "heads" if ".heads." in name else ("norm" if is_norm else "conv")
        assert torch.equal(value, before[name]) == (kind not in learns), name


def test_a_network_without_that_part_cannot_freeze_it():
    with pytest.raises(InputError, match="this network has no batch norms"):
        run(changed(freeze="batch_norm"), MovingBars(4), plain())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputing_activations_changes_no_bit(precision):
    """Dropout draws the same, and batch norms count a step once."""
    plainly, _ = run(changed(precision=precision), MovingBars(12))
    recomputed, _ = run(changed(precision=precision, gradient_checkpointing=True), MovingBars(12))
    assert same_weights(plainly, recomputed)
    assert all(v == 9 for name, v in recomputed.state_dict().items() if name.endswith("num_batches_tracked"))


def test_recomputing_keeps_fewer_activations():
    kept = []
    for recompute in (False, True):
        network = build_network(SHORT, heads=HEADS, modality="rgb").train()
        if recompute:
            assert recompute_blocks(network) == 6
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):
            network({"rgb": torch.zeros(2, 4, 16, 16, 3, dtype=torch.uint8)})
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


def test_sgd_is_torchs_with_nesterov_momentum():
    recipe = changed(
        optimizer="sgd", optimizer_options={"momentum": 0.5}, weight_decay=0.0, epochs=1, warmup_epochs=0
    )
    ours, _ = run(recipe, MovingBars(4), plain())
    theirs, dataset = plain(), MovingBars(4)
    order = np.arange(4)
    pixels = torch.from_numpy(np.stack([dataset.item(row, 0)["rgb"] for row in order]))
    loss = nn.functional.cross_entropy(
        theirs({"rgb": pixels})["direction"], torch.from_numpy(dataset.labels["direction"][order])
    )
    loss.backward()
    nn.utils.clip_grad_norm_(theirs.parameters(), recipe.clip_norm)
    torch.optim.SGD(theirs.parameters(), lr=1e-3, momentum=0.5, nesterov=True).step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_any_optimiser_of_torch_may_be_named_and_wrong_ones_are_refused():
    network, _ = run(changed(optimizer="torch.optim:Adamax"), MovingBars(4))
    assert all(value.isfinite().all() for value in network.parameters())
    for fields, said in [
        ({"optimizer_options": {"momentum": 1}}, "adamw takes no momentum; it takes amsgrad, betas"),
        ({"optimizer": "torch.optim:Adam9"}, "module 'torch.optim' has no function 'Adam9'"),
        ({"optimizer": "sgd", "optimizer_options": {"momentum": -1.0}}, "Invalid momentum value"),
        ({"optimizer": "torch.optim:Adamax", "optimizer_options": {"x": 1}}, "unexpected keyword argument 'x'"),
        ({"optimizer": "builtins:dict"}, "dictionary update sequence"),
        ({"optimizer": "tests.helpers.moving_bars:no_optimizer"}, "gave int, not a torch.optim.Optimizer"),
    ]:
        with pytest.raises(InputError, match=said):
            run(changed(**fields), MovingBars(4))
    with pytest.raises(ValueError, match="'adm' is not one of adamw, sgd, and not of the form module:factory"):
        LoopRecipe(optimizer="adm")


def test_the_fast_mode_switches_tf32_and_benchmarks_on_and_back():
    def flags():
        cudnn = torch.backends.cudnn
        return cudnn.allow_tf32, cudnn.benchmark, not cudnn.deterministic, torch.backends.cuda.matmul.allow_tf32

    before = flags()
    with reproducible(torch.device("cpu"), "fast"):
        assert flags() == (True, True, True, True)
    with reproducible(torch.device("cpu")):
        assert flags() == (False, False, False, False)
    assert flags() == before


def test_on_cuda_gradients_are_asked_to_repeat_but_in_the_fast_mode(monkeypatch):
    """The switches, which need no GPU: that kernels then repeat is torch's own promise."""

    def flags():
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
        )

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    before = flags()
    with repeating_gradients(torch.device("cuda"), "deterministic"):
        assert flags() == (True, True, False, False, False, False)
        assert torch.backends.cuda.math_sdp_enabled()
    for device, mode in (("cuda", "fast"), ("cpu", "deterministic")):
        with repeating_gradients(torch.device(device), mode):
            assert flags() == before
    assert flags() == before
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


class Deep(nn.Module):
    """A network whose second convolution's gradients came out as what lay in memory."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv3d(3, 32, 1), nn.Conv3d(32, 64, 3, (1, 2, 2), 1, bias=False)
        self.heads = nn.ModuleDict({"direction": nn.Linear(64, 4)})

    def forward(self, inputs):
        clips = nn.functional.adaptive_avg_pool3d(inputs["rgb"].permute(0, 4, 1, 2, 3).float() / 255, (2, 6, 6))
        return {"direction": self.heads["direction"](self.second(self.first(clips)).mean((2, 3, 4)))}


def test_bf16_on_a_processor_learns_the_same_each_time_and_leaves_torchs_kernels_as_they_were():
    """With oneDNN, on a processor with avx512_bf16, it does not."""
    before = torch.backends.mkldnn.enabled
    torch.manual_seed(0)
    network, runs = Deep(), []
    for _ in range(3):
        del [torch.full((count,), math.inf) for count in (1_000, 10_003, 100_003, 1_000_003)][:]
        runs.append(run(changed(precision="bf16"), MovingBars(24), copy.deepcopy(network))[0])
    assert same_weights(runs[0], runs[1])
    assert same_weights(runs[0], runs[2])
    assert torch.backends.mkldnn.enabled == before


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_nearly_the_same(precision):
    recipe = changed(epochs=4, precision=precision)
    exact, report = run(changed(epochs=4), MovingBars(16), plain())
    half, other = run(recipe, MovingBars(16), plain())
    assert other.final_loss == pytest.approx(report.final_loss, rel=0.02)
    assert not same_weights(exact, half)
    assert all(value.dtype == torch.float32 for value in half.parameters())


def test_steps_that_overflow_fp16_are_left_out_and_the_scale_comes_down():
    """The loss is scaled by 65,536 at first, and these gradients are large; training continues all the same."""
    with torch.no_grad():
        loud = plain()
        loud.body.weight.mul_(1e-3)
        loud.heads["direction"].weight.mul_(3e3)
    network, report = run(changed(epochs=4, precision="fp16"), MovingBars(16), loud)
    assert math.isfinite(report.final_loss)
    assert all(value.isfinite().all() for value in network.parameters())


def test_results_come_one_step_late_and_in_order():
    late = LateResults()
    told = []
    for step in range(3):
        numbers = torch.tensor([step + 0.5, 2.0, step == 2], dtype=torch.float64)
        late.add(step, np.array([step]), torch.zeros(1, dtype=torch.bool), clips=1, numbers=numbers)
        told.append([found.step for found in late.settled(keep=1)])
    assert told == [[], [0], [1]]
    (last,) = late.settled(keep=0)
    assert (last.step, last.loss, last.norm, last.stop) == (2, 2.5, 2.0, True)


def test_a_step_that_is_not_finite_is_named_one_step_later_and_leaves_no_checkpoint(tmp_path):
    class Exploding(Plain):
        def forward(self, inputs):
            bad = inputs["rgb"].flatten(1).sum(1) == self.bad_sum
            return {"direction": torch.where(bad[:, None], torch.nan, super().forward(inputs)["direction"])}

    dataset = MovingBars(8, views=1)
    (step,) = [s for s, (rows, _) in enumerate(Schedule(8, 1, 2, SHORT.seed).epoch(0)) if 5 in rows]
    network = Exploding()
    network.bad_sum = int(dataset.item(5, 0)["rgb"].sum())
    with pytest.raises(InputError, match=rf"step {step}: the loss \(nan\).*; clips 'bar-5'\."):
        run(changed(batch_size=2, checkpoint_minutes=1e-9), dataset, network, run_dir=tmp_path)
    assert [int(path.name[-9:]) for path in checkpoints(tmp_path)] == [s for s in (step, step - 1) if s > 0]
    for path in checkpoints(tmp_path):
        assert all(value.isfinite().all() for value in load_file(path / "network.safetensors").values())


def test_a_checkpoint_is_written_within_an_epoch_when_its_minutes_are_over(tmp_path):
    steps = []

    class Watched(MovingBars):
        def item(self, row, view):
            steps.extend(int(path.name[-9:]) for path in checkpoints(tmp_path)[:1])
            time.sleep(0.01)
            return super().item(row, view)

    recipe = changed(epochs=1, checkpoint_minutes=0.02 / 60, prefetch_batches=1)
    with_them, _ = run(recipe, Watched(40), run_dir=tmp_path)
    assert any(0 < step < 10 for step in steps)
    assert len(checkpoints(tmp_path)) == 2
    assert same_weights(with_them, run(changed(epochs=1), MovingBars(40))[0])


EVERYTHING = {
    "accumulate": 2,
    "averaging": AveragingRecipe(decay=0.9),
    "optimizer": "sgd",
    "schedule": "cosine",
    "layer_decay": 0.8,
    "gradient_checkpointing": True,
    "precision": "fp16",
    "checkpoint_minutes": 1e-6,
    "patience_epochs": 3,
}


def by_last_bit(network):
    """A validation that depends on every weight, and prefers no epoch in particular."""
    total = sum(float(value.double().sum()) for value in network.state_dict().values())
    return {"direction": {"clips": 2, "top1": math.sin(1e3 * total), "nll": 1.0}}


def test_a_run_with_every_option_is_resumed_to_the_same_bits(tmp_path):
    recipe = changed(**EVERYTHING)
    teacher = ArrayTargets({"direction": np.random.default_rng(1).normal(size=(18, 3, 4)).astype(np.float32)})
    options = {"targets": teacher, "validate": by_last_bit}
    whole, _ = run(recipe, MovingBars(18, views=3), plain(), run_dir=tmp_path / "whole", **options)
    for at in (10, 14):
        with pytest.raises(InterruptedByUserError):
            run(recipe, Interrupting(18, views=3, at=at), plain(), run_dir=tmp_path / "parts", **options)
    parts, report = run(recipe, MovingBars(18, views=3), plain(), run_dir=tmp_path / "parts", **options)
    assert 0 < report.resumed_at < 15
    assert same_weights(whole, parts)
    newest = [checkpoints(tmp_path / name)[0] for name in ("whole", "parts")]
    names = sorted(path.name for path in newest[0].iterdir())
    assert names == [
        "average.safetensors",
        "best.safetensors",
        "network.safetensors",
        "optimizer.pt",
        "state.json",
    ]
    for name in ("average.safetensors", "best.safetensors", "network.safetensors"):
        assert (newest[0] / name).read_bytes() == (newest[1] / name).read_bytes(), name


class Stopping(Watch):
    """Asks this process to stop after the given step."""

    def __init__(self, step):
        self.steps_left = step

    def step_done(self):
        self.steps_left -= 1
        if self.steps_left == 0:
            os.kill(os.getpid(), signal.SIGUSR1)


@pytest.mark.parametrize("last_of", [1, 3])
def test_a_stop_after_the_last_step_of_an_epoch_comes_after_its_end(tmp_path, last_of):
    """With the checkpoint that is due at every step: the epoch's metrics and its weights, if best, are in it."""
    recipe = changed(checkpoint_minutes=1e-6)

    def trained(name, **options):
        return run(recipe, MovingBars(18), run_dir=tmp_path / name, validate=by_last_bit, **options)

    whole, report = trained("whole")
    with pytest.raises(InterruptedByUserError):
        trained("parts", watch=Stopping(5 * last_of))
    assert len((tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()) == last_of
    parts, resumed = trained("parts")
    assert (resumed.resumed_at, resumed.final_loss) == (5 * last_of, report.final_loss)
    assert same_weights(whole, parts)
    found = [metrics_kept(tmp_path / name / "checkpoint-000000015") for name in ("whole", "parts")]
    assert found[0] == found[1]
    assert len(found[0]) == 3


def metrics_kept(checkpoint):
    metrics = json.loads((checkpoint / "state.json").read_text())["metrics"]
    return [{name: value for name, value in line.items() if name != "clips_per_second"} for line in metrics]


def held_out(*top1):
    return [EpochMetrics(e, e, 1.0, 0.1, 1.0, {"a": {"top1": v, "nll": 1.0}}) for e, v in enumerate(top1)]


def test_the_best_epoch_is_the_first_with_the_highest_accuracy():
    assert best_epoch(held_out(0.1, 0.7, 0.3, 0.7)) == 1
    assert best_epoch([]) is None
    assert [is_over(held_out(0.1, 0.7, 0.3, 0.7)[:n], 2) for n in (1, 2, 3, 4)] == [False, False, False, True]
    assert not is_over(held_out(0.9, 0.1, 0.1), None)


def test_a_run_stops_early_leaves_the_best_epoch_and_stays_finished(tmp_path):
    seen = []

    def validate(network):
        seen.append({name: value.clone() for name, value in network.state_dict().items()})
        return {"direction": {"top1": [0.2, 0.6, 0.6, 0.1, 0.9][len(seen) - 1], "nll": 1.0}}

    recipe = changed(epochs=9, patience_epochs=2)
    network, report = run(recipe, MovingBars(8), run_dir=tmp_path, validate=validate)
    assert (report.steps, len(seen)) == (8, 4)
    assert all(torch.equal(value, seen[1][name]) for name, value in network.state_dict().items())
    again, second = run(recipe, MovingBars(8), run_dir=tmp_path, validate=validate)
    assert (second.resumed_at, len(seen)) == (8, 4)
    assert same_weights(network, again)
    with pytest.raises(InputError, match="patience_epochs=2 needs clips that tell the best epoch"):
        run(recipe, MovingBars(8))


@pytest.mark.slow
def test_a_compiled_network_learns_the_same_within_rounding():
    exact, report = run(changed(epochs=2), MovingBars(8), plain())
    compiled, other = run(changed(epochs=2, compile=True), MovingBars(8), plain())
    assert other.final_loss == pytest.approx(report.final_loss, rel=1e-3)
    for a, b in zip(exact.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_a_compiled_network_recomputes_activations_and_counts_a_step_once():
    plainly, report = run(changed(epochs=1), MovingBars(8), without_dropout())
    recomputed, other = run(
        changed(epochs=1, compile=True, gradient_checkpointing=True), MovingBars(8), without_dropout()
    )
    assert other.final_loss == pytest.approx(report.final_loss, rel=1e-3)
    for (name, a), b in zip(plainly.named_buffers(), recomputed.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3, msg=name)


def without_dropout():
    network = build_network(changed(jitter=STILL), heads=HEADS, modality="rgb")
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return network


def test_a_network_that_cannot_be_compiled_is_told_in_one_line(monkeypatch):
    def no_compiler(module):
        def compiled(inputs):
            raise torch._dynamo.exc.Unsupported("no C++ compiler\nis here", case_name="none")

        return compiled

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(InputError, match=r"^train\.compile: torch cannot compile .*no C\+\+ compiler is here"):
        run(changed(epochs=1, compile=True), MovingBars(4), plain())


@pytest.mark.parametrize(
    "fields",
    [
        {"mix": {"mixup_alpha": 1}},
        {"mix": {"cutmix_alpha": 1}},
        {"mix": {"mixup_alpha": 1, "cutmix_alpha": 1, "switch": 0.2}},
        {"class_balance": {"effective_number": 0.9}},
        {"averaging": {}},
        {"input": {"every": 2}},
        {"rand_augment": {}, "erasing": {}, "normalisation": {"mean": [0.5], "std": [0.5]}},
        {"held_out": 0.1, "patience_epochs": 3, "keep": "best"},
    ],
)
def test_a_recipe_that_a_run_has_written_is_read_again(fields):
    """`evaluate` begins with it, as does whatever else opens a finished run."""
    recipe = TrainRecipe(**fields)
    assert TrainRecipe.model_validate(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize("fields", [{"accumulate": 4}, {"repeats": 4}, {"repeats": 2, "accumulate": 2}])
def test_mixing_of_parts_with_one_clip_each_is_refused(fields):
    """It would change nothing, or mix views of one clip, in silence."""
    recipe = {"batch_size": 4, "mix": {"mixup_alpha": 1}}
    with pytest.raises(ValueError, match="mix pairs different clips, and of batch_size 4, computed in"):
        LoopRecipe(**recipe | fields)
    assert LoopRecipe(**recipe | fields | {"batch_size": 8})


def test_channels_last_changes_the_layout_alone():
    network, _ = run(changed(epochs=1, channels_last=True), MovingBars(8))
    exact, _ = run(changed(epochs=1), MovingBars(8))
    kernels = [value for value in network.parameters() if value.ndim == 5]
    assert all(value.is_contiguous(memory_format=torch.channels_last_3d) for value in kernels)
    for a, b in zip(network.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
