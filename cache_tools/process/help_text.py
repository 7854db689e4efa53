"""Help as both commands give it: `-h` works, no list of commands is cut, and each help ends with an example."""

from typing import Any

import click


class WholeHelp(click.Command):
    """A command whose first sentence stands whole in its group's list."""

    def get_short_help_str(self, limit: int = 45) -> str:
        """Return the first sentence of the help, however long: the list wraps it, where click would cut it."""
        return super().get_short_help_str(limit=10_000)


class WholeHelpGroup(WholeHelp, click.Group):
    """A group of such commands."""

    command_class = WholeHelp
    group_class = type  # groups below are of this class, too

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Take `-h` beside `--help`, here and in every command below."""
        options.setdefault("context_settings", {"help_option_names": ["-h", "--help"]})
        super().__init__(*arguments, **options)


def example(*lines: str) -> str:
    """Return the end of a command's help: commands to type, each on its own line, never wrapped."""
    title = "Example:" if len(lines) == 1 else "Examples:"
    return "\b\n" + "\n  ".join([title, *"\n".join(lines).splitlines()])  # \b: click leaves the lines alone
