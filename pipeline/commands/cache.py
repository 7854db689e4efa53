"""The commands on a cache that is there: its state, its health, its copies, and weights fitted to it."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from mmkd.cache_tools.process.command import FILE, as_json, cache_location, print_result
from mmkd.cache_tools.process.help_text import WholeHelp, example
from mmkd.data_manifests.kinds import WEIGHTS, refuse_another
from mmkd.pipeline.commands.options import cache_argument, out_option


@click.command(cls=WholeHelp, epilog=example("mmkd-cache status cache"))
@cache_argument
@as_json
def status(cache: Path | str, as_json: bool) -> None:
    """Print how far the build of a CACHE is: done, running, failed, rate, time left, bytes."""
    from mmkd.cache_tools.tasks.build_status import read_build_status

    found = read_build_status(cache)
    print_result(asdict(found), as_json=as_json, lines=found.lines())


@click.command(cls=WholeHelp, epilog=example("mmkd-cache finalize cache"))
@cache_argument
def finalize(cache: Path | str) -> None:
    """Finish a CACHE whose shards are all there (a build does so by itself); refuse one with holes."""
    from mmkd.cache_tools.storage.open import open_store
    from mmkd.cache_tools.tasks.finish import finalize_cache

    finalize_cache(open_store(cache))
    click.echo(f"{cache}: finished")


@click.command(cls=WholeHelp, epilog=example("mmkd-cache verify cache --repair"))
@cache_argument
@click.option("--repair", is_flag=True, help="Remove what is damaged, so that the next build computes it again.")
@as_json
def verify(cache: Path | str, repair: bool, as_json: bool) -> None:
    """Read every byte of a CACHE against its stored checksums; exit code 4 when one is wrong."""
    from mmkd.cache_tools.upkeep.verify import verify_cache

    report = verify_cache(cache, repair=repair)
    print_result(asdict(report), as_json=as_json, lines=report.lines(cache))
    report.check(cache)


@click.command(cls=WholeHelp, epilog=example("mmkd-cache export cache cache.h5"))
@cache_argument
@click.argument("file", type=FILE)
def export(cache: Path | str, file: Path) -> None:
    """Write a finished CACHE to one plain HDF5 FILE, which needs no Zarr to be read."""
    from mmkd.cache_tools.upkeep.hdf5 import export_cache

    size_bytes = export_cache(cache, file)
    click.echo(f"{file}: {size_bytes / 2**20:.1f} MiB")


@click.command("import", cls=WholeHelp, epilog=example("mmkd-cache import cache.h5 -o cache"))
@click.argument("file", type=FILE)
@out_option("Folder (or URL) of the cache.")
@as_json
def import_(file: Path, out: Path | str, as_json: bool) -> None:
    """Make a cache again of a FILE that `export` wrote, every value checked."""
    from mmkd.cache_tools.upkeep.hdf5_import import import_cache

    report = import_cache(file, out)
    print_result(asdict(report), as_json=as_json, lines=report.lines(out))


@click.command(cls=WholeHelp, epilog=example("mmkd-cache merge part-1 part-2 --manifest manifest.jsonl -o whole"))
@click.argument("caches", type=cache_location, nargs=-1, required=True, metavar="CACHE...")
@click.option("--manifest", "manifest_file", required=True, type=FILE, help="Manifest of all their clips.")
@out_option("Folder (or URL) of the merged cache.")
@as_json
def merge(caches: tuple[Path | str, ...], manifest_file: Path, out: Path | str, as_json: bool) -> None:
    """Make one cache of several CACHEs over disjoint clips, as if it had been built over all of them.

    The caches must have been built by one recipe with the same experts. The rows of the merged one are those of the
    --manifest, with which it trains.
    """
    from mmkd.cache_tools.upkeep.merge import merge_caches
    from mmkd.data_manifests.manifest_file import load_manifest

    report = merge_caches(caches, out, load_manifest(manifest_file))
    print_result(asdict(report), as_json=as_json, lines=report.lines(out))


@click.command(cls=WholeHelp, epilog=example("mmkd-cache inspect cache"))
@cache_argument
@as_json
def inspect(cache: Path | str, as_json: bool) -> None:
    """Print what is in a CACHE: splits, views, experts, classes, unusable clips, sizes."""
    from mmkd.cache_tools.upkeep.inspect import describe_cache, describe_lines

    found = describe_cache(cache)
    print_result(found, as_json=as_json, lines=describe_lines(found))


@click.command(cls=WholeHelp, epilog=example("mmkd-cache weigh cache -o weights.json"))
@cache_argument
@click.option("-o", "--out", type=FILE, help="Write all schemes' weights, for `mmkd-student train --weights`.")
@click.option("--split", help="A labelled split to fit on [default: the held-out part of the training split].")
@click.option(
    "--weights-temperature",
    type=click.FloatRange(0, 1e6, min_open=True),
    default=1.0,
    show_default=True,
    help="Temperature of softmin and per-sample; larger is more uniform.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0, 1e6, min_open=True),
    default=1.0,
    show_default=True,
    help="Lowest T of the loss, for the bound of the storage error.",
)
@as_json
def weigh(cache: Path | str, out: Path | None, as_json: bool, **options: Any) -> None:
    """Fit the experts' weights to the logits in a CACHE, and compare the schemes: top-1, NLL, calibration."""
    from mmkd.cache_tools.cache.reader import CacheReader
    from mmkd.data_manifests.atomic import write_atomically
    from mmkd.student.teacher.mixture_file import mixture_file_for
    from mmkd.student.weighing.weigh import weigh_experts
    from mmkd.student.weighing.weigh_report import report_lines

    if out:
        refuse_another(out, WEIGHTS)
    reader = CacheReader(cache)
    report = weigh_experts(reader, train_split=reader.init.train_split, **options)
    if out:
        write_atomically(out, mixture_file_for(reader, report.mixtures, report.to_json()).to_bytes())
    print_result(report.to_json(), as_json=as_json, lines=report_lines(report))
