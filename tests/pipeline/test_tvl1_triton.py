"""The CUDA path of TV-L1 without a GPU: Triton's interpreter, an emulation of CUDA, and machine code for Hopper."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from mmkd.pipeline.tvl1 import torch_path as tvl1_torch
from mmkd.pipeline.tvl1.blocked import HALOS, SHAPES, SOURCE, TILE_WIDTH, Shape, Tiles, Work, cubin
from mmkd.pipeline.tvl1.nvrtc import NvrtcError
from mmkd.pipeline.tvl1.params import TVL1Params
from mmkd.pipeline.tvl1.steps import pyramid_sizes
from tests.helpers.places import TESTS

HELPERS = TESTS / "helpers"
triton_spec = importlib.util.find_spec("triton")
needs_triton = pytest.mark.skipif(triton_spec is None, reason="Triton is not installed")
KERNELS = ("fused", "blocked")
KERNELS_OFTEN = ("linearise_kernel", "iterate_kernel", "decide_kernel")
# Half a minute of one core, but Triton's interpreter shares it badly with others.
pytestmark = pytest.mark.timeout(1200)


def texture(x, y):
    random = np.random.default_rng(3)
    angle, phase = random.uniform(0, 2 * np.pi, (2, 24))
    frequency = 2 * np.pi / random.uniform(8, 40, 24)
    waves = (
        np.multiply.outer(x, np.cos(angle) * frequency) + np.multiply.outer(y, np.sin(angle) * frequency) + phase
    )
    return (127.5 + 22 * np.cos(waves).sum(-1)).clip(0, 255).astype(np.float32)


def run(script, *arguments, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-W", "ignore", HELPERS / script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    if triton_spec is None:
        pytest.skip("Triton is not installed")
    folder = tmp_path_factory.mktemp("interpreted")
    y, x = np.mgrid[:41, :70].astype(np.float64)
    # A slow pair that stops early and a fast one that does not.
    cases = {name: asdict(params) for name, params in {**CASES, "large": LARGE}.items()}
    (folder / "cases.json").write_text(json.dumps(cases))
    np.save(folder / "frames.npy", np.stack([texture(x - shift, y + 0.4 * shift) for shift in (0, 0.1, 1.6)]))
    run("tvl1_interpreted.py", str(folder))
    return {"frames": np.load(folder / "frames.npy"), **np.load(folder / "found.npz")}


def expected(frames, params, monkeypatch):
    """The torch path's flow and the iterations of each warp of each pair, (warps, pairs)."""
    columns, flows = [], []
    step, linearise = tvl1_torch.Iterations.step, tvl1_torch.Iterations.linearise

    def counted_linearise(self, *arguments):
        columns[-1].append(0)
        linearise(self, *arguments)

    def counted_step(self, *, with_error):
        columns[-1][-1] += 1
        return step(self, with_error=with_error)

    monkeypatch.setattr(tvl1_torch.Iterations, "linearise", counted_linearise)
    monkeypatch.setattr(tvl1_torch.Iterations, "step", counted_step)
    for pair in range(2):
        columns.append([])
        images = (torch.from_numpy(frames[i : i + 1]) for i in (pair, pair + 1))
        flows.append(tvl1_torch.flow_of_pairs(*images, params=params, budget_bytes=2**30).numpy())
    return np.concatenate(flows), np.array(columns).T


CASES = {
    "cuda": TVL1Params(iterations=14, warps=2, scales=2),
    "opencv": TVL1Params(
        mode="opencv", median=3, median_every=6, iterations=12, warps=1, scales=2, epsilon=0.05, tau=0.2, theta=0.37
    ),
}
LARGE = TVL1Params(iterations=9, warps=1, scales=1, epsilon=0)


def assert_near(flow, reference):
    difference = np.hypot(*(flow - reference).swapaxes(0, 1))
    assert np.abs(reference).mean() > 0.1
    assert difference.mean() < 1e-3
    assert np.percentile(difference, 99) < 1e-2


