"""TV-L1's paths against each other, the choice among them, their memory, and what the native library promises."""

import importlib.util
import os
import platform
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import mmkd.pipeline.tvl1 as users
from mmkd.pipeline.tvl1 import TVL1Params, arithmetic, chosen_path, tvl1_clip_flow, tvl1_flow
from mmkd.pipeline.tvl1 import dispatch as tvl1
from mmkd.pipeline.tvl1 import (
    native_path as tvl1_native,
)
from mmkd.pipeline.tvl1 import (
    torch_path as tvl1_torch,
)
from tests.helpers.places import ROOT

native_only = pytest.mark.skipif(
    tvl1_native.library() is None,
    reason="the native TV-L1 library is not built: no C compiler when this package was installed",
)
PARAMS = {
    "cuda": TVL1Params(iterations=60),
    "cuda-odd-parameters": TVL1Params(iterations=40, tau=0.2, theta=0.37, lambda_=0.11, epsilon=0.02, zoom=0.6),
    "cuda-fixed": TVL1Params(iterations=25, epsilon=0),
    "opencv": TVL1Params(mode="opencv", median=5, iterations=70),
    "opencv-median-3": TVL1Params(mode="opencv", median=3, median_every=7, iterations=40, zoom=0.7),
    "opencv-loose": TVL1Params(mode="opencv", iterations=60, epsilon=0.05),
    "fast": TVL1Params.fast(),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def clip(height=61, width=75, *, seed=0):
    """Nine smooth frames in 0..255 that stand still, move slowly, move fast, then noise."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    waves = [(*random.uniform(-0.6, 0.6, 2), random.uniform(0, 6)) for _ in range(16)]
    shifts = np.cumsum([0, 0.1, 0, 2, -0.5, 0, 3, 0.3, 1.7])
    frames = [127.5 + 9 * sum(np.cos(a * (x - s) + b * (y + 0.4 * s) + c) for a, b, c in waves) for s in shifts]
    frames[7] = random.uniform(0, 255, (height, width))
    return torch.from_numpy(np.stack(frames).clip(0, 255).astype(np.float32))


def iterations_of(frames, params, monkeypatch):
    """Iterations of each warp of each pair on the torch path."""
    counts = []
    step, linearise = tvl1_torch.Iterations.step, tvl1_torch.Iterations.linearise

    def counted_linearise(self, *arguments):
        counts[-1].append(0)
        linearise(self, *arguments)

    def counted_step(self, *, with_error):
        counts[-1][-1] += 1
        return step(self, with_error=with_error)

    with monkeypatch.context() as patched:
        patched.setattr(tvl1_torch.Iterations, "linearise", counted_linearise)
        patched.setattr(tvl1_torch.Iterations, "step", counted_step)
        for i in range(len(frames) - 1):
            counts.append([])
            tvl1_flow(frames[i : i + 1], frames[i + 1 : i + 2], params=params, path="torch")
    return counts


# --- native against torch ---------------------------------------------------------------------------------


@native_only
@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize("shape", [(61, 75), (48, 64), (17, 130)])
def test_native_follows_torch(name, shape):
    frames = clip(*shape)[:7]  # the flow of noise is chaotic: rounding alone moves it by pixels
    expected = tvl1_clip_flow(frames, params=PARAMS[name], path="torch")
    found = tvl1_clip_flow(frames, params=PARAMS[name], path="native")
    difference = (found - expected).norm(dim=1)
    assert expected.norm(dim=1).max() > 1
    # Rounding can stop a warp an iteration apart, by updates of epsilon.
    assert difference.median() < 1e-3
    assert difference.mean() < (2e-2 if PARAMS[name].epsilon > 0 else 1e-3)


@native_only
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (2, 3), (15, 200), (16, 16), (33, 37), (20, 1000)])
@pytest.mark.parametrize("mode", ["opencv", "opencv-cuda"])
def test_native_follows_torch_closely_where_little_can_differ(mode, shape):
    params = TVL1Params(mode=mode, iterations=3, warps=2, epsilon=0, median=5 if mode == "opencv" else 0)
    frames = clip(*shape)
    expected = tvl1_clip_flow(frames, params=params, path="torch")
    found = tvl1_clip_flow(frames, params=params, path="native")
    difference = (found - expected).norm(dim=1)
    assert expected.any() or max(shape) < 4
    assert difference.median() < 1e-4
    assert difference.mean() < 2e-3


@native_only
@pytest.mark.parametrize("name", ["cuda", "opencv", "opencv-loose"])
def test_native_stops_when_torch_does(name, monkeypatch):
    frames = clip()
    pairs = tvl1_native.NativePairs(61, 75, params=PARAMS[name], budget_bytes=2**28)
    _, found = pairs.flow(list(frames), [(i, i + 1) for i in range(8)])
    expected = np.array(iterations_of(frames, PARAMS[name], monkeypatch))
    assert len(np.unique(expected)) > 4
    # Rounding can move a sum of errors over the threshold, in one warp in many.
    assert (found.numpy() == expected).mean() > 0.9
    np.testing.assert_allclose(found.sum(), expected.sum(), rtol=0.02)


# --- the same bits ----------------------------------------------------------------------------------------


@native_only
@pytest.mark.parametrize("name", PARAMS)
def test_the_wavefront_changes_no_bit(name, monkeypatch):
    """Iterations one by one never go beyond the stop; blocks do and are undone."""
    frames = clip()
    expected = None
    for block in (1, 2, 5, 16, 32):
        monkeypatch.setattr(tvl1_native, "BLOCK", block)
        pairs = tvl1_native.NativePairs(61, 75, params=PARAMS[name], budget_bytes=2**28)
        found = pairs.flow(list(frames), [(i, i + 1) for i in range(8)])
        expected = found if expected is None else expected
        assert all(map(torch.equal, found, expected)), block


@pytest.fixture(scope="module")
def plain_library(tmp_path_factory):
    """The library as the compiler makes it without a single vector."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    made = tmp_path_factory.mktemp("native") / "plain.so"
    source = ROOT / "pipeline" / "tvl1" / "native.c"
    fused = ["-mfma"] if platform.machine() == "x86_64" else []
    options = ["-std=gnu11", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-Wno-psabi", "-DCLONES=", *fused]
    subprocess.run([compiler, *options, str(source), "-lm", "-o", str(made)], check=True)
    return tvl1_native.open_library(str(made))


@native_only
@pytest.mark.parametrize("name", PARAMS)
def test_vectors_change_no_bit(name, plain_library, monkeypatch):
    """So processors with wider or narrower registers agree, and compilers that vectorise other loops."""
    frames, params = clip(), PARAMS[name]
    expected = tvl1_clip_flow(frames, params=params, path="native")
    assert tvl1_native.library() is not plain_library
    monkeypatch.setattr(tvl1_native, "library", lambda: plain_library)
    assert torch.equal(tvl1_clip_flow(frames, params=params, path="native"), expected)


@native_only
@pytest.mark.parametrize("name", PARAMS)
def test_threads_change_no_bit(name):
    frames, params = clip(), PARAMS[name]
    expected = tvl1_clip_flow(frames, params=params, path="native")
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(tvl1_clip_flow(frames, params=params, path="native"), expected)


@pytest.mark.parametrize("path", ["torch", pytest.param("native", marks=native_only)])
@pytest.mark.parametrize("step", [1, 3])
def test_the_budget_changes_no_bit(path, step):
    frames, params = clip(), PARAMS["fast"]
    expected = tvl1_flow(frames[:-step], frames[step:], params=params, path=path)
    needed = {"torch": tvl1_torch, "native": tvl1_native}[path].pair_bytes(61, 75, params=params)
    for budget in (needed, 3 * needed, None):
        pairs = tvl1_flow(frames[:-step], frames[step:], params=params, path=path, budget_bytes=budget)
        assert torch.equal(pairs, expected)
        found = tvl1_clip_flow(frames, params=params, step=step, path=path, budget_bytes=budget)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("path", ["torch", pytest.param("native", marks=native_only)])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float16, torch.float64])
