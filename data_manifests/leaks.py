"""Leaks: clips of an evaluation that a network was trained on, found by their ids.

Data sets share clips under one id: Something-Else mixes the train and validation videos of Something-Something V2,
so that a network trained on V2's train split has seen most of Something-Else's evaluation. Ids are compared without
regard to case, as everywhere, and kept as hashes of 64 bits: a million of them take 8 MB, and two that are
different are taken for the same once in some millions of such files.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.json_file import read_json
from mmkd.data_manifests.kinds import MANIFEST, SPLIT_FILE, what_is
from mmkd.data_manifests.manifest import Manifest
from mmkd.data_manifests.manifest_file import load_manifest
from mmkd.data_manifests.system_errors import cannot_read

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class TrainedOn:
    """What a network was trained on."""

    name: str
    """Data set and split, or file, for people."""
    hashes: Hashes
    """(clips,) of the clips' ids, ascending."""


def trained_on(name: str, clip_ids: Iterable[str]) -> TrainedOn:
    """Return the record of training on these clips."""
    found = {hashlib.blake2b(clip_id.casefold().encode(), digest_size=8).digest() for clip_id in clip_ids}
    return TrainedOn(name, np.sort(np.frombuffer(b"".join(found), "<u8")).astype(np.uint64))


def leaked(trained: TrainedOn, clip_ids: Iterable[str]) -> int:
    """Return how many of the clips the network was trained on."""
    return int(np.isin(trained_on("", clip_ids).hashes, trained.hashes, assume_unique=True).sum())


def leak_lines(expert: str, trained: TrainedOn, manifest: Manifest, splits: Sequence[str]) -> list[str]:
    """Return a warning for each evaluation split of which an expert has seen clips."""
    lines = []
    for split in splits:
        clips = manifest.split(split)
        if count := leaked(trained, (clip.clip_id for clip in clips)):
            lines.append(
                f"LEAK: expert {expert!r} was trained on {count} of {counted(len(clips), 'clip')} of split "
                f"{split!r} ({trained.name}): what it scores there means nothing, nor does a student that learns "
                "from it. Train it on this manifest's own training split"
            )
    return lines


def read_trained_on(path: Path) -> TrainedOn:
    """Read which clips a network was trained on, by somebody else.

    From a manifest (its split `train`, or its only one), a split file of Something-Something, or a text file with
    an id in each line.
    """
    kind = what_is(path)
    if kind == MANIFEST:
        manifest = load_manifest(path)
        split = manifest.splits[0] if len(manifest.splits) == 1 else "train"
        return trained_on(f"{manifest.dataset}, split {split}", (clip.clip_id for clip in manifest.split(split)))
    if kind == SPLIT_FILE:
        elements = read_json(path)
        ids = [str(element["id"]) for element in elements if isinstance(element, dict) and "id" in element]
        if len(ids) < len(elements):
            raise InputError(f"{path}: an element has no id")
        return trained_on(path.name, ids)
    try:
        ids = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise cannot_read(path, error) from error
    if not ids:
        raise InputError(f"{path} names no clip: give a manifest, a split file, or an id in each line")
    return trained_on(path.name, ids)


def encode(trained: TrainedOn) -> dict[str, object]:
    """Return a record as JSON."""
    return {"name": trained.name, "hashes": [f"{value:016x}" for value in trained.hashes.tolist()]}


def decode(value: object) -> TrainedOn:
    """Return the record of `encode`; ValueError for anything else."""
    found = value if isinstance(value, dict) else {}
    name, hashes = found.get("name"), found.get("hashes")
    if not isinstance(name, str) or not isinstance(hashes, list) or not all(isinstance(h, str) for h in hashes):
        raise ValueError("it is no record of clips")
    return TrainedOn(name, np.array([int(text, 16) for text in hashes], np.uint64))
