"""Which training clips are left out of a run, so that they tell which of its epochs is the best."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mmkd.cache_tools.views.keyed_words import KeyedWords
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.manifest import Clip
from mmkd.student.recipes.train import TrainRecipe


def held_out_mask(clips: Sequence[Clip], recipe: TrainRecipe, dataset: str) -> npt.NDArray[np.bool_]:
    """Return (rows,) which clips of the training split a run holds out: whole videos, and of each class its share.

    Videos are put in order by their most frequent labels, those of a class by a keyed hash, and every
    1/`held_out`-th of them is taken (systematic sampling, with a random start). So of a class whose videos have one
    clip each its share is held out, rounded up or down; where a video has many clips of several classes, the shares
    of clips and classes hold on average alone. Videos without any label are never held out, as they could not tell.
    It depends on ids, videos and labels, and not on the order of the clips.
    Raises InputError where no clip is held out, or all are.
    """
    if not recipe.held_out:
        return np.zeros(len(clips), np.bool_)
    videos = sorted(_labelled_videos(clips).items(), key=lambda item: (item[1], _draw(recipe, dataset, item[0])))
    bounds = np.floor(np.arange(len(videos) + 1) * recipe.held_out + _draw(recipe, dataset)).astype(np.int64)
    chosen = {video for (video, _), taken in zip(videos, np.diff(bounds), strict=True) if taken}
    mask = np.array([clip.video in chosen for clip in clips], np.bool_)
    if not mask.any() or mask.all():
        raise InputError(
            f"train.held_out={recipe.held_out:g} holds {'all' if mask.all() and len(mask) else 'none'} of "
            f"{counted(len(clips), 'training clip')} out, which are of {counted(len(videos), 'labelled video')}: "
            "set another share or train.held_out_seed"
        )
    return mask


def _draw(recipe: TrainRecipe, dataset: str, *video: str) -> float:
    return KeyedWords("best-epoch", dataset, recipe.held_out_seed, *video).unit()


def _labelled_videos(clips: Sequence[Clip]) -> dict[str, tuple[int, ...]]:
    """Return each video that has a labelled clip, with the labels (a number for each head) of most of its clips."""
    found: dict[str, dict[tuple[int, ...], int]] = {}
    for clip in clips:
        labels = tuple(-1 if label is None else label for label in clip.labels.values())
        if max(labels) >= 0:
            counts = found.setdefault(clip.video, {})
            counts[labels] = counts.get(labels, 0) + 1
    return {video: min(counts, key=lambda key: (-counts[key], key)) for video, counts in found.items()}
