"""`trained_on.json` in an expert's folder: which clips it was trained on, so that a build can warn of leaks.

It lies beside the card and not in it: it changes no logit. A folder without one is an older version's, or an
imported expert's about which nobody said anything.
"""

import json
from pathlib import Path

from mmkd.cache_tools.cache.sealed import open_seal, seal
from mmkd.data_manifests.atomic import storage_errors, write_atomically
from mmkd.data_manifests.errors import VerificationError
from mmkd.data_manifests.leaks import TrainedOn, decode, encode
from mmkd.data_manifests.regular_file import read_regular

TRAINED_ON_FILE = "trained_on.json"
SCHEMA = "mmkd-trained-on-1"


def write_trained_on(directory: Path, trained: TrainedOn) -> None:
    """Write the record into an expert's folder; StorageError when the disk refuses."""
    fields = {"schema": SCHEMA, **encode(trained)}
    write_atomically(directory / TRAINED_ON_FILE, (json.dumps(seal(fields)) + "\n").encode())


def load_trained_on(directory: Path) -> TrainedOn | None:
    """Return the record of an expert's folder, None where there is none; VerificationError for a damaged one."""
    path = directory / TRAINED_ON_FILE
    with storage_errors(path, verb="read"):
        try:
            data = read_regular(path)
        except FileNotFoundError:
            return None
    try:
        return decode(open_seal(data))
    except (ValueError, RecursionError) as error:
        raise VerificationError(
            f"{path} is damaged ({error}); delete it: without it no leak can be noticed, and nothing else changes"
        ) from error
