"""A data set and a teacher that cost seconds: few clips, small views, experts that were never trained.

What is tested with it is the cache, to which all logits are alike.
"""

import hashlib
from pathlib import Path

import torch
import yaml

from mmkd.cache_tools.frames.clip_set import ClipSet
from mmkd.cache_tools.recipes.recipe import load_recipe
from mmkd.data_manifests.demo.plan import DemoOptions
from mmkd.data_manifests.demo.write import write_demo
from mmkd.data_manifests.manifest_file import save_manifest
from mmkd.data_manifests.published.something import read_something_something
from mmkd.pipeline.experts.expert import ExpertCard, make_network, save_expert
from mmkd.pipeline.experts.teach import expert_identity
from mmkd.pipeline.recipe import TeacherRecipe
from mmkd.student.training.checkpoint import encode_network

SPLITS = ("train", "standard")
EXPERTS = ("rgb", "boxes", "other")
"""Directories of experts; `other` calls itself rgb and has other weights."""
RECIPE = {
    "views": {"frames": 4, "size_px": 32, "evaluation_crops": 1},
    "held_out": {"fraction": 0.3},
    "boxes": {"max_boxes": 4},
    "experts": {
        "rgb": {"modality": "rgb", "train": {"network": "small3d"}},
        "boxes": {
            "modality": "boxes",
            "layout": {"hidden": 16, "attention_heads": 2, "spatial_layers": 1, "temporal_layers": 1},
        },
    },
    "build": {"views": 2, "shard_views": 2, "shard_rows": 6, "batch_views": 8},
}


def make(root: Path) -> None:
    """Write videos, manifest, recipe and experts below `root`."""
    torch.set_num_threads(1)
    write_demo(
        root, DemoOptions(train_clips=14, standard_clips=14, compositional_clips=14, min_frames=8, max_frames=10)
    )
    manifest = read_something_something(
        {name: root / f"{name}.json" for name in SPLITS}, root / "labels.json", dataset="quick"
    )
    save_manifest(manifest, root / "manifest.jsonl")
    (root / "teacher.yaml").write_text(yaml.safe_dump(RECIPE))
    named = {
        "data.manifest": str(root / "manifest.jsonl"),
        "data.videos": str(root / "videos"),
        "data.workers": 0,
        "boxes.files": [str(root / "bounding_boxes.json")],
    }
    recipe = load_recipe(TeacherRecipe, files=[root / "teacher.yaml"], named=named)
    clip_set = ClipSet(recipe.data)
    for directory in EXPERTS:
        name = "rgb" if directory == "other" else directory
        torch.manual_seed(0)
        heads = {head.name: len(head.classes) for head in clip_set.manifest.heads}
        network = make_network(recipe.experts[name], heads)
        for parameter in network.parameters() if directory == "other" else ():
            parameter.data *= 1.25
        state = encode_network(network)
        card = ExpertCard(
            name=name,
            weights_sha256=hashlib.sha256(state).hexdigest(),
            training={},
            **expert_identity(recipe, recipe.experts[name], clip_set),
        )
        save_expert(root / "experts" / directory, card, state)
