"""Our loader beside bare decoding of the same frames, and plain DataLoaders over decord and torchcodec, in one run.

    python tests/benchmarks/reading.py [FOLDER] [--frames N] [--size PX] [--batch N] [--batches N] [--rounds N]
        [--cores N]

FOLDER holds videos that decord reads exactly (others are passed over and counted); without it 56 videos of the
demo are made. Fewer than 64 are copied, since a process remembers packets of the last 16. Every case reads the
same clips under the same fresh views in the same order, each view decoded again. Bare decoding opens the file with
decord, decodes the view's frames and drops them; ours checks them, crops, resizes (area) and stacks, the plain
loaders crop, resize (bilinear) and stack. One core: one thread, or one process; all cores: as many. Nobody trains
meanwhile, and a batch is taken as soon as it is there. The cases take turns in each round; shares of bare decoding
are medians of the rounds' own, of the wall and of CPU time (that of all processes), which other work on the
machine disturbs less. The aim: 90 % or more.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from mmkd.cache_tools.frames.clip_set import ClipVideo
from mmkd.cache_tools.frames.data_frames import DataFrames
from mmkd.cache_tools.frames.source import clip_facts
from mmkd.cache_tools.views.drawing import ViewPolicy
from mmkd.cache_tools.views.view import View
from mmkd.data_manifests.demo.plan import DemoOptions
from mmkd.data_manifests.demo.write import write_demo
from mmkd.data_manifests.errors import VideoError
from mmkd.data_manifests.manifest import Clip, Head
from mmkd.student.data.batches import Step
from mmkd.student.data.loader_processes import read_by_processes
from mmkd.student.data.reading import read_by_threads
from mmkd.student.data.rgb_views import RGBViews
from mmkd.student.data.view_streams import DrawnViews
from tests.helpers.demo_place import machine
from tests.helpers.processes import cpu_seconds

SUFFIXES = {".webm", ".mp4", ".mkv", ".avi"}
WARM, AHEAD = 2, 4
LEAST_VIDEOS = 64
"""So many that what is remembered of a video is seldom there when it comes again."""
Batches = Generator[object]


@dataclass(frozen=True)
class Look:
    """One view of one video, as plain loaders need it."""

    path: str
    """The file."""
    view: View
    """Frames, crop and flip."""

    @property
    def frames(self) -> list[int]:
        """The frames that are decoded, ascending."""
        return np.unique(self.view.frame_indices).tolist()


class Clips:
    """The videos of a folder, each one clip, under views that are drawn as a cache's."""

    def __init__(self, folder: Path, policy: ViewPolicy) -> None:
        source, self.policy, self.items, self.left_out = DataFrames(folder), policy, [], 0
        for path in sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES):
            try:
                facts = source.probe(path.name)
            except VideoError:
                self.left_out += 1
                continue
            if facts.decoder != "decord":
                self.left_out += 1
                continue
            clip = Clip(path.name, path.name, "train", {"action": 0})
            self.items.append(ClipVideo(clip, facts, clip_facts(clip, facts)))
        self.folder = folder
        self.stream = DrawnViews(self.items, policy, dataset="reading", seed=0, flip_allowed=False, views=None)
        head = Head("action", ("one", "two"))
        self.data = RGBViews(source, self.items, self.stream, heads=(head,), size_px=policy.size_px, memory_bytes=0)

    def steps(self, batch: int, count: int) -> list[Step]:
        """Return rows and views of `count` batches: the videos in turn, and a fresh view at each turn."""
        turns = np.arange(batch * count)
        rows, views = turns % len(self.items), turns // len(self.items)
        return [(rows[i : i + batch], views[i : i + batch]) for i in range(0, len(turns), batch)]

    def looks(self, steps: Iterable[Step]) -> list[Look]:
        """Return the same for plain loaders."""
        pairs = [pair for rows, views in steps for pair in zip(rows.tolist(), views.tolist(), strict=True)]
        paths = [str(self.folder / item.clip.video) for item in self.items]
        return [Look(paths[row], self.stream.view(row, view)) for row, view in pairs]


