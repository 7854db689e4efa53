"""The options of commands that train, by which something looks on: --profile and --tensorboard."""

from collections.abc import Mapping
from typing import Any

import click

from mmkd.cache_tools.process.command import FOLDER, Function
from mmkd.student.recipes.student import Looking


def watch_options(function: Function) -> Function:
    """Add the options to a command."""
    profile = click.option(
        "--profile",
        "profile_steps",
        type=click.IntRange(1, 100),
        metavar="N",
        help="Write a Chrome trace of N steps after a warm-up of 5, trace.json, and say where their time went.",
    )
    tensorboard = click.option(
        "--tensorboard", type=FOLDER, help="Write TensorBoard's event files there, while it trains."
    )
    return profile(tensorboard(function))


def looking_of(options: Mapping[str, Any]) -> Looking:
    """Return what a command's options ask for."""
    return Looking(options["profile_steps"], options["tensorboard"])
