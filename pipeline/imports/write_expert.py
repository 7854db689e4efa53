"""Writing an imported expert: whole or not at all, and over nothing that is somebody's."""

import hashlib
from pathlib import Path
from typing import Any

from torch import nn

from mmkd.cache_tools.tasks.folder_lock import folder_lock
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.leaks import TrainedOn
from mmkd.pipeline.experts.expert import CARD_FILE, WEIGHTS_FILE, ExpertCard, has_weights, save_expert
from mmkd.pipeline.experts.teach import TRAINING, same_expert
from mmkd.pipeline.experts.trained_on import write_trained_on
from mmkd.student.evaluation.run_files import RUN_FILE
from mmkd.student.training.checkpoint import encode_network

IMPORTED = "imported"
"""The member of a card's `training` that says where an expert's weights are from."""


def card_fields(name: str, seen: dict[str, Any], imported: dict[str, Any]) -> dict[str, Any]:
    """Return what an expert's card says but for the hash of its weights."""
    return {"name": name, "training": {IMPORTED: imported}, **seen}


def write_once(out: Path, network: nn.Module, fields: dict[str, Any], trained: TrainedOn | None) -> bool:
    """Write the expert unless it is there; InputError when the folder holds anything else.

    Which clips it was trained on is written in any case, where that is known.
    """
    refuse_others(out)
    there = False
    if (out / CARD_FILE).exists():
        card = same_expert(out, fields["name"], {key: fields[key] for key in fields if key != "training"})
        if card.training != fields["training"]:
            raise InputError(
                f"{out} holds an expert of another source; import into another folder, or delete this one"
            )
        there = has_weights(out, card)
    state = encode_network(network)
    with folder_lock(out) as lock:
        lock.check()
        if trained is not None:
            write_trained_on(out, trained)
        if not there:
            save_expert(out, ExpertCard(weights_sha256=hashlib.sha256(state).hexdigest(), **fields), state)
    return not there


def refuse_others(out: Path) -> None:
    """Raise InputError for a folder in which a run, unfinished training or weights without a card lie."""
    for folder in (out, out / TRAINING):
        if (folder / RUN_FILE).exists():
            raise InputError(f"{folder} holds a run of `mmkd-student train`; name another folder with -o")
    if (out / TRAINING).exists():
        raise InputError(f"{out} holds training of `mmkd-cache teach`; name another folder with -o")
    if (out / WEIGHTS_FILE).exists() and not (out / CARD_FILE).exists():
        raise InputError(f"{out} holds {WEIGHTS_FILE} without {CARD_FILE}; name another folder with -o")
