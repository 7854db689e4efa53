"""Flow that a user has: each layout gives the fields that were put into it, whoever wrote it; what does not fit
says so."""

import io
import shutil
import struct
import tarfile

import cv2
import h5py
import numpy as np
import pytest

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.frames.clip_set import ClipVideo
from mmkd.cache_tools.frames.records import ClipFacts, VideoFacts
from mmkd.cache_tools.layout import Status
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.manifest import Clip
from mmkd.data_manifests.manifest_file import load_manifest
from mmkd.pipeline.flow.conventions import frames_at_rate
from mmkd.pipeline.flow.flow_digests import digest_of_clips
from mmkd.pipeline.flow.flow_files import FlowFiles, field_numbers
from mmkd.pipeline.missing import FlowMissingError
from mmkd.pipeline.recipe import FlowFilesRecipe, FlowRecipe
from tests.helpers.in_process import call, call_ok, refused

FRAMES, BOUND = 20, 8.0
HEIGHT, WIDTH = 24, 32


def coded(value):
    """A picture of one 8-bit code, as the tools round it: zero is 128."""
    code = int(np.clip(np.floor((value + BOUND) * 255 / (2 * BOUND) + 0.5), 0, 255))
    return cv2.imencode(".png", np.full((HEIGHT, WIDTH), code, np.uint8))[1].tobytes(), code


def jpeg(value):
    code = coded(value)[1]
    return cv2.imencode(".jpg", np.full((HEIGHT, WIDTH), code, np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 95])[
        1
    ].tobytes()


def shift(field):
    """(u, v) of a field: rest at first, then integer motions of either sign."""
    return (0, 0) if field == 0 else (field % 7 - 3, 3 - field % 5)


def decoded(value):
    code = coded(value)[1]
    return code / 255 * 2 * BOUND - BOUND


def denseflow(root, fields, step=1):
    place = root / "P01" / "videos" / "P01_11"
    place.mkdir(parents=True)
    for field in range(fields):
        for axis, value in zip("xy", shift(field), strict=True):
            (place / f"flow_{axis}_{field:05d}.jpg").write_bytes(jpeg(value))


def mmaction(root, fields):
    place = root / "P01_11"
    place.mkdir(parents=True)
    for field in range(fields):
        for axis, value in zip("xy", shift(field), strict=True):
            (place / f"{axis}_{field + 1:05d}.jpg").write_bytes(jpeg(value))


def epic(root, fields):
    for axis in "uv":
        (root / "P01" / "flow_frames" / "P01_11" / axis).mkdir(parents=True)
    for field in range(fields):
        for axis, value in zip("uv", shift(field), strict=True):
            place = root / "P01" / "flow_frames" / "P01_11" / axis
            (place / f"frame_{field + 1:010d}.jpg").write_bytes(jpeg(value))


def epic_tar(root, fields):
    path = root / "P01" / "flow_frames" / "P01_11.tar"
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as archive:
        for field in range(fields):
            for axis, value in zip("uv", shift(field), strict=True):
                member = tarfile.TarInfo(f"./{axis}/frame_{field + 1:010d}.jpg")
                member.size = len(jpeg(value))
                archive.addfile(member, io.BytesIO(jpeg(value)))


def ours_hdf5(root, fields):
    with h5py.File(root / "flow.h5", "w") as file:
        group = file.create_group("P01/videos/P01_11")
        for number, axis in enumerate("xy"):
            planes = group.create_dataset(f"flow_{axis}", (fields,), h5py.vlen_dtype(np.uint8))
            for field in range(fields):
                planes[field] = np.frombuffer(jpeg(shift(field)[number]), np.uint8)


def interleaved(root, fields):
    with h5py.File(root / "flow.h5", "w") as file:
        for field in range(fields):
            for number, value in enumerate(shift(field)):
                file[f"P01_11/P01_11_0/{2 * field + number}"] = np.frombuffer(jpeg(value), np.uint8)


