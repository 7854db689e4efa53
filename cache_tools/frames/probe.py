"""The facts of all videos of a data set, probed in parallel and kept once per video beside the manifest.

A kept file is a JSON line and the frame times as raw little-endian float64, under a name hashed from the
video's, so that 200,000 videos spread over 256 folders. It is used while the video's stamp (size, time of
change, limits, decoder rules) is the same, and probed again otherwise or when the file is damaged. Failures
are not kept: a video that is repaired or copied late is found by the next run. What is asked for together is
also packed into one file, so that the next start asks the file system for stamps alone. Processes that start
together share the work: each takes the videos in an order of its own, claims one, and looks first whether its
facts were kept meanwhile.
"""

import fcntl
import hashlib
import json
import logging
import os
import random
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from mmkd.cache_tools.frames.data_frames import DataFrames
from mmkd.cache_tools.frames.records import Float64Array, VideoFacts
from mmkd.cache_tools.frames.source import FrameSource, VideoFiles
from mmkd.cache_tools.frames.video_paths import NOT_FOUND, is_lost
from mmkd.cache_tools.process.pool import run_tasks
from mmkd.data_manifests.atomic import write_atomically
from mmkd.data_manifests.errors import StorageError, VideoError
from mmkd.data_manifests.regular_file import read_regular

log = logging.getLogger("mmkd")

SCHEMA = "mmkd-facts-3"
BATCH = 256
"""Videos that a thread looks up in a row."""
LOOKUP_THREADS = 16
"""Look-ups wait for file systems, not processors."""
PACKED = struct.Struct("<II")
"""Bytes of the name and of the kept file in a record of a pack, before these two."""
CLAIMS_NAME = "claims"
"""Empty file in the folder of facts; a lock on one byte of it claims one video, and dies with its process."""
CLAIMED_SECONDS = 10.0
"""How long a video that another process probes is waited for; probing it twice does no harm."""
CLAIMED_LOOK_SECONDS = 0.02
"""Between two looks whether a claim is free."""
PROBE_SECONDS = 120.0
"""Time limit for one probe where the source states none."""


Found = dict[str, VideoFacts | VideoError]
"""Video -> its facts, or why it cannot be used."""


@dataclass(frozen=True)
class Probed:
    """What probing one video gave."""

    facts: VideoFacts
    """Its facts."""
    not_kept: str = ""
    """Why they could not be kept; empty when they were."""


def probe_all(
    source: FrameSource,
    videos: Sequence[str],
    *,
    store: Path | None,
    workers: int,
    progress: Callable[[int], None] | None = None,
    faults: dict[str, StorageError] | None = None,
) -> Found:
    """Return the facts of each video, or why it cannot be used, in the order of `videos` without repeats.

    `store` keeps facts between runs; None keeps nothing, and one that cannot be written costs a warning: facts are
    work saved, not a result. `progress(count)` hears of videos as they are done. Raises StorageError when the
    machine cannot read a video (with `faults` it goes there instead, and the others go on), or when a folder whose
    videos' facts are known has lost them all.
    """
    found: dict[str, VideoFacts | VideoError | None] = dict.fromkeys(videos)
    advance = progress or (lambda count: None)
    for video, facts in _kept(source, list(found), store):
        found[video] = facts
        if facts is not None:
            advance(1)
    missing = [video for video, facts in found.items() if facts is None]
    if store is not None:  # in another order than the processes beside this one
        random.Random().shuffle(missing)
    for video, result in _probe(source, missing, store=store, workers=workers):
        if not isinstance(result, StorageError):
            found[video] = result
        elif faults is None:
            raise result
        else:
            faults[video] = result
        advance(1)
    whole = {video: facts for video, facts in found.items() if facts is not None}
    if isinstance(source, VideoFiles | DataFrames) and not source.root.is_file():
        refuse_lost_folders(source.root, whole, store)
    if store is not None:
        pack = pack_path(store, whole)
        known = [video for video, facts in whole.items() if isinstance(facts, VideoFacts)]
        if known and (not set(missing).isdisjoint(known) or not _exists(pack)):
            with suppress(StorageError, FileExistsError):  # it only saves time, and what is kept may be read-only
                write_atomically(pack, _packed(store, known), sync=False)
    return whole