@needs_triton
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["cuda", "opencv"])
def test_kernels_follow_the_torch_path(found, kernel, name, monkeypatch):
    """Flow, and the iteration at which each pair of each warp stops: some within a launch of the blocked kernel."""
    if f"{kernel} {name} flow" not in found:
        pytest.skip("no g++ to emulate the CUDA kernel with")
    flow, counts = expected(found["frames"], CASES[name], monkeypatch)
    assert counts.min() < CASES[name].iterations
    assert counts.tolist() == found[f"{kernel} {name} counts"].tolist()
    assert_near(found[f"{kernel} {name} flow"], flow)


@needs_triton
def test_blocked_kernel_as_compiled_for_a_gpu(found, monkeypatch):
    """64 x 64 tiles, a block that works through several, and copies that land at once."""
    if "large" not in found:
        pytest.skip("no g++ to emulate the CUDA kernel with")
    flow, _ = expected(found["frames"], LARGE, monkeypatch)
    assert_near(found["large"], flow)


@needs_triton
def test_a_pair_has_the_same_bits_in_any_batch(found):
    kernel = "blocked" if "large" in found else "fused"
    flow = found[f"{kernel} cuda flow"]
    assert np.array_equal(found["other batch"], flow[[1, 1, 0]])
    assert_near(found["clip"], found["clip reference"])


@needs_triton
@pytest.mark.parametrize("size", ["1x1", "2x3", "131x5", "1x33"])
def test_odd_sizes(found, size):
    """Narrower than four columns, lower than a warp's rows, one tile and three next to each other."""
    assert np.abs(found[size] - found[f"{size} reference"]).max() < 1e-4


def stop_of(sums, every):
    previous, params = 0.0, TVL1Params(mode="opencv" if every == 1 else "opencv-cuda")
    for n, error in enumerate(sums):
        due = tvl1_torch._error_is_due(n, previous, 1.0, params)
        previous = error if due else previous - 1.0
        if due and error <= 1.0:
            return n + 1
    return len(sums)


@needs_triton
@pytest.mark.parametrize("every", [1, 2])
def test_stopping_rule_on_the_device_is_that_of_the_reference(found, every):
    wanted = [stop_of(sums, every) for sums in found["sums"]]
    assert len(set(wanted)) > 10
    for slots in (1, 6):
        assert found[f"stops {every} {slots}"].tolist() == wanted


@needs_triton
@pytest.mark.parametrize("size", [3, 5])
def test_median_is_opencvs_and_leaves_stopped_pairs_alone(found, size):
    noise, filtered = found["noise"], found[f"median {size}"]
    for side, pair in ((0, 0), (1, 2)):
        for component in range(2):
            plane = np.ascontiguousarray(noise[side, pair, component, :, :22])
            assert np.array_equal(filtered[side, pair, component, :, :22], cv2.medianBlur(plane, size))
    assert np.array_equal(filtered[:, 1], noise[:, 1])
    assert np.array_equal(filtered[:, :, 2:], noise[:, :, 2:])


# --- tiles ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("halo", HALOS)
@pytest.mark.parametrize("shape", [*SHAPES, Shape(rows=5)])
@pytest.mark.parametrize(
    "size", [*pyramid_sizes(256, 340, scales=5, zoom=0.8), (1, 1), (64, 64), (65, 65), (9, 900)]
)
def test_each_pixel_is_stored_by_one_tile_in_which_it_is_right(shape, size, halo):
    """The geometry of `locate` in blocked.cu."""
    tiles = Tiles.over(*size, shape=shape, halo=halo)
    ways = (
        (size[1], TILE_WIDTH, tiles.across, tiles.step_x),
        (size[0], shape.tile_height, tiles.down, tiles.step_y),
    )
    for extent, tile, count, step in ways:
        end = 0
        for i in range(count):
            start = i * step
            first = 0 if i == 0 else start + halo
            stop = extent if i == count - 1 else start + step + halo
            assert first == end
            assert stop > first
            assert i == count - 1 or stop <= start + tile - halo
            assert stop <= start + tile
            end = stop
        assert end == extent
        assert step % 4 == 0 or step is tiles.step_y