LAYOUTS = {
    "denseflow": denseflow, "mmaction": mmaction, "epic": epic, "epic in a tar": epic_tar, "hdf5": ours_hdf5,
    "interleaved": interleaved,
}  # fmt: skip


def item(fps=60.0, first=0, count=FRAMES, frames=FRAMES, start=0.0):
    video = VideoFacts(WIDTH, HEIGHT, np.arange(frames) / fps, "pyav", "x")
    clip = Clip("P01_11_0", "P01/videos/P01_11.MP4", "train", {"verb": 0}, start_seconds=start)
    return ClipVideo(clip, video, ClipFacts(WIDTH, HEIGHT, first, count))


def files_of(root, layout, **more):
    path = root / "flow.h5" if (root / "flow.h5").exists() else root
    recipe = FlowFilesRecipe(path=path, layout=layout.split()[0], bound_px=BOUND, **more)
    return FlowFiles(recipe, FlowRecipe(files=recipe))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rest_and_known_shifts_are_exact_in_the_quantised_form(tmp_path, layout):
    LAYOUTS[layout](tmp_path, FRAMES - 1)
    files = files_of(tmp_path, layout)
    starts = np.array([0, 3, 4, 4, FRAMES - 2])
    assert files.has(item())
    fields = files.read(item(), starts)
    assert fields.dtype == np.float32
    assert fields.shape == (5, 2, HEIGHT, WIDTH)
    for field, start in zip(fields, starts.tolist(), strict=True):
        for plane, value in zip(field, shift(start), strict=True):
            np.testing.assert_allclose(plane, decoded(value), atol=1e-6)
    assert fields[0, 0, 0, 0] == pytest.approx(BOUND / 255)  # rest is 128, which is not quite 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_segment_in_the_middle_of_a_video_has_its_own_fields(tmp_path, layout):
    LAYOUTS[layout](tmp_path, 9 if layout == "interleaved" else FRAMES - 1)
    files, own = files_of(tmp_path, layout), item(first=6, count=10, start=0.1)
    found = files.read(own, np.array([6, 8]))
    expected = [0, 2] if layout == "interleaved" else [6, 8]  # the authors count from the segment's first frame
    for field, number in zip(found, expected, strict=True):
        np.testing.assert_allclose(field[0], decoded(shift(number)[0]), atol=1e-6)


def test_official_flow_is_found_by_time_in_videos_of_other_rates():
    files = FlowFilesRecipe(path="x", layout="epic", bound_px=8)
    seen = item(fps=29.97, frames=90, count=90)
    assert field_numbers(np.array([0, 15, 30]), seen, files).tolist() == [0, 30, 60]
    own = item(fps=59.94, frames=60 * 120, count=60 * 120)
    assert field_numbers(np.array([6000]), own, files).tolist() == [6006]  # 100.1 s at 60 a second
    halved = FlowFilesRecipe(path="x", layout="epic", bound_px=25, stride=2)
    assert field_numbers(np.array([0, 1, 2, 3]), item(), halved).tolist() == [0, 0, 1, 1]  # (i - 1) // 2 + 1 from 1


@pytest.mark.parametrize(
    ("frames", "fields", "expected"),
    [(6001, 6000, 5000), (6001, 6006, 5005), (200, 199, 150)],  # by frame, as `mmkd-cache flow`; official; both
)
def test_epic_s_layout_counts_frames_where_there_are_as_many_and_time_elsewhere(tmp_path, frames, fields, expected):
    """Videos at 59.94 frames a second, whose official frames count at 60."""
    place = tmp_path / "P01" / "flow_frames" / "P01_11"
    for axis in "uv":
        (place / axis).mkdir(parents=True)
        for field in range(fields):
            value = 3 if field == expected else 0
            (place / axis / f"frame_{field + 1:010d}.jpg").write_bytes(jpeg(value))
    own = item(fps=59.94, frames=frames, count=frames)
    found = files_of(tmp_path, "epic").read(own, np.array([expected if fields != 6006 else 5000]))
    np.testing.assert_allclose(found, decoded(3), atol=1e-6)


