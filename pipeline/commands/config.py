"""The commands `mmkd-cache config …`: recipes to start from, and the one that a command would use."""

import json
from pathlib import Path
from typing import Any

import click

from mmkd.cache_tools.process.command import data_options, example_argument, example_recipe, recipe_options
from mmkd.cache_tools.process.help_text import WholeHelpGroup, example
from mmkd.cache_tools.recipes.recipe import resolved_with_origins
from mmkd.pipeline.commands.options import boxes_option, flow_options, named_options
from mmkd.pipeline.recipe import TeacherRecipe


@click.group(cls=WholeHelpGroup, epilog=example("mmkd-cache config example demo > teacher.yaml"))
def config() -> None:
    """Show recipes: an example, the resolved one with each value's origin, or the schema."""


@config.command(
    "show",
    epilog=example("mmkd-cache config show -c teacher.yaml --manifest manifest.jsonl \\\n    --videos videos"),
)
@recipe_options
@data_options
@boxes_option
@flow_options
def config_show(files: tuple[Path, ...], overrides: tuple[str, ...], **options: Any) -> None:
    """Print every value of the resolved recipe and where it comes from."""
    _, values = resolved_with_origins(TeacherRecipe, files=files, overrides=overrides, named=named_options(options))
    for value in values:
        click.echo(f"{value.path}: {json.dumps(value.value)}  # {value.origin}")


@config.command("example", epilog=example("mmkd-cache config example something-something > teacher.yaml"))
@example_argument
def config_example(data_set: str) -> None:
    """Print a commented recipe to start from: the demo's, or the authors' for a data set."""
    click.echo(example_recipe(data_set, "teacher"), nl=False)


@config.command("schema", epilog=example("mmkd-cache config schema > schema.json"))
def config_schema() -> None:
    """Print the JSON schema of the recipe."""
    click.echo(json.dumps(TeacherRecipe.model_json_schema(), indent=1))
