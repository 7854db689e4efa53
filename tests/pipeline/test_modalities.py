"""The one table of modalities: complete, and what an entry says of its inputs is so."""

from typing import get_args

from mmkd.cache_tools.views.drawing import ViewPolicy
from mmkd.pipeline.inputs.modalities import MODALITIES, InputShapes, needs_boxes, needs_flow
from mmkd.pipeline.recipe import ModalityName


def test_every_modality_of_the_recipe_has_its_entry():
    assert tuple(MODALITIES) == get_args(ModalityName)
    shapes = InputShapes(ViewPolicy(frames=4, size_px=32), max_boxes=5)
    assert [list(modality.empty(shapes)) for modality in MODALITIES.values()] == [
        ["rgb"],
        ["flow"],
        ["boxes", "categories", "scores", "sides", "states"],
        ["audio"],
    ]


def test_what_is_read_is_what_some_expert_needs():
    assert [needs_flow([name]) for name in MODALITIES] == [False, True, False, False]
    assert [needs_boxes([name]) for name in MODALITIES] == [False, False, True, False]
    assert needs_flow(["boxes", "flow"])
    assert not needs_boxes([])
