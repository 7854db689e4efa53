"""Facts of videos are kept between runs while they are true, and no longer."""

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkd.cache_tools.frames import probe as facts_module
from mmkd.cache_tools.frames.probe import decode_facts, encode_facts, facts_path, probe_all
from mmkd.cache_tools.frames.records import VideoFacts
from mmkd.cache_tools.frames.source import Limits, VideoFiles
from mmkd.data_manifests.errors import StorageError, VideoError
from tests.helpers import barcode_videos as barcode


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for i in range(3):
        sample = barcode.Sample(f"{i}.webm", "libvpx-vp9", barcode.VP9, frames=6 + i)
        barcode.write_sample(folder, sample)
    (folder / "text.webm").write_text("no video")
    return folder


def same(one: VideoFacts, other: VideoFacts) -> bool:
    return (
        replace(one, times_seconds=other.times_seconds) == other
        and one.times_seconds.tobytes() == other.times_seconds.tobytes()
    )


def unpack(store: Path) -> None:
    """Remove the packs, as if the run that probed had been killed before it wrote them."""
    for pack in store.glob("*.pack"):
        pack.unlink()


class CountingFiles(VideoFiles):
    """Video files that note which videos are probed."""

    probed: list[str] = []  # noqa: RUF012 - one list for all, emptied by each test

    def probe(self, video: str) -> VideoFacts:
        self.probed.append(video)
        return super().probe(video)


def probe_counted(root, store, videos, limits: Limits | None = None):
    CountingFiles.probed.clear()
    found = probe_all(CountingFiles(root, limits or Limits()), videos, store=store, workers=0)
    return found, sorted(CountingFiles.probed)


VIDEOS = ["0.webm", "1.webm", "2.webm"]


@pytest.mark.parametrize("workers", [0, 2])
def test_each_video_is_probed_once_and_failures_are_named(root, tmp_path, workers):
    done = []
    videos = ["1.webm", "missing.webm", "text.webm", "0.webm", "1.webm", "../out.webm"]
    found = probe_all(VideoFiles(root), videos, store=tmp_path / "facts", workers=workers, progress=done.append)
    assert list(found) == ["1.webm", "missing.webm", "text.webm", "0.webm", "../out.webm"]
    assert sum(done) == 5
    assert found["1.webm"].frame_count == 7
    assert found["0.webm"].frame_count == 6
    assert str(found["missing.webm"]) == "video not found: missing.webm"
    assert "not a video" in str(found["text.webm"])
    assert "out of the video root" in str(found["../out.webm"])
    assert len(list((tmp_path / "facts").rglob("*.facts"))) == 2  # failures are not kept


def test_the_second_run_probes_nothing(root, tmp_path):
    first, probed = probe_counted(root, tmp_path / "facts", VIDEOS)
    assert probed == VIDEOS
    second, probed = probe_counted(root, tmp_path / "facts", VIDEOS)
    assert probed == []
    assert all(same(first[video], second[video]) for video in VIDEOS)


def test_kept_videos_with_equal_times_share_them(root, tmp_path):
    (root / "again.webm").write_bytes((root / "1.webm").read_bytes())
    videos = [*VIDEOS, "again.webm"]
    probe_counted(root, tmp_path / "facts", videos)
    found, probed = probe_counted(root, tmp_path / "facts", videos)
    assert probed == []
    assert found["again.webm"].times_seconds is found["1.webm"].times_seconds
    assert found["0.webm"].times_seconds is not found["1.webm"].times_seconds


def test_what_is_kept_is_what_is_given(root, tmp_path):
    """Only an altered kept file shows that it is read at all."""
    probe_counted(root, tmp_path / "facts", VIDEOS)
    unpack(tmp_path / "facts")
    files = VideoFiles(root)
    path = facts_path(tmp_path / "facts", "1.webm")
    facts = decode_facts(path.read_bytes(), video="1.webm", stamp=files.stamp("1.webm"))
    path.write_bytes(encode_facts(replace(facts, width=1234), video="1.webm", stamp=files.stamp("1.webm")))
    found, _ = probe_counted(root, tmp_path / "facts", VIDEOS)
    assert found["1.webm"].width == 1234


def test_only_what_is_missing_is_probed(root, tmp_path):
    probe_counted(root, tmp_path / "facts", VIDEOS[:2])
    facts_path(tmp_path / "facts", "0.webm").unlink()
    _, probed = probe_counted(root, tmp_path / "facts", VIDEOS)
    assert probed == ["0.webm", "2.webm"]