def test_images_that_are_views_are_read_right(path, kind):
    frames = clip()[:3].round().to(kind)
    params = replace(PARAMS["cuda"], iterations=4)
    expected = tvl1_clip_flow(frames.contiguous(), params=params, path=path)
    turned = frames.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.stack((frames, frames), -1)[..., 0]
    for view in (turned, wide):
        assert not view.is_contiguous()
        assert torch.equal(tvl1_clip_flow(view, params=params, path=path), expected)


# --- memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["torch", pytest.param("native", marks=native_only)])
def test_a_budget_that_holds_no_pair_is_refused(path):
    frames, params = clip(), PARAMS["fast"]
    needed = {"torch": tvl1_torch, "native": tvl1_native}[path].pair_bytes(61, 75, params=params)
    with pytest.raises(ValueError, match=r"one pair of 75x61, more than the budget of [\d,]+; raise budget_bytes"):
        tvl1_flow(frames[:1], frames[1:2], params=params, path=path, budget_bytes=needed - 1)
    assert tvl1_flow(frames[:1], frames[1:2], params=params, path=path, budget_bytes=needed).any()


@pytest.mark.parametrize("mode", ["opencv", "opencv-cuda"])
def test_what_torch_allocates_is_within_what_it_counts(mode):
    frames = clip(200, 300)[:2]
    params = TVL1Params(mode=mode, median=5 if mode == "opencv" else 0, iterations=2, warps=1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        tvl1_flow(frames[:1], frames[1:], params=params, path="torch")
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    assert 0 < peak < tvl1_torch.pair_bytes(200, 300, params=params)


# --- the choice -------------------------------------------------------------------------------------------


def test_the_native_path_is_taken_on_the_cpu_where_it_is_built(monkeypatch):
    frames, params = clip()[:2], PARAMS["fast"]
    if tvl1_native.library() is not None:
        assert chosen_path("cpu") == chosen_path(torch.device("cpu")) == "native"
        assert arithmetic("cpu") == "cpu-native"
        native = tvl1_flow(frames[:1], frames[1:], params=params, path="native")
        assert torch.equal(tvl1_flow(frames[:1], frames[1:], params=params), native)
    monkeypatch.setattr(tvl1_native, "library", lambda: None)
    assert chosen_path("cpu") == "torch"
    assert arithmetic("cpu") == "cpu-torch"
    reference = tvl1_flow(frames[:1], frames[1:], params=params, path="torch")
    assert torch.equal(tvl1_flow(frames[:1], frames[1:], params=params), reference)
    with pytest.raises(ValueError, match="native path is not built here; install the package where a C compiler"):
        tvl1_flow(frames[:1], frames[1:], params=params, path="native")


def test_a_path_that_does_not_run_here_is_refused(monkeypatch):
    frames, params = clip()[:2], PARAMS["fast"]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="Triton"):
        tvl1_flow(frames[:1], frames[1:], params=params, path="triton")
    with pytest.raises(ValueError, match="auto, torch, native, triton, not 'cuda'"):
        tvl1_clip_flow(frames, params=params, path="cuda")
    elsewhere = frames.to("meta").to(torch.uint8)
    with pytest.raises(ValueError, match="native path runs on the CPU, not on meta"):
        tvl1_flow(elsewhere[:1], elsewhere[1:], params=params, path="native")


