"""The command `mmkd-cache`: its commands, whose bodies are in mmkd.pipeline.commands; importing this is quick."""

import click

from mmkd.cache_tools.process.command import run_command
from mmkd.cache_tools.process.help_text import WholeHelpGroup, example
from mmkd.pipeline.commands import (
    boxes,
    build,
    cache,
    config,
    demo,
    detect,
    flow,
    import_expert,
    manifest,
    pack,
    submit,
    teach,
)


@click.group(
    cls=WholeHelpGroup,
    epilog=example("mmkd-cache demo demo-data", "mmkd-cache build -h"),
)
@click.version_option(package_name="mmkd")
def cli() -> None:
    """Make manifests, teach experts, and cache a multimodal teacher's logits for RGB students."""


COMMANDS: tuple[click.Command, ...] = (
    demo.demo,
    manifest.manifest,
    pack.pack,
    teach.teach,
    import_expert.import_expert,
    build.build,
    build.plan,
    build.drift,
    cache.status,
    cache.finalize,
    cache.verify,
    cache.export,
    cache.import_,
    cache.merge,
    cache.inspect,
    cache.weigh,
    submit.submit,
    flow.flow,
    boxes.boxes,
    detect.detect,
    config.config,
)

for command in COMMANDS:
    cli.add_command(command)


def main() -> None:
    """Run the command."""
    run_command(cli)
