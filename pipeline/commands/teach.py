"""The command `mmkd-cache teach`: one expert, trained on labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from mmkd.cache_tools.process.command import (
    FOLDER,
    as_json,
    data_options,
    device_option,
    print_result,
    recipe_options,
)
from mmkd.cache_tools.process.help_text import WholeHelp, example
from mmkd.cache_tools.recipes.recipe import load_recipe
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError
from mmkd.pipeline.commands.options import boxes_option, flow_options, has_experts, named_options
from mmkd.pipeline.recipe import TeacherRecipe
from mmkd.student.looking.options import looking_of, watch_options


@click.command(
    cls=WholeHelp,
    epilog=example(
        "mmkd-cache teach rgb -c teacher.yaml --manifest manifest.jsonl \\\n    --videos videos -o experts/rgb"
    ),
)
@click.argument("name")
@recipe_options
@data_options
@boxes_option
@flow_options
@click.option(
    "-o", "--out", required=True, type=FOLDER, help="Folder of the expert; unfinished training is continued."
)
@click.option("--seed", type=int, help="Seed of weights, order, views and augmentation.")
@watch_options
@device_option
@as_json
def teach(name: str, files: tuple[Path, ...], overrides: tuple[str, ...], **options: Any) -> None:
    """Train the recipe's expert NAME on labels: it sees rgb, flow or boxes, or hears audio."""
    recipe = teach_recipe((name,), files, overrides, options)
    from mmkd.pipeline.experts.teach import teach_expert
    from mmkd.student.training.devices import choose_device
    from mmkd.student.training.launcher import launched
    from mmkd.student.training.ranks import own_device

    launch = launched()
    device = choose_device(own_device(options["device"], launch))
    report = teach_expert(recipe, name, options["out"], device, looking=looking_of(options))
    if launch is not None and launch.rank > 0:
        return
    card = report.card
    lines = [f"{options['out']}: expert {name!r} " + ("trained" if report.trained else "was there already")]
    for head, found in card.training.get("held_out", {}).items():
        lines.append(f"held-out {head}: top-1 {100 * found['top1']:.1f} on {counted(found['clips'], 'clip')}")
    value = {"name": name, "trained": report.trained, "training": card.training}
    print_result(value, as_json=options["as_json"], lines=lines)


def teach_recipe(
    names: Sequence[str], files: tuple[Path, ...], overrides: tuple[str, ...], options: dict[str, Any]
) -> TeacherRecipe:
    """Return the recipe by which its experts of these names are taught, or without a name all of them."""
    named = named_options(options)
    known = load_recipe(TeacherRecipe, files=files, overrides=overrides, named=named).experts
    for name in names:  # --seed would begin a new expert, and the error be about its missing modality
        if name not in known:
            raise InputError(f"NAME: the recipe has no expert {name!r}; {has_experts(known, files)}")
    named |= {f"experts.{name}.train.seed": options["seed"] for name in names or known}
    return load_recipe(TeacherRecipe, files=files, overrides=overrides, named=named)
