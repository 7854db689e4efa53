"""The facts of all videos of a data set, probed in parallel and kept once per video beside the manifest.

A kept file is a JSON line and the frame times as raw little-endian float64, under a name hashed from the
video's, so that 200,000 videos spread over 256 folders. It is used while the video's stamp (size, time of
change, limits, decoder rules) is the same, and probed again otherwise or when the file is damaged. Failures
are not kept: a video that is repaired or copied late is found by the next run. What is asked for together is
also packed into one file, so that the next start asks the file system for stamps alone.
"""

import hashlib
import json
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from mmkd.cache_tools.frames import FrameSource
from mmkd.cache_tools.pool import run_tasks
from mmkd.cache_tools.records import Float64Array, VideoFacts
from mmkd.data_manifests.errors import StorageError, VideoError

SCHEMA = "mmkd-facts-2"
BATCH = 256
"""Videos that a thread looks up in a row."""
LOOKUP_THREADS = 16
"""Look-ups wait for file systems, not processors."""
PACKED = struct.Struct("<II")
"""Bytes of the name and of the kept file in a record of a pack, before these two."""
PROBE_SECONDS = 120.0
"""Time limit for one probe where the source states none."""


def probe_all(
    source: FrameSource,
    videos: Sequence[str],
    *,
    store: Path | None,
    workers: int,
    progress: Callable[[int], None] | None = None,
) -> dict[str, VideoFacts | VideoError]:
    """Return the facts of each video, or why it cannot be used, in the order of `videos` without repeats.

    `store` keeps facts between runs; None keeps nothing. `progress(count)` hears of videos as they are done.
    """
    found: dict[str, VideoFacts | VideoError | None] = dict.fromkeys(videos)
    advance = progress or (lambda count: None)
    if store is not None:
        for video, facts in _kept(source, list(found), store):
            found[video] = facts
            if facts is not None:
                advance(1)
    missing = [video for video, facts in found.items() if facts is None]
    probe = partial(probe_and_keep, source, store)
    limits = getattr(source, "limits", None)
    timeout_seconds = PROBE_SECONDS if limits is None else limits.clip_timeout_seconds
    probed = run_tasks(probe, missing, workers=min(workers, len(missing)), timeout_seconds=timeout_seconds)
    for position, result in probed:
        if isinstance(result, StorageError):
            raise result
        found[missing[position]] = result
        advance(1)
    if store is not None:
        pack = pack_path(store, found)
        known = [video for video, facts in found.items() if isinstance(facts, VideoFacts)]
        if known and (not pack.exists() or not set(missing).isdisjoint(known)):
            with suppress(StorageError):  # it only saves time, and what is kept may be read-only
                _write(pack, _packed(store, known))
    return {video: facts for video, facts in found.items() if facts is not None}


def probe_and_keep(source: FrameSource, store: Path | None, video: str) -> VideoFacts:
    """Probe one video and keep its facts; VideoError if it cannot be used."""
    stamp = source.stamp(video)  # before the probe: a change while it runs makes the kept facts stale
    facts = source.probe(video)
    if store is not None:
        _write(facts_path(store, video), [encode_facts(facts, video=video, stamp=stamp)])
    return facts


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
    source: FrameSource, videos: Sequence[str], store: Path
) -> Iterator[tuple[str, VideoFacts | VideoError | None]]:
    """Yield each video with its kept facts, its VideoError when it is missing, or None to be probed.

    Equal frame times are one array: most videos of a data set have one rate and a usual length.
    """
    if not store.is_dir():
        return
    times: dict[bytes, Float64Array] = {}
    packed = read_pack(pack_path(store, videos))
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
    source: FrameSource, store: Path, packed: dict[str, memoryview], videos: Sequence[str]
) -> list[VideoFacts | VideoError | None]:
    return [_look_up_one(source, store, packed.get(video), video) for video in videos]


def _look_up_one(
    source: FrameSource, store: Path, packed: memoryview | None, video: str
) -> VideoFacts | VideoError | None:
    try:
        stamp = source.stamp(video)
    except VideoError as error:
        return error if packed is not None or facts_path(store, video).exists() else None
    facts = None if packed is None else decode_facts(bytes(packed), video=video, stamp=stamp)
    if facts is None:  # not packed, or changed since
        with suppress(OSError):
            facts = decode_facts(facts_path(store, video).read_bytes(), video=video, stamp=stamp)
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
        data = memoryview(path.read_bytes())  # not mapped: on a shared disk another task may replace it meanwhile
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
            data = facts_path(store, video).read_bytes()
            yield PACKED.pack(len(name), len(data)) + name + data


def _write(path: Path, parts: Iterable[bytes]) -> None:
    """Replace the file in one step. Not synced: a torn file fails its hash, and is only probed again."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.writelines(parts)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StorageError(f"cannot keep video facts in {path.parent}: {error.strerror}") from error