@native_only
def test_the_library_lies_beside_the_package_and_needs_no_python():
    spec = importlib.util.find_spec(tvl1_native.EXTENSION)
    assert Path(spec.origin).parent == Path(tvl1.__file__).parent
    assert b"PyObject" not in Path(spec.origin).read_bytes()


def test_users_import_from_the_package_itself():
    assert all(callable(getattr(users, name)) for name in users.__all__)
    with pytest.raises(AttributeError, match="no attribute 'tvl2_flow'"):
        users.tvl2_flow  # noqa: B018


def test_without_a_home_triton_keeps_its_kernels_in_a_folder_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setattr(tvl1.os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(tvl1.tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"mmkd-{os.getuid()}"
    for _ in range(2):  # the second time it is there
        monkeypatch.delenv("TRITON_HOME", raising=False)
        tvl1.give_triton_a_home()
        assert os.environ["TRITON_HOME"] == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    folder.symlink_to(tmp_path / "another's")
    monkeypatch.delenv("TRITON_HOME")
    tvl1.give_triton_a_home()
    found = Path(os.environ["TRITON_HOME"])
    assert (found.parent, found.stat().st_mode & 0o777) == (tmp_path, 0o700)
    assert found != folder
    monkeypatch.setenv("TRITON_HOME", "mine")
    tvl1.give_triton_a_home()
    assert os.environ["TRITON_HOME"] == "mine"
