"""Flow files: what a writer leaves, what a reader gives back, and that nothing half-written looks whole."""

import errno
import os
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkd.data_manifests.errors import InputError, StorageError
from mmkd.pipeline.flow.conventions import codes_of_flow, flow_of_codes
from mmkd.pipeline.flow_command.encoding import EncodedFlow, encode_values, stored_values
from mmkd.pipeline.flow_command.readers import jpeg_pairs, read_hdf5, read_i3d, read_jpeg_folder
from mmkd.pipeline.flow_command.writers import Hdf5Writer, JpegFolderWriter, NpyWriter

PAIRS = np.arange(5)


def smooth_flow(pairs=5, height=24, width=32, seed=0):
    """Flow as smooth as JPEG likes it, up to about 9 px."""
    rng = np.random.default_rng(seed)
    small = rng.uniform(-9, 9, (2 * pairs, 3, 4)).astype(np.float32)
    planes = [cv2.resize(plane, (width, height), interpolation=cv2.INTER_CUBIC) for plane in small]
    return torch.from_numpy(np.stack(planes).reshape(pairs, 2, height, width))


def encoded(flow, layout):
    return encode_values(stored_values(flow, layout=layout, bound_px=20), layout=layout)


def add_in_two(writer, flow, layout):
    writer.add(encoded(flow[:2], layout))
    writer.add(encoded(flow[2:], layout))


def jpeg_writer(out, name, *, layout, step):
    return JpegFolderWriter(out / name, out / ".part" / "run" / "x", layout=layout, step=step)


def npy_writer(out, name, *, pairs):
    return NpyWriter(out / f"{name}.npy", out / ".part" / "run" / "x.npy", pairs=pairs)


def hdf5_writer(out, name, *, attributes):
    return Hdf5Writer(out / f"{name}.h5", out / ".part" / "run" / "x.h5", name, attributes=attributes)


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("layout", "step", "names"),
    [
        ("denseflow", 1, ["flow_x_00000.jpg", "flow_y_00004.jpg"]),
        ("denseflow", 2, ["flow_x_p2_00000.jpg", "flow_y_p2_00004.jpg"]),
        ("denseflow", -2, ["flow_x_m2_00002.jpg", "flow_y_m2_00006.jpg"]),
        ("epic", 3, ["u/frame_0000000001.jpg", "v/frame_0000000005.jpg"]),
        ("mmaction", 1, ["x_00001.jpg", "y_00005.jpg"]),
    ],
)
def test_jpeg_folders_are_read_back(tmp_path, layout, step, names):
    flow = smooth_flow()
    writer = jpeg_writer(tmp_path, "class/clip.one", layout=layout, step=step)
    add_in_two(writer, flow, layout)
    folder = tmp_path / "class" / "clip.one"
    assert not folder.exists(), "nothing shows before it is whole"
    writer.finish()
    found = sorted(files_below(folder))
    assert len(found) == 10
    assert (found[0], found[-1]) == tuple(names)
    np.testing.assert_array_equal(jpeg_pairs(folder, layout=layout, step=step), PAIRS)
    read = read_jpeg_folder(folder, np.array([4, 0, 4]), layout=layout, bound_px=20, step=step)
    assert read.dtype == np.float32
    rounded = flow_of_codes(codes_of_flow(flow, bound_px=20), bound_px=20).numpy()
    assert np.abs(read - rounded[[4, 0, 4]]).max() <= 5 * 40 / 255  # JPEG: a few levels
    assert np.abs(read[:, 0] - rounded[[4, 0, 4], 1]).max() > 2, "x and y are told apart"