def decode(look: Look) -> np.ndarray:
    """Decode the frames of a view with decord, as its documentation shows."""
    import decord  # not before the demo is made: where it is loaded, PyAV cannot encode

    reader = decord.VideoReader(look.path, ctx=decord.cpu(0), num_threads=1)
    return reader.get_batch(look.frames).asnumpy()


def decode_torchcodec(look: Look) -> np.ndarray:
    """Decode the same frames with torchcodec, as its documentation shows."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(look.path, dimension_order="NHWC", num_ffmpeg_threads=1)
    return decoder.get_frames_at(look.frames).data.numpy()


class Plain(Dataset):
    """What one would write by hand: decode, crop, resize."""

    def __init__(self, looks: list[Look], size_px: int, decoder: Callable[[Look], np.ndarray] | None) -> None:
        """Without a decoder, decode with decord and give nothing."""
        self._looks, self._size, self._decoder = looks, size_px, decoder

    def __len__(self) -> int:
        return len(self._looks)

    def __getitem__(self, number: int) -> torch.Tensor:
        look = self._looks[number]
        if self._decoder is None:
            return torch.tensor(len(decode(look)))
        frames = self._decoder(look)[np.searchsorted(look.frames, look.view.frame_indices)]
        left, top, width, height = look.view.crop_xywh
        window = frames[:, top : top + height, left : left + width]
        size = (self._size, self._size)
        return torch.from_numpy(np.stack([cv2.resize(frame, size) for frame in window]))


def bare_here(looks: list[Look], batch: int) -> Generator[int]:
    """Decode in this thread; yield after each batch."""
    for start in range(0, len(looks), batch):
        yield sum(len(decode(look)) for look in looks[start : start + batch])


def plain_loader(dataset: Dataset, batch: int, workers: int) -> Generator[object]:
    """Yield batches of torch's DataLoader as it comes; its workers end with it."""
    iterator = iter(DataLoader(dataset, batch_size=batch, num_workers=workers, worker_init_fn=one_thread))
    try:
        yield from iterator
    finally:
        iterator._shutdown_workers()


def one_thread(_: int) -> None:
    """Keep OpenCV to one thread, as our workers do."""
    cv2.setNumThreads(1)


def cases(clips: Clips, batch: int, count: int, cores: int) -> dict[tuple[str, int], Callable[[], Batches]]:
    """Return (name, cores) -> what begins to read."""
    steps, size = clips.steps(batch, count), clips.policy.size_px
    looks = clips.looks(steps)
    found: dict[tuple[str, int], Callable[[], Batches]] = {}
    for own in dict.fromkeys((1, cores)):
        bare = Plain(looks, size, None)
        found["bare decoding", own] = (
            (lambda: bare_here(looks, batch)) if own == 1 else lambda bare=bare: plain_loader(bare, batch, cores)
        )
        found["ours, threads", own] = lambda own=own: read_by_threads(clips.data, steps, threads=own, ahead=AHEAD)
        found["ours, processes", own] = lambda own=own: read_by_processes(
            clips.data, steps, processes=own, ahead=AHEAD
        )
        decoders = {"DataLoader over decord": decode}
        if torchcodec_fault(looks[0]) is None:
            decoders["DataLoader over torchcodec"] = decode_torchcodec
        for name, decoder in decoders.items():
            dataset = Plain(looks, size, decoder)
            found[name, own] = lambda dataset=dataset, own=own: plain_loader(dataset, batch, own)
    return found


def torchcodec_fault(look: Look) -> str | None:
    """Return why torchcodec cannot read here, None where it can; it looks for FFmpeg when it is used."""
    if importlib.util.find_spec("torchcodec") is None:
        return "it is not installed"
    try:
        decode_torchcodec(look)
    except (ImportError, OSError, RuntimeError) as error:
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    return None


