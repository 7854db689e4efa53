"""The file of `mmkd-cache weigh`: mixtures of several schemes, and the experts that they were fitted on.

The file carries each expert's fingerprint (its node's, over the base), so that weights are never used with other
experts than their own; a cache may meanwhile hold more experts, or more views.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmkd.cache_tools.cache.fingerprints import differences, fingerprint
from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.cache.sealed import open_versions, seal
from mmkd.cache_tools.process.command import without_nan
from mmkd.data_manifests.errors import FingerprintError, InputError
from mmkd.data_manifests.json_file import read_json
from mmkd.data_manifests.kinds import it_is
from mmkd.data_manifests.regular_file import read_regular
from mmkd.student.teacher.mixing import HeadMixtures, Mixture

SCHEMA = "mmkd-weights-2"
UNSEALED_SCHEMA = "mmkd-weights-1"
DEFAULT_SCHEME = "calibrated"
AGAIN = "run `mmkd-cache weigh` on this cache"


@dataclass(frozen=True)
class MixtureFile:
    """What a weights file says."""

    base: str
    """Fingerprint of the cache's base: clips, classes, views, decoding."""
    experts: Mapping[str, Mapping[str, Any]]
    """Expert -> the fields of its fingerprint."""
    schemes: Mapping[str, HeadMixtures]
    """Scheme -> head -> mixture."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """What they were fitted on and how good they were: for people."""

    def to_json(self) -> dict[str, Any]:
        """Return the file's content."""
        schemes = {
            scheme: {head: mixture.to_json() for head, mixture in heads.items()}
            for scheme, heads in self.schemes.items()
        }
        teacher = {"base": self.base, "experts": {name: dict(fields) for name, fields in self.experts.items()}}
        return {"schema": SCHEMA, "teacher": teacher, "schemes": schemes, "notes": dict(self.notes)}

    def to_bytes(self) -> bytes:
        """Return the file's bytes, with their seal."""
        return (json.dumps(seal(self.to_json()), indent=1) + "\n").encode()


def mixture_file_for(
    reader: CacheReader, schemes: Mapping[str, HeadMixtures], notes: Mapping[str, Any]
) -> MixtureFile:
    """Return a weights file for the experts of a cache."""
    notes = without_nan(notes)  # an error without a bound is infinite, which JSON does not have
    return MixtureFile(fingerprint(reader.init.base), dict(reader.init.experts), schemes, notes)


def load_mixtures(path: Path) -> MixtureFile:
    """Read a weights file, with a warning where it has no seal yet.

    Raises InputError, naming it, when it is not one, VerificationError when it is not what was written.
    """
    try:
        is_one = str(read_json(path).get("schema")).startswith("mmkd-weights-")
    except AttributeError:
        is_one = False
    if not is_one:
        raise InputError(
            f"{path} is not a weights file{it_is(path)}; make one with `mmkd-cache weigh CACHE -o FILE`"
        )
    value = open_versions(read_regular(path), str(path), schema=SCHEMA, before=UNSEALED_SCHEMA, advice=AGAIN)
    try:
        schemes = {
            scheme: {head: Mixture.from_json(mixture) for head, mixture in heads.items()}
            for scheme, heads in value["schemes"].items()
        }
        teacher = value["teacher"]
        experts = {name: dict(fields) for name, fields in teacher["experts"].items()}
        return MixtureFile(str(teacher["base"]), experts, schemes, dict(value.get("notes", {})))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error}); {AGAIN}") from error


def split_spec(spec: str) -> tuple[Path, str] | None:
    """Return (file, scheme) of `FILE.json` or `FILE.json:scheme`, or None for anything else."""
    if spec.endswith(".json"):
        return Path(spec), DEFAULT_SCHEME
    path, found, scheme = spec.rpartition(".json:")
    return (Path(path + ".json"), scheme) if found else None


def mixtures_from_file(reader: CacheReader, path: Path, scheme: str) -> HeadMixtures:
    """Return a scheme's mixtures for a cache.

    Raises InputError for an unknown scheme, FingerprintError when the file's weights belong to other experts.
    """
    file = load_mixtures(path)
    if scheme not in file.schemes:
        raise InputError(f"{path} has no scheme {scheme!r}; it has: {', '.join(file.schemes)}")
    mixtures = file.schemes[scheme]
    heads = [head.name for head in reader.heads]
    if set(mixtures) != set(heads):
        raise InputError(f"{path} has weights for {', '.join(mixtures)}, the cache's heads are {', '.join(heads)}")
    for expert in dict.fromkeys(name for mixture in mixtures.values() for name in mixture.weights):
        check_expert(reader, file, expert, path=path)
    return {head: mixtures[head] for head in heads}


def check_expert(reader: CacheReader, file: MixtureFile, expert: str, *, path: Path) -> None:
    """Raise FingerprintError unless the cache holds the expert that the weights were fitted on."""
    if expert not in reader.experts:
        raise FingerprintError(f"{path} weighs the expert {expert!r}, which the cache does not hold; {AGAIN}")
    if expert not in file.experts:
        raise InputError(f"{path} weighs {expert!r} without saying which expert that is; {AGAIN}")
    if file.base != fingerprint(reader.init.base):
        raise FingerprintError(
            f"{path} was fitted on a cache of other clips, classes, views or decoding than this one; {AGAIN}"
        )
    changed = [line.split(":")[0] for line in differences(file.experts[expert], reader.init.experts[expert])]
    if changed:
        raise FingerprintError(
            f"{path} was fitted on another expert {expert!r} than the cache's (differing: {', '.join(changed)}); "
            f"{AGAIN}"
        )
