"""What lies in a run's directory beside its checkpoints: run.json, model.safetensors and evaluations, all sealed.

run.json says all that the student needs to see a video and to name what it sees;
`mmkd.student.evaluation.trained` reads it. It is written before the first step, and once more at the end with the
hash of the finished model.
"""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mmkd.cache_tools.cache.sealed import open_versions, seal
from mmkd.data_manifests.atomic import storage_errors, write_atomically
from mmkd.data_manifests.errors import InputError, VerificationError
from mmkd.data_manifests.kinds import it_is
from mmkd.data_manifests.regular_file import read_regular
from mmkd.student.teacher.mixing import HeadMixtures, Mixture

log = logging.getLogger("mmkd")

SCHEMA = "mmkd-run-2"
"""The form before it had neither schema nor seal, and did not say what the student sees."""
RUN_FILE = "run.json"
MODEL_FILE = "model.safetensors"
EVALUATION_FILE = "evaluation.json"
MODEL_AGAIN = "run the same `mmkd-student train` again, which writes it from the checkpoint"
REPAIR = "delete it and run the same `mmkd-student train` again, which writes it again"


@dataclass(frozen=True)
class StudentInput:
    """What a student sees of a video, from the frames to the network's input."""

    views: dict[str, Any]
    """The resolved `ViewPolicy`: frames T, size S in pixels, sampling, stride, scale, evaluation views."""
    view_rules: str
    """Version of the rules by which views are drawn."""
    canonical: str
    """How the crop of a frame becomes S x S pixels, in words."""
    decoder: str
    """Version of the rules by which frames are decoded."""
    mean: list[float]
    """Per channel (red, green, blue), subtracted from values scaled to 0..1."""
    std: list[float]
    """Per channel; what remains is divided by it."""


@dataclass(frozen=True)
class RunRecord:
    """What run.json says."""

    recipe: dict[str, Any]
    """The resolved `StudentRecipe`, the network's name among it."""
    cache: str
    """Fingerprint of the cache that the run learned from; without one, of its manifest and views."""
    heads: dict[str, list[str]]
    """Head -> ordered class list."""
    labels_only: bool
    """The baseline: no teacher."""
    fresh_views: bool
    """Baseline only: a new view every epoch."""
    weights: dict[str, Any] | None
    """Head -> the teacher's mixture; None for a baseline."""
    versions: dict[str, str]
    """Library -> version, when the run began."""
    input: StudentInput | None = None
    """What the student sees; None in a run of an earlier version."""
    model_sha256: str | None = None
    """Hash of model.safetensors; None while the run is not finished, and in one of an earlier version."""
    schema: str = SCHEMA
    """Version of this form."""
    dataset: str | None = None
    """Name of the data set; None in a run of an earlier version."""


_RECORDS = TypeAdapter(RunRecord)


def write_run(directory: Path, record: RunRecord) -> None:
    """Write run.json with its seal; StorageError when the disk refuses."""
    fields = {"schema": record.schema, **asdict(record)}  # first: what_is looks at the beginning alone
    write_atomically(directory / RUN_FILE, (json.dumps(seal(fields), indent=1) + "\n").encode())


def read_run(directory: Path) -> RunRecord:
    """Read run.json, with a warning where it has no seal yet.

    Raises InputError where there is no run, VerificationError where run.json is not what was written.
    """
    path = directory / RUN_FILE
    with storage_errors(path, verb="read"):
        try:
            data = read_regular(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            told = it_is(directory) or f": {RUN_FILE}: {error.strerror}"
            raise InputError(f"{directory} is not a run of `mmkd-student train`{told}") from error
    value = open_versions(data, str(path), schema=SCHEMA, before=None, advice=REPAIR)
    try:
        value["recipe"].get("loss", {}).pop("without_target", None)  # an earlier setting, always overwritten
        return _RECORDS.validate_json(json.dumps({**value, "schema": SCHEMA}), strict=True, extra="forbid")
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        reason = f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
    except (KeyError, AttributeError, TypeError) as error:
        reason = repr(error)
    raise VerificationError(f"{path} is damaged ({reason}); {REPAIR}")


def run_mixtures(directory: Path) -> HeadMixtures | None:
    """Return the teacher that a run learned from, None for a baseline; VerificationError where it does not say."""
    weights = read_run(directory).weights
    try:
        return None if weights is None else {head: Mixture.from_json(value) for head, value in weights.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VerificationError(f"{directory / RUN_FILE} is damaged ({error!r}); {REPAIR}") from error


def write_model(directory: Path, record: RunRecord, state: bytes) -> None:
    """Write the finished model, then the record with its hash, which makes the run finished."""
    write_atomically(directory / MODEL_FILE, state)
    write_run(directory, replace(record, model_sha256=hashlib.sha256(state).hexdigest()))


def read_model(directory: Path, record: RunRecord) -> bytes:
    """Return the bytes of a finished run's model, with a warning where no hash is known.

    Raises InputError when the run is not finished, VerificationError when the file is not what was written.
    """
    path = directory / MODEL_FILE
    with storage_errors(path, verb="read"):
        try:
            data = read_regular(path)
        except FileNotFoundError:
            raise InputError(
                f"{path} is missing: the run is not finished; run `mmkd-student train` again"
            ) from None
    if record.model_sha256 is None:
        log.warning("%s has no seal, by which a later change to it would be noticed; %s", path, MODEL_AGAIN)
    elif hashlib.sha256(data).hexdigest() != record.model_sha256:
        raise VerificationError(f"{path} is damaged: it is not the file that {RUN_FILE} describes; {MODEL_AGAIN}")
    return data


def evaluation_path(directory: Path, cache: str, *, own: bool) -> Path:
    """Return where the evaluation with a cache (a fingerprint) lies: that with the run's own one has no suffix."""
    return directory / (EVALUATION_FILE if own else f"evaluation-{cache.rpartition(':')[2][:12]}.json")