def measure(batches: Batches, batch: int, count: int) -> tuple[float, float]:
    """Return clips a second of the wall and of CPU time, once the first batches are there."""
    with closing(batches) as iterator:
        for _ in range(WARM):
            next(iterator)
        wall, cpu = time.perf_counter(), cpu_seconds()
        for _ in range(count):
            next(iterator)
        return count * batch / (time.perf_counter() - wall), count * batch / (cpu_seconds() - cpu)


def with_copies(folder: Path, copies: Path) -> Path:
    """Return a folder with at least LEAST_VIDEOS: of fewer, each is copied as often as that takes."""
    paths = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if len(paths) >= LEAST_VIDEOS:
        return folder
    copies.mkdir()
    for number in range(-(-LEAST_VIDEOS // len(paths)) * len(paths)):
        path = paths[number % len(paths)]
        shutil.copy(path, copies / f"{path.stem}-{number // len(paths)}{path.suffix}")
    return copies


def check_same(clips: Clips, batch: int) -> None:
    """See that the plain loader decodes the frames that ours does."""
    steps = clips.steps(batch, 1)
    for look, row, view in zip(clips.looks(steps), *(part.tolist() for part in steps[0]), strict=True):
        item, wanted = clips.items[row], clips.stream.view(row, view)
        ours = DataFrames(clips.folder).read(item.clip.video, np.unique(wanted.frame_indices), item.video)
        assert np.array_equal(decode(look), ours.frames), look.path


def compare(clips: Clips, options: argparse.Namespace) -> None:
    """Print the table."""
    check_same(clips, options.batch)
    if fault := torchcodec_fault(clips.looks(clips.steps(1, 1))[0]):
        print(f"without torchcodec: {fault}")
    # Batches that are read ahead must never be the last ones, or fewer and fewer workers would be at work.
    begin = cases(clips, options.batch, WARM + options.batches + 4 * options.cores + AHEAD, options.cores)
    rates: dict[tuple[str, int], list[tuple[float, float]]] = {case: [] for case in begin}
    for number in range(options.rounds):
        for case in list(begin)[:: -1 if number % 2 else 1]:
            rates[case].append(measure(begin[case](), options.batch, options.batches))
    print(f"{'':28}{'cores':>6}{'clips/s':>10}{'of bare':>10}{'clips/CPU-s':>13}{'of bare':>10}")
    for (name, cores), found in rates.items():
        own, bare = np.array(found), np.array(rates["bare decoding", cores])
        (wall, cpu), shares = np.median(own, axis=0), np.median(own / bare, axis=0)
        print(f"{name:28}{cores:6}{wall:10.1f}{shares[0]:10.2f}{cpu:13.1f}{shares[1]:10.2f}")


def main() -> None:
    """Print the table of a folder, or of videos of the demo."""
    parser = argparse.ArgumentParser(description="our loader beside bare decoding and plain loaders")
    parser.add_argument("folder", nargs="?", type=Path, help="videos [default: some of the demo are made]")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    print(machine())
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder
        if folder is None:
            demo = DemoOptions(train_clips=28, standard_clips=14, compositional_clips=14)
            write_demo(Path(made), demo, workers=2)
            folder = Path(made) / "videos"
        folder = with_copies(folder, Path(made) / "copies")
        clips = Clips(folder, ViewPolicy(frames=options.frames, size_px=options.size))
        sizes = ", ".join(sorted({f"{item.facts.width} x {item.facts.height}" for item in clips.items}))
        decord = importlib.metadata.version("decord")
        print(f"{len(clips.items)} videos ({sizes}), {clips.left_out} left out; decord {decord}")
        print(
            f"views of {options.frames} x {options.size} px, {options.batches} batches of {options.batch} a round"
        )
        compare(clips, options)
    print(f"load after: {', '.join(f'{value:.1f}' for value in os.getloadavg())}")


if __name__ == "__main__":
    main()