def test_without_a_store_nothing_is_kept(root, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert probe_counted(root, None, VIDEOS)[1] == probe_counted(root, None, VIDEOS)[1] == VIDEOS
    assert sorted(tmp_path.rglob("*")) == before


def test_a_changed_video_is_probed_again(root, tmp_path):
    probe_counted(root, tmp_path / "facts", VIDEOS)
    shutil.copyfile(root / "2.webm", root / "0.webm")
    found, probed = probe_counted(root, tmp_path / "facts", VIDEOS)
    assert probed == ["0.webm"]
    assert found["0.webm"].frame_count == 8
    assert probe_counted(root, tmp_path / "facts", VIDEOS)[1] == []


def test_the_same_size_at_another_time_is_a_change(root, tmp_path):
    probe_counted(root, tmp_path / "facts", VIDEOS)
    os.utime(root / "1.webm", ns=(0, 1))
    assert probe_counted(root, tmp_path / "facts", VIDEOS)[1] == ["1.webm"]


def test_stricter_limits_hold_for_what_is_kept(root, tmp_path):
    probe_counted(root, tmp_path / "facts", VIDEOS)
    found, probed = probe_counted(root, tmp_path / "facts", VIDEOS, Limits(max_pixels=100))
    assert list(dict.fromkeys(probed)) == VIDEOS, "each is doubted once"
    assert all("the limit is 100 pixels" in str(found[video]) for video in VIDEOS)


def test_other_decoder_rules_are_not_served_from_what_is_kept(root, tmp_path):
    probe_all(VideoFiles(root), VIDEOS, store=tmp_path / "facts", workers=0)
    found = probe_all(VideoFiles(root, force_pyav=True), VIDEOS, store=tmp_path / "facts", workers=0)
    assert {facts.decoder for facts in found.values()} == {"pyav"}


def test_a_video_removed_after_the_first_run_is_missing(root, tmp_path):
    probe_counted(root, tmp_path / "facts", VIDEOS)
    (root / "1.webm").unlink()
    found, _ = probe_counted(root, tmp_path / "facts", VIDEOS)
    assert str(found["1.webm"]) == "video not found: 1.webm"


def test_a_repaired_video_is_found_by_the_next_run(root, tmp_path):
    assert isinstance(probe_counted(root, tmp_path / "facts", ["text.webm"])[0]["text.webm"], VideoError)
    shutil.copyfile(root / "2.webm", root / "text.webm")
    assert probe_counted(root, tmp_path / "facts", ["text.webm"])[0]["text.webm"].frame_count == 8


@pytest.mark.parametrize("length", [0, 1, 50, -1])
def test_a_torn_file_is_probed_again_and_repaired(root, tmp_path, length):
    probe_counted(root, tmp_path / "facts", VIDEOS)
    unpack(tmp_path / "facts")
    path = facts_path(tmp_path / "facts", "0.webm")
    whole = path.read_bytes()
    path.write_bytes(whole[:length])
    assert probe_counted(root, tmp_path / "facts", VIDEOS)[1] == ["0.webm"]
    assert path.read_bytes() == whole


def test_a_pack_serves_the_same_facts_with_no_other_file(root, tmp_path):
    store = tmp_path / "facts"
    first, _ = probe_counted(root, store, VIDEOS)
    for path in store.rglob("*.facts"):
        path.unlink()
    second, probed = probe_counted(root, store, VIDEOS)
    assert probed == []
    assert all(same(first[video], second[video]) for video in VIDEOS)
    shutil.copyfile(root / "2.webm", root / "0.webm")
    third, probed = probe_counted(root, store, VIDEOS)
    assert probed == ["0.webm"], "what changed since it was packed is probed"
    assert third["0.webm"].frame_count == 8
    (root / "1.webm").unlink()
    assert str(probe_counted(root, store, VIDEOS)[0]["1.webm"]) == "video not found: 1.webm"


@pytest.mark.parametrize("kept", [0, 3, 8, 20, 0.5, -1])
def test_a_torn_pack_costs_nothing_but_time(root, tmp_path, kept):
    store = tmp_path / "facts"
    first, _ = probe_counted(root, store, VIDEOS)
    (pack,) = store.glob("*.pack")
    whole = pack.read_bytes()
    pack.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    second, probed = probe_counted(root, store, VIDEOS)
    assert probed == [], "the kept files are still there"
    assert all(same(first[video], second[video]) for video in VIDEOS)


def test_a_pack_that_cannot_be_written_costs_nothing_but_time(root, tmp_path):
    store = tmp_path / "facts"
    first, _ = probe_counted(root, store, VIDEOS)
    (pack,) = store.glob("*.pack")
    pack.unlink()
    pack.mkdir()  # nothing can be put in its place, as in a folder that may only be read
    second, probed = probe_counted(root, store, VIDEOS)
    assert probed == []
    assert all(same(first[video], second[video]) for video in VIDEOS)
    shutil.copyfile(root / "2.webm", root / "0.webm")
    third, probed = probe_counted(root, store, VIDEOS)
    assert (probed, third["0.webm"].frame_count) == (["0.webm"], 8)
    assert not list(store.glob(".*.tmp"))


@pytest.mark.parametrize("workers", [0, 2])
def test_facts_that_cannot_be_kept_cost_a_warning_that_names_the_option(root, tmp_path, caplog, workers):
    (tmp_path / "facts").write_text("a file where the folder should be")
    found = probe_all(VideoFiles(root), VIDEOS, store=tmp_path / "facts", workers=workers)
    assert [facts.frame_count for facts in found.values()] == [6, 7, 8]
    (record,) = caplog.records
    assert str(tmp_path / "facts") in record.getMessage()
    assert "--facts FOLDER" in record.getMessage()


def test_what_another_user_keeps_is_read_and_left_alone(root, tmp_path, caplog):
    """One video is newer than what is kept of it, and nothing there can be replaced."""
    store = tmp_path / "facts"
    probe_counted(root, store, VIDEOS)
    unpack(store)
    shutil.copyfile(root / "2.webm", root / "0.webm")
    kept = facts_path(store, "0.webm")
    kept.unlink()
    kept.mkdir()  # even root cannot move a file here
    found, probed = probe_counted(root, store, VIDEOS)
    assert (probed, found["0.webm"].frame_count) == (["0.webm"], 8)
    assert "video facts are not kept" in caplog.text
    assert kept.is_dir()


def test_a_missing_video_starts_no_process(root, tmp_path):
    """A process that probes would be counted by what it leaves: the source notes in a file who probes."""
    found, probed = probe_counted(root, tmp_path / "facts", ["none.webm", *VIDEOS])
    assert probed == VIDEOS
    assert str(found["none.webm"]) == "video not found: none.webm"


@pytest.mark.parametrize("known", ["kept", "packed"])
def test_a_folder_that_lost_its_videos_is_the_machines_fault(root, tmp_path, known):
    (root / "disk").mkdir()
    shutil.copyfile(root / "2.webm", root / "disk" / "2.webm")
    videos = [*VIDEOS, "disk/2.webm"]
    first, _ = probe_counted(root, tmp_path / "facts", videos)
    if known == "kept":
        unpack(tmp_path / "facts")
    (root / "disk").rename(tmp_path / "elsewhere")
    for mount_point in ("gone", "empty"):
        if mount_point == "empty":
            (root / "disk").mkdir()
        with pytest.raises(StorageError, match="videos/disk is empty or gone, and it held videos before"):
            probe_counted(root, tmp_path / "facts", videos)
    (root / "disk").rmdir()
    (tmp_path / "elsewhere").rename(root / "disk")
    again, probed = probe_counted(root, tmp_path / "facts", videos)
    assert probed == []
    assert all(same(again[video], first[video]) for video in videos)


def test_a_folder_that_never_held_a_video_is_no_fault_of_the_machine(root, tmp_path):
    (root / "empty").mkdir()
    found, _ = probe_counted(root, tmp_path / "facts", [*VIDEOS, "empty/a.webm", "none/b.webm"])
    assert [str(found[video]) for video in ("empty/a.webm", "none/b.webm")] == [
        "video not found: empty/a.webm",
        "video not found: none/b.webm",
    ]


NOTING = """
import sys, time
from pathlib import Path
from mmkd.cache_tools.frames.probe import probe_all
from mmkd.cache_tools.frames.source import VideoFiles

class NotingFiles(VideoFiles):
    def probe(self, video):
        with open("probed.txt", "a") as file:
            print(video, file=file)
        time.sleep(0.05)  # long enough for the other process to come to the same video
        return super().probe(video)

if __name__ == "__main__":
    from noting_source import NotingFiles
    Path(f"{sys.argv[1]}.ready").touch()
    while len(list(Path().glob("*.ready"))) < 2:
        time.sleep(0.01)
    videos = sorted(path.name for path in Path("videos").iterdir())
    found = probe_all(NotingFiles(Path("videos")), videos, store=Path("facts"), workers=int(sys.argv[2]))
    print([(video, facts.frame_count, facts.identity) for video, facts in found.items()])
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_that_start_together_probe_each_video_once(root, tmp_path, workers):
    (root / "text.webm").unlink()
    for number in range(3, 12):
        shutil.copyfile(root / f"{number % 3}.webm", root / f"{number}.webm")
    (tmp_path / "noting_source.py").write_text(NOTING)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    both = [
        subprocess.Popen(
            [sys.executable, "noting_source.py", name, str(workers)],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
        )
        for name in ("one", "other")
    ]
    said = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said[0] == said[1] != b""
    assert sorted((tmp_path / "probed.txt").read_text().split()) == sorted(path.name for path in root.iterdir())


def test_a_claim_that_is_never_given_back_is_waited_for_no_longer_than_allowed(root, tmp_path, monkeypatch):
    """The holder is another process: a process is not locked out by its own claims."""
    store = tmp_path / "facts"
    monkeypatch.setattr(facts_module, "CLAIMED_SECONDS", 0.3)
    holder = (
        "import sys; from pathlib import Path; from mmkd.cache_tools.frames.probe import claimed\n"
        "with claimed(Path(sys.argv[1]), '1.webm'): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, store], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"held\n"
        begun = time.monotonic()
        found, probed = probe_counted(root, store, VIDEOS)
        assert time.monotonic() - begun >= 0.3
        process.stdin.close()
    assert probed == VIDEOS
    assert [facts.frame_count for facts in found.values()] == [6, 7, 8]


ABORTING = """
import os
from mmkd.cache_tools.frames.source import VideoFiles

class AbortingFiles(VideoFiles):
    def probe(self, video):
        if video == "1.webm":
            os.abort()  # as decord does for huge frames
        return super().probe(video)
"""


def test_a_probe_that_kills_its_process_is_one_failure(root, tmp_path, monkeypatch):
    (tmp_path / "aborting_source.py").write_text(ABORTING)
    monkeypatch.syspath_prepend(str(tmp_path))
    source = importlib.import_module("aborting_source").AbortingFiles(root)
    found = probe_all(source, VIDEOS, store=None, workers=2)
    assert str(found.pop("1.webm")) == "decoder died"
    assert [facts.frame_count for facts in found.values()] == [6, 8]


facts_strategy = st.builds(
    VideoFacts,
    width=st.integers(1, 10_000),
    height=st.integers(1, 10_000),
    times_seconds=st.lists(st.floats(0, 1e5), min_size=1, max_size=50).map(lambda t: np.array(sorted(t))),
    decoder=st.sampled_from(["pyav", "decord"]),
    identity=st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1),
)


@settings(deadline=None)
@given(facts=facts_strategy, video=st.text(min_size=1), stamp=st.text())
def test_kept_facts_come_back_the_same_bits(facts, video, stamp):
    data = encode_facts(facts, video=video, stamp=stamp)
    assert same(decode_facts(data, video=video, stamp=stamp), facts)
    assert decode_facts(data, video=video + "x", stamp=stamp) is None
    assert decode_facts(data, video=video, stamp=stamp + "x") is None
    assert facts_path(Path("store"), video).is_relative_to("store")


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_damaged_kept_facts_are_never_served_wrong(data):
    facts = VideoFacts(64, 48, np.arange(5) / 12, "pyav", "abc")
    kept = bytearray(encode_facts(facts, video="v", stamp="s"))
    position = data.draw(st.integers(0, len(kept) - 1))
    kept[position] ^= data.draw(st.integers(1, 255))
    found = decode_facts(bytes(kept), video="v", stamp="s")
    assert found is None or same(found, facts), "only white space between the words may pass"


@pytest.mark.parametrize("header", [b"", b"[]", b"null", b'{"schema": "mmkd-facts-1"}', b"\xff", b"[" * 100_000])
def test_a_header_that_is_none_is_ignored(header):
    assert decode_facts(header + b"\n1234", video="v", stamp="s") is None


def test_kept_files_spread_over_folders(tmp_path):
    folders = {facts_path(tmp_path, f"{i}.webm").parent for i in range(5000)}
    assert len(folders) == 256
    header, _, _ = encode_facts(VideoFacts(64, 48, np.zeros(1), "pyav", "a"), video="v", stamp="s").partition(b"\n")
    assert json.loads(header)["schema"] == "mmkd-facts-3"


def test_facts_whose_times_count_from_the_first_frame_are_probed_again(monkeypatch):
    """The second form: where the sound starts first, its times are not those of the container."""
    facts = VideoFacts(64, 48, np.zeros(1), "pyav", "a")
    with monkeypatch.context() as earlier:
        earlier.setattr(facts_module, "SCHEMA", "mmkd-facts-2")
        kept = encode_facts(facts, video="v", stamp="s")
    assert decode_facts(kept, video="v", stamp="s") is None
    assert decode_facts(encode_facts(facts, video="v", stamp="s"), video="v", stamp="s").identity == "a"
