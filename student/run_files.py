"""What lies in a run's directory beside its checkpoints: run.json, written before the first step."""

import json
from pathlib import Path

from mmkd.cache_tools.mixing import HeadMixtures, Mixture
from mmkd.data_manifests.errors import InputError

RUN_FILE = "run.json"


def run_mixtures(directory: Path) -> HeadMixtures | None:
    """Return the teacher that a run learned from, None for a baseline; InputError where run.json does not say."""
    path = directory / RUN_FILE
    try:
        weights = json.loads(path.read_bytes())["weights"]
        return None if weights is None else {head: Mixture.from_json(value) for head, value in weights.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is missing or damaged ({error!r}): {directory} is no run") from error
