"""What both commands share: recipe options, errors as one line with a documented exit code, logging to stderr.

Exit codes: 0 done, 1 a bug, 2 usage or configuration, 3 more clips unusable than tolerated, 4 verification
failed, 5 fingerprint differs, 74 I/O (disk full), 75 stopped cleanly: run me again.
"""

import errno
import json
import logging
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import click

from mmkd.cache_tools.process.interrupt import ended_by_signals
from mmkd.cache_tools.process.streams import STDOUT, drop_output, guard_streams
from mmkd.data_manifests.errors import EXIT_INTERRUPTED, InputError, MmkdError, StorageError
from mmkd.data_manifests.kinds import what_is
from mmkd.data_manifests.system_errors import MACHINE_FAULTS

Function = TypeVar("Function", bound=Callable[..., Any])
log = logging.getLogger("mmkd")


class LocalPath(click.Path):
    """A path of this machine, written plainly or as a `file://` URL; another URL would become a folder `s3:`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the Path; refuse a URL."""
        text = str(value).removeprefix("file://")
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
            self.fail(f"{text} is a URL; name a path of this machine: only caches may lie elsewhere", param, ctx)
        return super().convert(text, param, ctx)


FOLDER = LocalPath(path_type=Path, file_okay=False)
FILE = LocalPath(path_type=Path, dir_okay=False)
PLACE = LocalPath(path_type=Path)
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
trust_option = click.option(
    "--trust-network",
    "trusted",
    multiple=True,
    metavar="MODULE:FACTORY",
    help="Run this code, which an expert or a run names as its network; repeatable.",
)
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
RECIPE_FILES = files("mmkd.data_manifests") / "recipe-files"
TEACHER = "-teacher.yaml"
example_argument = click.argument(
    "data_set",
    type=click.Choice(
        sorted(file.name.removesuffix(TEACHER) for file in RECIPE_FILES.iterdir() if file.name.endswith(TEACHER))
    ),
)

WRONG_PATH = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP})
"""The path that the user named cannot be what the command needs: usage."""


def run_command(group: click.Group) -> None:
    """Run a command line; user errors become one line on stderr and their exit code."""
    guard_streams()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    try:
        with ended_by_signals():
            group.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped; run the same command again to go on", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except MmkdError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except MemoryError as error:
        click.echo(f"error: the memory does not suffice ({_one_line(error)}); nothing was lost", err=True)
        sys.exit(StorageError.exit_code)
    except OSError as error:
        if error.filename == STDOUT:
            drop_output()
            click.echo(f"error: cannot write to {STDOUT}: {error.strerror}", err=True)
            sys.exit(StorageError.exit_code)
        where = f"{error.filename}: " if error.filename else ""
        if error.errno in MACHINE_FAULTS:
            click.echo(f"error: {where}{error.strerror}; fix that and run the same command again", err=True)
            sys.exit(StorageError.exit_code)
        if error.errno not in WRONG_PATH or not where:
            raise
        click.echo(f"error: {where}{error.strerror}; name another path", err=True)
        sys.exit(InputError.exit_code)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def recipe_options(function: Function) -> Function:
    """Add `-c FILE` (repeatable) and `--set key=value` (repeatable) to a command."""
    function = click.option(
        "-c",
        "--config",
        "files",
        multiple=True,
        type=click.Path(path_type=Path, dir_okay=False, exists=True),
        help="Recipe in YAML; later files override earlier ones.",
    )(function)
    return click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Override one value, e.g. views.frames=8.",
    )(function)


def data_options(function: Function) -> Function:
    """Add --manifest, --videos, --facts and --workers, which override the recipe's data section."""
    options = (
        click.option("--manifest", type=FILE, help="Manifest made by `mmkd-cache manifest`."),
        click.option("--videos", type=PLACE, help="Folder that its video paths are relative to, or an HDF5 file."),
        click.option("--facts", type=FOLDER, help="Folder for probed facts [default: MANIFEST.facts]."),
        click.option("--workers", type=click.IntRange(0), help="Decoding processes [default: 2]."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def cache_location(text: str) -> Path | str:
    """Return what names a cache on a command line: its folder as a Path, or its URL as it is; refuse a file."""
    if "://" in text and not text.startswith("file://"):
        return text
    path = Path(text.removeprefix("file://"))
    if path.is_file():
        kind = what_is(path)
        told = f"it is {kind}" if kind else "name the folder or the URL of a cache"
        raise click.BadParameter(f"{path} is a file, not a cache; {told}")
    return path


def named_data(values: dict[str, Any]) -> dict[str, Any]:
    """Take the values of `data_options` out of a command's arguments, as named recipe values."""
    return {f"data.{name}": values.pop(name) for name in ("manifest", "videos", "facts", "workers")}


def example_recipe(data_set: str, stage: str) -> str:
    """Return the text of the recipe for a data set and a stage, `teacher` or `student`."""
    return (RECIPE_FILES / f"{data_set}-{stage}.yaml").read_text(encoding="utf-8")


def print_result(value: Any, *, as_json: bool, lines: Sequence[str]) -> None:
    """Print a result on stdout: one JSON object (null where a number is not defined), or lines for people."""
    click.echo(json.dumps(without_nan(value), indent=1, allow_nan=False) if as_json else "\n".join(lines))


def without_nan(value: Any) -> Any:
    """Return JSON values with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