def test_one_plane_alone_is_no_pair_and_a_missing_file_is_named(tmp_path):
    writer = jpeg_writer(tmp_path, "clip", layout="denseflow", step=1)
    writer.add(encoded(smooth_flow(), "denseflow"))
    writer.finish()
    (tmp_path / "clip" / "flow_y_00001.jpg").unlink()
    assert jpeg_pairs(tmp_path / "clip", layout="denseflow").tolist() == [0, 2, 3, 4]
    with pytest.raises(InputError, match=r"flow_y_00001\.jpg cannot be read: No such file"):
        read_jpeg_folder(tmp_path / "clip", np.array([0, 1]), layout="denseflow", bound_px=20)
    (tmp_path / "clip" / "flow_y_00001.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(InputError, match=r"flow_y_00001\.jpg: not a whole JPEG"):
        read_jpeg_folder(tmp_path / "clip", np.array([1]), layout="denseflow", bound_px=20)


def test_a_folder_that_is_there_keeps_its_frames_and_loses_old_flow(tmp_path):
    """denseflow puts frames and flow into one folder; a video that became shorter leaves no old pairs behind."""
    for pairs in (5, 3):
        writer = jpeg_writer(tmp_path, "clip", layout="denseflow", step=1)
        writer.add(encoded(smooth_flow(pairs, seed=pairs), "denseflow"))
        writer.finish()
        (tmp_path / "clip" / "img_00000.jpg").write_bytes(b"a frame")
        (tmp_path / "clip" / "flow_x_p2_00007.jpg").write_bytes(b"of another step")
    assert jpeg_pairs(tmp_path / "clip", layout="denseflow").tolist() == [0, 1, 2]
    assert {"img_00000.jpg", "flow_x_p2_00007.jpg"} < files_below(tmp_path / "clip")
    assert len(files_below(tmp_path / "clip")) == 8
    read = read_jpeg_folder(tmp_path / "clip", PAIRS[:3], layout="denseflow", bound_px=20)
    assert np.abs(read - smooth_flow(3, seed=3).numpy()).max() < 1


def test_i3d_floats_are_read_back_exactly_where_they_are_not_clipped(tmp_path):
    flow = smooth_flow() * 4
    writer = npy_writer(tmp_path, "a/clip", pairs=5)
    add_in_two(writer, flow, "i3d")
    assert files_below(tmp_path) == {".part/run/x.npy"}
    writer.finish()
    stored = np.load(tmp_path / "a" / "clip.npy")
    assert (stored.shape, stored.dtype) == ((5, 24, 32, 2), np.float32)
    assert (np.abs(stored).max(), np.abs(flow.numpy()).max() > 20) == (1, True)
    np.testing.assert_allclose(stored[..., 1], np.clip(flow[:, 1].numpy(), -20, 20) / 20, rtol=1e-6)
    read = read_i3d(tmp_path / "a" / "clip.npy", np.array([3, 1]))
    np.testing.assert_allclose(read, np.clip(flow[[3, 1]].numpy(), -20, 20), rtol=1e-6, atol=1e-6)


def test_an_npy_file_must_get_all_its_pairs(tmp_path):
    writer = npy_writer(tmp_path, "clip", pairs=6)
    writer.add(encoded(smooth_flow(), "i3d"))
    with pytest.raises(ValueError, match="5 of 6 pairs"):
        writer.finish()
    writer.abandon()
    assert files_below(tmp_path) == set()


@pytest.mark.parametrize("name", ["clip", "class/clip"])
def test_hdf5_holds_the_very_jpegs_or_floats(tmp_path, name):
    flow = smooth_flow()
    for layout in ("hdf5", "i3d"):
        writer = hdf5_writer(tmp_path / layout, name, attributes={"bound_px": 20})
        add_in_two(writer, flow, layout)
        writer.finish()
    path = tmp_path / "hdf5" / f"{name}.h5"
    with h5py.File(path) as file:
        assert file[name].attrs["bound_px"] == 20
        stored = [
            (x.tobytes(), y.tobytes()) for x, y in zip(file[name]["flow_x"], file[name]["flow_y"], strict=True)
        ]
    assert stored == list(encoded(flow, "hdf5").jpegs)
    read = read_hdf5(path, name, np.array([4, 2]), bound_px=20)
    assert np.abs(read - flow[[4, 2]].numpy()).max() < 1
    read = read_hdf5(tmp_path / "i3d" / f"{name}.h5", name, np.array([4, 2]), bound_px=20)
    np.testing.assert_allclose(read, flow[[4, 2]].numpy(), atol=1e-6)


def test_broken_files_are_refused_by_name(tmp_path):
    (tmp_path / "a.h5").write_bytes(b"no HDF5")
    with pytest.raises(InputError, match=r"a\.h5: no flow of 'clip'"):
        read_hdf5(tmp_path / "a.h5", "clip", PAIRS, bound_px=20)
    h5py.File(tmp_path / "b.h5", "w").close()
    with pytest.raises(InputError, match=r"b\.h5: no flow of 'clip'"):
        read_hdf5(tmp_path / "b.h5", "clip", PAIRS, bound_px=20)
    (tmp_path / "a.npy").write_bytes(b"no array")
    with pytest.raises(InputError, match=r"a\.npy: not a whole"):
        read_i3d(tmp_path / "a.npy", PAIRS)
    np.save(tmp_path / "b.npy", np.zeros((3, 4)))
    with pytest.raises(InputError, match=r"I3D's flow is \(pairs, H, W, 2\)"):
        read_i3d(tmp_path / "b.npy", PAIRS)


def writer_of(kind, out):
    if kind == "jpeg":
        return jpeg_writer(out, "clip", layout="epic", step=1), "epic"
    if kind == "npy":
        return npy_writer(out, "clip", pairs=5), "i3d"
    return hdf5_writer(out, "clip", attributes={}), "hdf5"


@pytest.mark.parametrize("kind", ["jpeg", "npy", "hdf5"])
def test_what_is_abandoned_leaves_nothing(tmp_path, kind):
    writer, layout = writer_of(kind, tmp_path)
    writer.add(encoded(smooth_flow(), layout))
    writer.abandon()
    assert files_below(tmp_path) == set()


def test_a_folder_whose_parts_somebody_deletes_is_not_moved_into_place(tmp_path):
    writer = jpeg_writer(tmp_path, "clip", layout="denseflow", step=1)
    writer.add(encoded(smooth_flow(), "denseflow"))
    next((tmp_path / ".part").rglob("flow_y_00003.jpg")).unlink()
    with pytest.raises(StorageError, match="another program deletes its parts; run again"):
        writer.finish()
    assert not (tmp_path / "clip").exists()


def test_an_npy_file_is_byte_for_byte_numpy_s(tmp_path):
    writer = npy_writer(tmp_path, "clip", pairs=5)
    add_in_two(writer, smooth_flow(), "i3d")
    writer.finish()
    np.save(tmp_path / "numpy.npy", encoded(smooth_flow(), "i3d").floats)
    assert (tmp_path / "clip.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()


@pytest.mark.parametrize("pairs", [1, 5])
def test_hdf5_holds_jpegs_of_equal_length(tmp_path, pairs):
    """As a still video's all are, and as a single one is."""
    still = torch.zeros(pairs, 2, 24, 32)
    writer = hdf5_writer(tmp_path, "clip", attributes={})
    writer.add(encoded(still, "hdf5"))
    writer.finish()
    read = read_hdf5(tmp_path / "clip.h5", "clip", np.arange(pairs), bound_px=20)
    assert read.shape == (pairs, 2, 24, 32)
    assert np.abs(read).max() < 0.1


@pytest.mark.parametrize("kind", ["jpeg", "npy", "hdf5"])
def test_results_in_a_folder_that_is_a_link_to_another_disk(tmp_path, kind, monkeypatch):
    """The system refuses to move between disks; the result still appears whole or not at all."""
    rename = Path.rename

    def between_disks(path, target):
        if ".part" in path.parts:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return rename(path, target)

    writer, layout = writer_of(kind, tmp_path)
    writer.add(encoded(smooth_flow(), layout))
    monkeypatch.setattr(Path, "rename", between_disks)
    writer.finish()
    monkeypatch.undo()
    writer.abandon()
    assert len(files_below(tmp_path)) == (10 if kind == "jpeg" else 1)


@given(st.integers(1, 9), st.integers(1, 40))
@settings(deadline=None, database=None, derandomize=True, max_examples=30)
def test_codes_do_not_depend_on_how_many_are_made_at_once(pairs, most):
    flow = smooth_flow(pairs, 6, 5) * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmkd.pipeline.flow_command.encoding.CODED_AT_ONCE", most)
        values = stored_values(flow, layout="denseflow", bound_px=8)
    np.testing.assert_array_equal(values, codes_of_flow(flow, bound_px=8).numpy())


def test_encoded_flow_counts_its_pairs():
    assert len(EncodedFlow([(b"", b"")] * 3)) == 3
    assert len(EncodedFlow(floats=np.zeros((4, 2, 2, 2), np.float32))) == 4
