"""The table of key maps, how a file's is recognised, and a checkpoint through it."""

import re
from pathlib import Path

from torch import Tensor

from mmkd.data_manifests.errors import InputError
from mmkd.student.checkpoints.names import bare_state
from mmkd.student.key_maps.authors_stlt import AUTHORS_STLT
from mmkd.student.key_maps.epic_tsm import EPIC_TSM
from mmkd.student.key_maps.key_map import Classifier, KeyMap, MappedWeights
from mmkd.student.key_maps.same_names import SAME_NAMES
from mmkd.student.key_maps.slowfast import SLOWFAST
from mmkd.student.key_maps.slowfast_mvit import SLOWFAST_MVIT
from mmkd.student.key_maps.video_swin import VIDEO_SWIN
from mmkd.student.key_maps.videomae import VIDEOMAE

MAPS = (VIDEO_SWIN, AUTHORS_STLT, SLOWFAST_MVIT, SLOWFAST, EPIC_TSM, VIDEOMAE, SAME_NAMES)
KEY_MAPS: dict[str, KeyMap] = {key_map.name: key_map for key_map in MAPS}
"""Name -> map; the first whose marks a file has is its own, and the last has none."""
AUTO = "auto"
UNNAMED = "head"
"""A classifier's head where a file has one only, without a name."""


def recognise(names: set[str]) -> KeyMap:
    """Return the map of a file with these bare names."""
    return next(key_map for key_map in KEY_MAPS.values() if key_map.fits(names))


def map_weights(state: dict[str, Tensor], path: Path, name: str = AUTO) -> MappedWeights:
    """Return a file's parameters by our names, through the map of that name or, by `auto`, the file's own.

    Raises InputError, naming the file, for a map that there is not, one that is not the file's, a file of two
    networks, and a classifier without its weight.
    """
    if name not in (AUTO, *KEY_MAPS):
        raise InputError(f"there is no key map {name!r}; choose among {', '.join((AUTO, *KEY_MAPS))}")
    found = bare_state(state, path)
    key_map = recognise(set(found)) if name == AUTO else KEY_MAPS[name]
    if not key_map.fits(set(found)):
        raise InputError(
            f"the weights {path} do not have the names of {key_map.source}: the key map is not {name!r} but "
            f"{recognise(set(found)).name!r}"
        )
    parts: dict[str, dict[str, str]] = {}
    backbone: dict[str, str] = {}
    for own, in_file in found.items():
        match = re.fullmatch(key_map.classifier, own)
        if match is None:
            backbone[key_map.rename(own)] = in_file
        else:
            parts.setdefault(match.groupdict().get("head") or UNNAMED, {})[match["part"]] = in_file
    if len(backbone) + sum(map(len, parts.values())) != len(found):
        raise InputError(f"the weights {path} hold two networks: two of their names become one; keep one of them")
    values = key_map.convert({own: state[in_file] for own, in_file in backbone.items()})
    classifiers = {head: classifier_of(state, part, path) for head, part in parts.items()}
    of_heads = {f"{head}.{part}": in_file for head, own in parts.items() for part, in_file in own.items()}
    return MappedWeights(key_map, values, split_rows(classifiers, key_map), backbone | of_heads)


def classifier_of(state: dict[str, Tensor], parts: dict[str, str], path: Path) -> Classifier:
    """Return a classifier from the names of its weight and bias."""
    weight = state[parts["weight"]] if "weight" in parts else None
    bias = state[parts["bias"]] if "bias" in parts else None
    if weight is not None and weight.ndim > 2 and weight[0, 0].numel() == 1:
        weight = weight.flatten(1)  # a convolution of one pixel is a linear layer
    if weight is None or weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        raise InputError(f"the weights {path} have no whole classifier: {', '.join(sorted(parts.values()))}")
    return Classifier(weight, bias)


def split_rows(classifiers: dict[str, Classifier], key_map: KeyMap) -> dict[str, Classifier]:
    """Return the classifiers, one that is several in one being cut as the map says."""
    split: dict[str, Classifier] = {}
    for head, classifier in classifiers.items():
        rows = key_map.rows.get(len(classifier.weight), {head: len(classifier.weight)})
        first = 0
        for name, count in rows.items():
            bias = None if classifier.bias is None else classifier.bias[first : first + count]
            split[name] = Classifier(classifier.weight[first : first + count], bias)
            first += count
    return split
