"""What lies in a run's directory beside its checkpoints: run.json, written first, and evaluations."""

import json
from pathlib import Path
from typing import Any

from mmkd.cache_tools.mixing import HeadMixtures, Mixture
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.kinds import it_is

RUN_FILE = "run.json"
EVALUATION_FILE = "evaluation.json"


def read_run(directory: Path) -> dict[str, Any]:
    """Return run.json: the recipe, the cache's fingerprint, classes and weights; InputError where it is none."""
    path = directory / RUN_FILE
    try:
        run: dict[str, Any] = json.loads(path.read_bytes())
        run["recipe"].items(), run["cache"], run["heads"], run["weights"]
    except OSError as error:
        told = it_is(directory) or f": {path.name}: {error.strerror}"
        raise InputError(f"{directory} is not a run of `mmkd-student train`{told}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error!r}); train the run again") from error
    return run


def run_mixtures(directory: Path) -> HeadMixtures | None:
    """Return the teacher that a run learned from, None for a baseline; InputError where run.json does not say."""
    weights = read_run(directory)["weights"]
    try:
        return None if weights is None else {head: Mixture.from_json(value) for head, value in weights.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{directory / RUN_FILE} is damaged ({error!r}); train the run again") from error


def evaluation_path(directory: Path, cache: str, *, own: bool) -> Path:
    """Return where the evaluation with a cache (a fingerprint) lies: that with the run's own one has no suffix."""
    return directory / (EVALUATION_FILE if own else f"evaluation-{cache[:12]}.json")