def _probe(
    source: FrameSource, videos: Sequence[str], *, store: Path | None, workers: int
) -> Iterator[tuple[str, VideoFacts | VideoError | StorageError]]:
    limits = getattr(source, "limits", None)
    timeout_seconds = PROBE_SECONDS if limits is None else limits.clip_timeout_seconds
    probe = partial(probe_and_keep, source, store)
    warned = False
    for position, result in run_tasks(
        probe, videos, workers=min(workers, len(videos)), timeout_seconds=timeout_seconds
    ):
        if isinstance(result, Probed) and result.not_kept and not warned:
            log.warning("%s, so the next start probes again; another folder: --facts FOLDER", result.not_kept)
            warned = True
        yield videos[position], result.facts if isinstance(result, Probed) else result


def probe_and_keep(source: FrameSource, store: Path | None, video: str) -> Probed:
    """Probe one video and keep its facts if that is possible; VideoError if it cannot be used."""
    if store is None:
        return _probe_and_keep(source, None, video)
    with claimed(store, video):
        kept = _look_up_one(source, store, None, video)  # another process may have been here
        return Probed(kept) if isinstance(kept, VideoFacts) else _probe_and_keep(source, store, video)


@contextmanager
def claimed(store: Path, video: str) -> Iterator[None]:
    """Let one process at a time probe a video, as far as the file system has locks and for `CLAIMED_SECONDS`."""
    # Seven bytes, since an offset in a file is a signed number of eight.
    byte = int.from_bytes(hashlib.blake2b(video.encode("utf-8", "surrogatepass"), digest_size=7).digest())
    try:
        store.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(store / CLAIMS_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:  # a folder that cannot be written: nothing is shared there
        yield
        return
    try:
        deadline = time.monotonic() + CLAIMED_SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
                break
            except (BlockingIOError, PermissionError):  # claimed: POSIX allows both errors
                time.sleep(CLAIMED_LOOK_SECONDS)
            except OSError:  # no locks here
                break
        yield
    finally:
        os.close(descriptor)


def _probe_and_keep(source: FrameSource, store: Path | None, video: str) -> Probed:
    stamp = source.stamp(video)  # before the probe: a change while it runs makes the kept facts stale
    try:
        facts = source.probe(video)
    except VideoError:
        facts = source.probe(video)  # a fault of the video repeats, one of the machine may not
    try:
        if store is not None:
            path = facts_path(store, video)
            # Not synced: a torn file fails its hash, and is only probed again.
            write_atomically(path, encode_facts(facts, video=video, stamp=stamp), sync=False)
    except (StorageError, FileExistsError) as error:
        return Probed(facts, f"video facts are not kept: {str(error).split(';')[0]}")
    return Probed(facts)


def refuse_lost_folders(root: Path, found: Found, store: Path | None) -> None:
    """Raise StorageError for a folder that held videos, by their facts, and is empty or gone: a lost disk."""
    absent = [video for video, error in found.items() if str(error).startswith(NOT_FOUND)]
    held = {Path(video).parent for video, facts in found.items() if isinstance(facts, VideoFacts)}
    held |= {Path(video).parent for video in absent if store and _exists(facts_path(store, video))}
    for folder in sorted({Path(video).parent for video in absent} & held):
        if is_lost(root / folder):
            raise StorageError(
                f"{root / folder} is empty or gone, and it held videos before: is its disk mounted, "
                f"and --videos right? Nothing was recorded. If they are gone for good, delete their facts, {store}"
            )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a folder that may not be read holds nothing for us
        return False


def facts_path(store: Path, video: str) -> Path:
    """Return where the facts of a video are kept."""
    name = hashlib.blake2b(video.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return store / name[:2] / f"{name[2:]}.facts"


def encode_facts(facts: VideoFacts, *, video: str, stamp: str) -> bytes:
    """Return the kept file's bytes: one JSON line, then the times."""
    times = facts.times_seconds.astype("<f8").tobytes()
    header = {
        "schema": SCHEMA,
        "video": video,
        "stamp": stamp,
        "width": facts.width,
        "height": facts.height,
        "decoder": facts.decoder,
        "identity": facts.identity,
    }
    return json.dumps(header | {"hash": _hash(header, times)}).encode() + b"\n" + times


def decode_facts(data: bytes, *, video: str, stamp: str) -> VideoFacts | None:
    """Return the facts, or None when they are of another video or stamp, or damaged."""
    line, _, times = data.partition(b"\n")
    try:
        header = json.loads(line)
        if header.pop("hash") != _hash(header, times):
            return None
        if (header["schema"], header["video"], header["stamp"]) != (SCHEMA, video, stamp):
            return None
        return VideoFacts(
            width=int(header["width"]),
            height=int(header["height"]),
            times_seconds=np.frombuffer(times, dtype="<f8").astype(np.float64),
            decoder=str(header["decoder"]),
            identity=str(header["identity"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _hash(header: Mapping[str, object], times: bytes) -> str:
    return hashlib.blake2b(json.dumps(header).encode() + b"\n" + times, digest_size=16).hexdigest()


def _kept(
    source: FrameSource, videos: Sequence[str], store: Path | None
) -> Iterator[tuple[str, VideoFacts | VideoError | None]]:
    """Yield each video with its kept facts, its VideoError when it is missing, or None to be probed.

    Equal frame times are one array: most videos of a data set have one rate and a usual length.
    """
    times: dict[bytes, Float64Array] = {}
    packed = {} if store is None else read_pack(pack_path(store, videos))
    look_up = partial(_look_up, source, store, packed)
    batches = [videos[start : start + BATCH] for start in range(0, len(videos), BATCH)]
    with ThreadPoolExecutor(LOOKUP_THREADS) as executor:
        for batch, found in zip(batches, executor.map(look_up, batches), strict=True):
            for video, facts in zip(batch, found, strict=True):
                if isinstance(facts, VideoFacts):
                    own = facts.times_seconds
                    facts = replace(facts, times_seconds=times.setdefault(own.tobytes(), own))
                yield video, facts


def _look_up(
    source: FrameSource, store: Path | None, packed: dict[str, memoryview], videos: Sequence[str]
) -> list[VideoFacts | VideoError | None]:
    return [_look_up_one(source, store, packed.get(video), video) for video in videos]


def _look_up_one(
    source: FrameSource, store: Path | None, packed: memoryview | None, video: str
) -> VideoFacts | VideoError | None:
    try:
        stamp = source.stamp(video)
    except VideoError as error:
        return error  # known here: no process has to find it again
    except StorageError:
        return None  # the probe meets it again, or it has passed
    facts = None if packed is None else decode_facts(bytes(packed), video=video, stamp=stamp)
    if facts is None and store is not None:  # not packed, or changed since
        with suppress(OSError):
            facts = decode_facts(read_regular(facts_path(store, video)), video=video, stamp=stamp)
    return facts


def pack_path(store: Path, videos: Iterable[str]) -> Path:
    """Return where the facts of videos that are asked for together are packed."""
    digest = hashlib.blake2b(digest_size=16)
    for video in videos:
        digest.update(video.encode("utf-8", "surrogatepass") + b"\n")
    return store / f"{digest.hexdigest()}.pack"


def read_pack(path: Path) -> dict[str, memoryview]:
    """Return video -> its kept file's bytes; what follows a damaged record, or all of no pack, is left out."""
    found: dict[str, memoryview] = {}
    try:
        data = memoryview(read_regular(path))  # not mapped: on a shared disk another task may replace it meanwhile
    except OSError:
        return found
    start = 0
    while start + PACKED.size <= len(data):
        name_bytes, size = PACKED.unpack_from(data, start)
        begin = start + PACKED.size + name_bytes
        if begin + size > len(data):
            break
        with suppress(UnicodeDecodeError):
            found[bytes(data[begin - name_bytes : begin]).decode()] = data[begin : begin + size]
        start = begin + size
    return found


def _packed(store: Path, videos: Iterable[str]) -> Iterator[bytes]:
    """Yield the records of a pack, made of what is kept: stamps are those before each probe."""
    for video in videos:
        name = video.encode()
        with suppress(OSError):
            data = read_regular(facts_path(store, video))
            yield PACKED.pack(len(name), len(data)) + name + data
