"""The command `mmkd-cache demo`: the demo data set."""

from pathlib import Path

import click

from mmkd.cache_tools.process.command import FOLDER
from mmkd.cache_tools.process.help_text import WholeHelp, example
from mmkd.cache_tools.process.progress import Progress
from mmkd.data_manifests.counted import counted


@click.command(cls=WholeHelp, epilog=example("mmkd-cache demo demo-data --train-clips 100"))
@click.argument("directory", type=FOLDER)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Another seed, other videos.")
@click.option("--train-clips", type=click.IntRange(1), help="Training clips.")
@click.option("--standard-clips", type=click.IntRange(1), help="Test clips with training's verb-object pairs.")
@click.option("--compositional-clips", type=click.IntRange(1), help="Test clips with the pairs swapped.")
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Encoding processes.")
def demo(directory: Path, workers: int, **options: int | None) -> None:
    """Write the demo data set and its recipes into DIRECTORY: WebM videos, labels, splits and boxes."""
    from mmkd.data_manifests.demo.plan import DemoOptions
    from mmkd.data_manifests.demo.write import write_demo, write_recipes

    chosen = DemoOptions(**{name: value for name, value in options.items() if value is not None})
    total = sum(chosen.clips_per_split().values())
    with Progress("writing the demo data set", total=total, unit="clip") as progress:
        write_demo(
            directory,
            chosen,
            workers=workers,
            progress=lambda done, _: progress.advance(done - progress.done),
        )
    write_recipes(directory)
    click.echo(f"{directory}: {counted(total, 'clip')} in {counted(len(chosen.clips_per_split()), 'split')}")