def test_an_odd_halo_is_refused():
    with pytest.raises(ValueError, match="halo of 5"):
        Tiles.over(100, 100, shape=Shape(), halo=5)


def test_halo_is_the_one_with_the_least_work():
    sizes = pyramid_sizes(256, 340, scales=5, zoom=0.8)
    assert [Tiles.best(*size, shape=Shape()).halo for size in sizes] == [4, 6, 6, 4, 8]


def test_structures_of_both_languages_agree():
    fields = re.search(r"struct Work \{(.*?)\};", SOURCE.read_text(), re.S).group(1)
    names = [name.strip(" *") for line in fields.split(";") for name in line.replace("*", "* ").split(",")]
    assert [name.split()[-1] for name in names if name.strip()] == [name for name, _ in Work._fields_]


# --- machine code for Hopper --------------------------------------------------------------------------------


def inspect(code, tmp_path):
    """Registers, stack, and the instructions of some machine code, by the tool that Triton brings along."""
    tool = Path(triton_spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if triton_spec else None
    if tool is None or not os.access(tool, os.X_OK):
        pytest.skip("no cuobjdump to look into machine code with")
    path = tmp_path / "kernel.cubin"
    path.write_bytes(code)
    usage, sass = (subprocess.check_output([tool, flag, path], text=True) for flag in ("-res-usage", "-sass"))
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return found, re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z0-9_.]+)", sass, re.M)


@pytest.mark.parametrize("shape", SHAPES)
def test_blocked_kernel_fits_the_registers_of_hopper(shape, tmp_path):
    """A multiprocessor has 65,536 registers; a spill would cost an access in each iteration."""
    try:
        code = cubin(shape, architecture="sm_90")
    except NvrtcError as error:
        pytest.skip(str(error))
    usage, instructions = inspect(code, tmp_path)
    assert usage["REG"] * shape.threads <= 65536
    assert usage["STACK"] == usage["LOCAL"] == 0
    assert not {"LDL", "STL"} & {name.split(".")[0] for name in instructions}
    # Shuffles that the compiler cannot prove to be executed by the whole warp get a slow second version.
    assert "ENDCOLLECTIVE" not in instructions
    assert instructions.count("LDGSTS.E.BYPASS.128") >= 9
    assert shape.shared_bytes <= 227 * 1024
    # Four square roots and reciprocals per pixel and iteration are the limit; more were forgotten simplifications.
    assert instructions.count("MUFU.SQRT") == 8 * 2 * shape.rows * 2


@needs_triton
@pytest.mark.parametrize("names", [KERNELS_OFTEN, pytest.param(("median_kernel",), marks=pytest.mark.slow)])
def test_triton_kernels_compile_for_hopper_without_spills(names, tmp_path):
    run("tvl1_compiled.py", str(tmp_path), *names, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    registers = {}
    for name in names:
        usage, instructions = inspect((tmp_path / f"{name}.cubin").read_bytes(), tmp_path)
        assert usage["STACK"] == usage["LOCAL"] == 0, name
        assert not {"LDL", "STL", "ATOMG", "RED"} & {i.split(".")[0] for i in instructions}, name
        registers[name] = usage["REG"]
    print(json.dumps(registers))
    # 128 threads per program: 128 registers leave room for four programs on a multiprocessor, 72 for seven.
    assert registers.get("iterate_kernel", 0) <= 72
    assert max(registers.values()) <= 128


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_blocked_kernel_has_no_compiler_warnings(tmp_path):
    command = ["nvcc", "-arch=sm_90", "-std=c++17", *Shape().definitions, "-cubin", "-o", tmp_path / "x", SOURCE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