@pytest.mark.parametrize(
    ("layout", "fields", "message"),
    [
        ("denseflow", FRAMES - 6, "14 fields of flow, where 20 frames at step 1 and stride 1 need 19"),
        ("denseflow", FRAMES // 2 - 1, "is it flow.files.stride=2?"),
        ("epic", FRAMES // 2, "is it flow.files.stride=2?"),
        ("hdf5", FRAMES + 9, "29 fields of flow, where 20 frames"),
        ("interleaved", 3, "3 fields of flow, where 20 frames"),
    ],
)
def test_counts_that_do_not_fit_say_which_and_why(tmp_path, layout, fields, message):
    LAYOUTS[layout](tmp_path, fields)
    files = files_of(tmp_path, layout)
    assert not files.has(item())
    with pytest.raises(FlowMissingError) as caught:
        files.read(item(), np.array([0]))
    assert message in str(caught.value)


def test_a_gap_a_missing_plane_and_a_damaged_picture_are_told(tmp_path):
    denseflow(tmp_path, FRAMES - 1)
    place = tmp_path / "P01" / "videos" / "P01_11"
    files = files_of(tmp_path, "denseflow")
    (place / "flow_x_00007.jpg").write_bytes(b"not a picture")
    with pytest.raises(FlowMissingError, match="no flow that can be read"):
        files.read(item(), np.array([7]))
    files.read(item(), np.array([6]))
    other = shutil.copytree(tmp_path, tmp_path / "other")
    (other / "P01" / "videos" / "P01_11" / "flow_y_00005.jpg").unlink()
    with pytest.raises(FlowMissingError, match="a field lacks one of its planes"):
        files_of(other, "denseflow").check(item())
    (other / "P01" / "videos" / "P01_11" / "flow_x_00005.jpg").unlink()
    third = shutil.copytree(other, tmp_path / "third")
    with pytest.raises(FlowMissingError, match="not numbered from 0 without a gap"):
        files_of(third, "denseflow").check(item())
    with pytest.raises(FlowMissingError, match="holds none of"):
        files_of(tmp_path / "nowhere", "denseflow").check(item())


def test_links_out_of_an_hdf5_file_are_refused(tmp_path):
    interleaved(tmp_path, FRAMES - 1)
    (tmp_path / "flow.h5").rename(tmp_path / "other.h5")
    with h5py.File(tmp_path / "flow.h5", "w") as file:
        file["P01_11"] = h5py.ExternalLink("other.h5", "/P01_11")
    with pytest.raises(FlowMissingError, match="is a link"):
        files_of(tmp_path, "interleaved").check(item())


def test_links_of_single_planes_out_of_an_hdf5_file_are_refused(tmp_path):
    ours_hdf5(tmp_path, FRAMES - 1)
    (tmp_path / "flow.h5").rename(tmp_path / "other.h5")
    with h5py.File(tmp_path / "flow.h5", "w") as file:
        for axis in "xy":
            path = f"P01/videos/P01_11/flow_{axis}"
            file[path] = h5py.ExternalLink("other.h5", path)
        for number in range(2 * (FRAMES - 1)):
            file[f"P01_11/P01_11_0/{number}"] = h5py.ExternalLink("other.h5", "/P01/videos/P01_11/flow_x")
    for layout in ("hdf5", "interleaved"):
        with pytest.raises(FlowMissingError, match="is a link"):
            files_of(tmp_path, layout).read(item(), np.array([0]))


@pytest.mark.parametrize("value", [3, h5py.Empty("f"), np.zeros((FRAMES - 1, 4)), None])
def test_an_hdf5_file_of_other_things_is_told(tmp_path, value):
    with h5py.File(tmp_path / "flow.h5", "w") as file:
        for axis in "xy":
            name = f"P01/videos/P01_11/flow_{axis}"
            file.create_group(name) if value is None else file.create_dataset(name, data=value)
    with pytest.raises(FlowMissingError, match="'flow_x' is no list of pictures"):
        files_of(tmp_path, "hdf5").read(item(), np.array([0]))


def test_flow_that_ends_early_is_not_stretched_over_the_last_clips(tmp_path):
    """35 fields of 2,000 are within what official numbers may miss; a clip at the end has none, all the same."""
    epic(tmp_path, 1964)
    flow = files_of(tmp_path, "epic")
    flow.read(item(frames=2000, first=1900, count=20), np.array([1919]))
    with pytest.raises(FlowMissingError, match="its flow ends with field 1963; this clip needs field 1998"):
        flow.read(item(frames=2000, first=1980, count=20), np.array([1980, 1998]))


def test_a_picture_of_a_size_that_no_field_has_is_refused_undecoded(tmp_path):
    denseflow(tmp_path, FRAMES - 1)
    picture = bytearray(jpeg(0))
    place = picture.index(b"\xff\xc0") + 5
    picture[place : place + 4] = struct.pack(">HH", 60000, 60000)
    (tmp_path / "P01" / "videos" / "P01_11" / "flow_x_00003.jpg").write_bytes(picture)
    with pytest.raises(FlowMissingError, match="a picture of 60000 x 60000"):
        files_of(tmp_path, "denseflow").read(item(), np.array([3]))


def i3d(root, fields, values=lambda field: field / 100):
    """Fields of I3D's floats, each with its number in u and the negative of it in v."""
    flow = np.zeros((fields, HEIGHT, WIDTH, 2), np.float32)
    for field in range(fields):
        flow[field] = values(field), -values(field)
    root.mkdir(exist_ok=True)
    np.save(root / "P01_11.npy", flow)


def i3d_files(root):
    recipe = FlowFilesRecipe(path=root, layout="i3d")
    return FlowFiles(recipe, FlowRecipe(files=recipe))


@pytest.mark.parametrize(
    ("fps", "frames", "fields"), [(25.0, 20, 19), (12.0, 20, 41), (10.0, 20, 49), (50.0, 40, 19)]
)
def test_i3d_s_field_of_a_frame_leads_from_it_to_the_next_one_at_25_a_second(tmp_path, fps, frames, fields):
    i3d(tmp_path, fields)
    own = item(fps=fps, frames=frames, count=frames)
    shown = frames_at_rate(own.video.times_seconds, 25.0, end_seconds=frames / fps)
    assert len(shown) == fields + 1
    starts = np.unique(shown)[:-1]
    found = i3d_files(tmp_path).read(own, starts)
    numbers = np.round(found[:, 0, 0, 0] / 20 * 100).astype(int)
    np.testing.assert_array_equal(shown[numbers], starts)  # it begins with the frame
    assert (shown[numbers + 1] > starts).all()  # and leads to another one
    np.testing.assert_allclose(found[:, 1], -found[:, 0])
    between = i3d_files(tmp_path).read(own, starts + 1) if fps > 25 else found
    np.testing.assert_array_equal(between, found)  # a frame that is not shown has the field around it


@pytest.mark.parametrize(
    ("flow", "message"),
    [
        (np.zeros((19, HEIGHT, WIDTH, 2)), "float64"),
        (np.zeros((19, 2, HEIGHT, WIDTH), np.float32), "I3D's flow is little-endian float32"),
        (np.full((19, HEIGHT, WIDTH, 2), 3, np.float32), "it has values beyond ±1"),
        (np.full((19, HEIGHT, WIDTH, 2), np.nan, np.float32), "it has values beyond ±1"),
        (np.zeros((5, HEIGHT, WIDTH, 2), np.float32), "5 fields of flow, where 20 frames at 25 a second"),
        (np.asfortranarray(np.zeros((19, HEIGHT, WIDTH, 2), np.float32)), "column by column"),
        (np.array([{}], dtype=object), "I3D's flow is"),
    ],
)
def test_an_npy_file_of_another_form_is_told_and_never_unpickled(tmp_path, flow, message):
    np.save(tmp_path / "P01_11.npy", flow)
    with pytest.raises(FlowMissingError, match=message):
        i3d_files(tmp_path).read(item(fps=25.0), np.array([0]))


def test_i3d_s_floats_in_an_hdf5_file_are_the_same(tmp_path):
    i3d(tmp_path, 19)
    with h5py.File(tmp_path / "flow.h5", "w") as file:
        file["P01/videos/P01_11/flow"] = np.load(tmp_path / "P01_11.npy")
    own, starts = item(fps=25.0), np.array([0, 7])
    found = i3d_files(tmp_path / "flow.h5").read(own, starts)
    np.testing.assert_array_equal(found, i3d_files(tmp_path).read(own, starts))
    assert found[1, 0, 0, 0] == pytest.approx(7 / 100 * 20)
    with h5py.File(tmp_path / "linked.h5", "w") as file:
        file["P01_11/flow"] = h5py.ExternalLink("flow.h5", "/P01/videos/P01_11/flow")
    with pytest.raises(FlowMissingError, match="is a link"):
        i3d_files(tmp_path / "linked.h5").read(own, starts)


def test_an_npy_file_that_is_cut_short_is_told(tmp_path):
    i3d(tmp_path, 19)
    data = (tmp_path / "P01_11.npy").read_bytes()
    (tmp_path / "P01_11.npy").write_bytes(data[:-1])
    with pytest.raises(FlowMissingError, match="cut short"):
        i3d_files(tmp_path).check(item(fps=25.0))


@pytest.mark.parametrize(
    ("video", "field", "fits"),
    [
        ((1920, 1080), (456, 256), True),  # EPIC's
        ((1920, 1080), (454, 254), True),  # floored to even
        ((640, 480), (340, 256), True),
        ((427, 240), (427, 240), True),
        ((32, 24), (16, 12), True),
        ((1920, 1080), (340, 256), False),  # stretched
        ((1920, 1080), (256, 256), False),
        ((1920, 1080), (256, 456), False),  # turned
        ((640, 480), (456, 256), False),
    ],
)
def test_fields_of_another_proportion_than_the_frames_are_refused(tmp_path, video, field, fits):
    own = item()
    own = ClipVideo(own.clip, own.video, ClipFacts(*video, 0, FRAMES))
    (tmp_path / "P01_11").mkdir()
    picture = cv2.imencode(".jpg", np.full(field[::-1], 128, np.uint8))[1].tobytes()
    for number in range(FRAMES - 1):
        for axis in "xy":
            (tmp_path / "P01_11" / f"flow_{axis}_{number:05d}.jpg").write_bytes(picture)
    files = files_of(tmp_path, "denseflow")
    assert files.has(own) == fits
    if fits:
        files.read(own, np.array([0]))
        return
    for ask in (files.check, lambda own: files.read(own, np.array([0]))):
        with pytest.raises(
            FlowMissingError, match=rf"fields of {field[0]} x {field[1]} of a video of {video[0]} x"
        ):
            ask(own)


def test_options_that_name_flow_say_what_is_missing(tmp_path):
    teach = ("mmkd-cache", "teach", "flow", "--manifest", "m", "--videos", "v", "-o", tmp_path / "e")
    error = refused(*teach, "--flow-files", tmp_path)
    assert "flow.files.layout: missing; give --flow-layout, or set it in a recipe (-c FILE)" in error
    error = refused(*teach, "--flow-files", tmp_path, "--flow-layout", "epic")
    assert "bound_px is missing: say what the 8-bit codes of layout epic mean, e.g. --flow-bound 20" in error
    error = refused(*teach, "--flow-files", tmp_path, "--flow-layout", "i3d", "--flow-bound", 20)
    assert "bound_px and stride are not for layout i3d" in error
    error = refused(*teach, "--flow-bound", 20)
    assert "flow.files.path: missing; give --flow-files, or set it in a recipe (-c FILE)" in error


def test_no_flow_at_all_ends_a_build_before_it_begins(tmp_path):
    (tmp_path / "unmounted").mkdir()
    flow = files_of(tmp_path / "unmounted", "denseflow")
    with pytest.raises(InputError, match=r"no video has flow in .*unmounted \(--flow-files, flow.files.path"):
        digest_of_clips(flow.recipe, [item()])
    assert digest_of_clips(flow.recipe, []) != ""


def test_the_identity_is_the_content_and_never_the_path(tmp_path):
    for name in ("one", "two"):
        denseflow(tmp_path / name, FRAMES - 1)
    first, second = (files_of(tmp_path / name, "denseflow").check(item()) for name in ("one", "two"))
    assert first == second
    changed = shutil.copytree(tmp_path / "one", tmp_path / "three")
    place = changed / "P01" / "videos" / "P01_11" / "flow_x_00000.jpg"
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH), np.uint8)
    place.write_bytes(cv2.imencode(".jpg", noise)[1].tobytes())
    assert files_of(changed, "denseflow").check(item()) != first


