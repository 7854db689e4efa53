"""Command lines that a text shows, taken apart by the commands themselves: nothing runs."""

import importlib
import shlex
from collections.abc import Iterator

import click

from tests.helpers.in_process import MODULES

PROGRAMS: dict[str, click.Command] = {name: importlib.import_module(module).cli for name, module in MODULES.items()}


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """Yield a command's full name and itself, then those below it."""
    yield name, command
    if isinstance(command, click.Group):
        for inner_name, inner in command.commands.items():
            yield from commands(inner, f"{name} {inner_name}")


ALL = dict(pair for name, program in PROGRAMS.items() for pair in commands(program, name))
"""`mmkd-cache config show` -> its command, for both programs and everything below them."""


def options_of(command: click.Command) -> set[str]:
    """Return every spelling of a command's options, those for help included."""
    known = {spelling for parameter in command.params for spelling in (*parameter.opts, *parameter.secondary_opts)}
    return {spelling for spelling in known if spelling.startswith("-")} | {"-h", "--help"}


def parse(line: str) -> None:
    """Take a line such as `mmkd-cache status CACHE` apart; raise UsageError for what it refuses."""
    words = shlex.split(line.replace("\\\n", " "))
    command, name = PROGRAMS[words[0]], words.pop(0)
    context = click.Context(command, **command.context_settings)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        if words[0] not in command.commands:
            raise click.UsageError(f"{name} has no command {words[0]!r}")
        name, command = f"{name} {words[0]}", command.commands[words.pop(0)]
        context = click.Context(command, parent=context)
    if {"-h", "--help"} & set(words):
        return
    types = [(parameter, parameter.type) for parameter in command.params if isinstance(parameter.type, click.Path)]
    for parameter, _ in types:
        parameter.type = click.STRING  # the files of an example need not exist
    try:
        command.parse_args(context, words)
    finally:
        for parameter, kind in types:
            parameter.type = kind
