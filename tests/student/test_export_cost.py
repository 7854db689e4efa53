"""What a student costs: multiplications by closed form and torchvision's figures, times and memory as measured."""

import json
from contextlib import nullcontext
from math import prod
from unittest import mock

import numpy as np
import pytest
import torch

from mmkd.cache_tools.views.drawing import ViewPolicy
from mmkd.student.evaluation.trained import TrainedStudent
from mmkd.student.export import cost
from mmkd.student.export.cost import gmac, growth, million_parameters, run_seconds, timed
from mmkd.student.export.latency import measured
from mmkd.student.network_table import NETWORKS
from mmkd.student.networks.networks import build_network
from mmkd.student.recipes.train import TrainRecipe
from tests.helpers.needs_gpu import needs_cuda

KINETICS_CLASSES = 400
OTHERS = {name for name, entry in NETWORKS.items() if entry.gmac and name != "swin3d_t"}


def counted_of(name, *, classes=KINETICS_CLASSES):
    """GMAC and million parameters of a network for its usual input, by tensors that have shapes and no values."""
    entry = NETWORKS[name]
    shape = {"frames": entry.frames, "size_px": entry.size_px}
    with torch.device("meta"), mock.patch.object(torch, "autocast", return_value=nullcontext()):
        network = build_network(TrainRecipe(network=name), heads={"action": classes}, modality="rgb", **shape)
        frames = torch.zeros(1, entry.frames, entry.size_px, entry.size_px, 3, dtype=torch.uint8)
        return gmac(network.eval(), frames), million_parameters(network)


def test_multiplications_of_small3d_are_those_of_its_convolutions_and_its_head():
    outputs_kernels = [  # positions of the output, kernel, channels in and out, for 8 frames of 48 x 48
        ((8, 24, 24), (3, 5, 5), 3, 16),
        ((4, 12, 12), (3, 3, 3), 16, 32),
        ((4, 6, 6), (3, 3, 3), 32, 64),
        ((4, 6, 6), (3, 3, 3), 64, 64),
        ((2, 3, 3), (3, 3, 3), 64, 128),
        ((2, 3, 3), (1, 3, 3), 128, 128),
    ]
    wanted = sum(prod(place) * prod(kernel) * i * o for place, kernel, i, o in outputs_kernels) + 128 * 7
    found, parameters = counted_of("small3d", classes=7)
    assert found == pytest.approx(wanted / 1e9, rel=1e-9)
    weights = sum(prod(kernel) * i * o + 2 * o for _, kernel, i, o in outputs_kernels) + 129 * 7
    assert parameters == weights / 1e6


@pytest.mark.parametrize(
    "name", ["swin3d_t", *(pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS if name in OTHERS)]
)
def test_multiplications_and_parameters_are_those_that_the_table_states(name):
    found, parameters = counted_of(name)
    assert found == pytest.approx(NETWORKS[name].gmac, rel=0.02)
    assert parameters == pytest.approx(NETWORKS[name].million_parameters, rel=0.01)


@pytest.mark.parametrize(("each_seconds", "runs"), [(0.001, 200), (0.5, 6), (10.0, 5)])
def test_runs_are_timed_until_enough_seconds_have_passed_within_bounds(each_seconds, runs):
    now, calls = [0.0], []

    def call():
        calls.append(now[0])
        now[0] += each_seconds

    seconds = run_seconds(call, clock=lambda: now[0])
    assert seconds == pytest.approx([each_seconds] * runs)
    assert len(calls) == runs + cost.WARM_UP


def test_a_row_has_the_median_the_95th_percentile_and_clips_a_second(monkeypatch):
    seconds = [0.001 * (n + 1) for n in range(101)]
    seen = []
    monkeypatch.setattr(cost, "run_seconds", lambda call: call() or seconds)
    one, eight = timed(
        "form", lambda frames: seen.append(frames.shape), shape=(2, 4, 4, 3), peak_mib=lambda: 7.0, advance=int
    )
    assert (one.median_ms, one.p95_ms, one.clips_per_second) == pytest.approx((51, 96, 1 / 0.051))
    assert (eight.batch, eight.clips_per_second, eight.peak_mib) == (8, pytest.approx(8 / 0.051), 7.0)
    assert seen == [(1, 2, 4, 4, 3), (8, 2, 4, 4, 3)]


def test_growth_of_memory_is_that_of_what_was_taken_even_if_it_was_given_back():
    with growth() as peak:
        np.ones(2**23)  # 64 MiB, gone at once
        assert peak() == pytest.approx(64, abs=16)
    with growth() as peak:
        assert peak() < 16, "what was taken before does not count"


@pytest.fixture
def student(monkeypatch):
    monkeypatch.setattr(cost, "ENOUGH_SECONDS", 0.0)
    network = build_network(
        TrainRecipe(network="small3d"), heads={"action": 4}, modality="rgb", frames=4, size_px=32
    )
    return TrainedStudent(
        network.eval(), ViewPolicy(frames=4, size_px=32), {"action": list("abcd")}, torch.device("cpu")
    )


def test_without_an_onnx_file_the_student_itself_is_measured_with_its_weights(student):
    found = measured(student, {"model.pt2": bytes(2**20)})
    rows = [(row["form"], row["batch"]) for row in found["rows"] if row["form"].startswith("eager")]
    assert rows == [("eager fp32", 1), ("eager fp32", 8)]
    assert all(0 < row["median_ms"] <= row["p95_ms"] and row["runs"] >= 5 for row in found["rows"])
    assert all(row["peak_mib"] >= 0.7 * 4 * 0.9 for row in found["rows"]), "weights of .7 million parameters"
    assert found["file_mib"] == {"model.pt2": 1.0}
    json.dumps(found)


@needs_cuda
def test_on_a_gpu_there_are_rows_in_bf16(student):
    rows = [row for row in measured(student, {})["rows"] if row["form"] == "CUDA bf16"]
    assert [row["batch"] for row in rows] == [1, 8]
    assert all(row["peak_mib"] > 0 for row in rows)
    assert next(student.network.parameters()).device.type == "cpu"