def named(out, layout):
    """The options that name flow files."""
    return ("--flow-files", out, "--flow-layout", layout, *(() if layout == "i3d" else ("--flow-bound", 8)))


@pytest.mark.parametrize("layout", ["denseflow", "epic", "mmaction", "hdf5", "i3d"])
def test_what_the_flow_command_writes_teach_and_build_read(tiny, tmp_path, layout):
    out = tmp_path / ("flow.h5" if layout == "hdf5" else "flow")
    written = ("--layout", layout) if layout != "hdf5" else ()
    bound = ("--bound", 8) if layout != "i3d" else ()
    call_ok("mmkd-cache", "flow", tiny.root / "videos", "-o", out, *written, *bound, "--workers", 0)
    files = named(out, layout)
    short = ("--set", "experts.flow.train.epochs=1", "--set", "experts.flow.train.warmup_epochs=0")
    call_ok("mmkd-cache", "teach", "flow", *tiny.stage_one, *files, *short, "-o", tmp_path / "expert")
    experts = ("--expert", tmp_path / "expert", "-o", tmp_path / "cache")
    call_ok("mmkd-cache", "build", *tiny.stage_one, *files, *experts)
    reader = CacheReader(tmp_path / "cache")
    assert (reader.status("train", "flow") == Status.OK).all()
    # So close only where the same fields are read: computed ones are not rounded to 8 bits.
    drift = ("mmkd-cache", "drift", tmp_path / "cache", *tiny.stage_one, *files, *experts[:2])
    call_ok(*drift, "--max-kl", 2e-8)
    assert "flow" in refused("mmkd-cache", "build", *tiny.stage_one, *experts, code=2)  # computed flow is another


def test_one_video_s_missing_flow_fails_the_flow_expert_alone(tiny, tmp_path):
    out = tmp_path / "flow"
    call_ok("mmkd-cache", "flow", tiny.root / "videos", "-o", out, "--bound", 8, "--workers", 0)
    files = named(out, "denseflow")
    short = ("--set", "experts.flow.train.epochs=1", "--set", "experts.flow.train.warmup_epochs=0")
    call_ok("mmkd-cache", "teach", "flow", *tiny.stage_one, *files, *short, "-o", tmp_path / "expert")
    lost = load_manifest(tiny.root / "manifest.jsonl").split("standard")[3]
    shutil.rmtree(out / lost.video.removesuffix(".webm"))
    experts = ("--expert", tmp_path / "expert", "--expert", tiny.root / "experts" / "rgb", "-o", tmp_path / "cache")
    assert call("mmkd-cache", "build", *tiny.stage_one, *files, *experts).code == 3
    reader = CacheReader(tmp_path / "cache")
    assert reader.status("standard", "flow")[3, 0] == Status.FLOW_FAILED
    assert (reader.status("standard", "flow")[:, 0] == Status.OK).sum() == len(
        reader.status("standard", "flow")
    ) - 1
    assert (reader.status("standard", "rgb") == Status.OK).all()
