"""Running the commands inside the test's process: as a user's process does it, without importing torch again."""

import contextlib
import importlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from unittest import mock

import torch

from tests.helpers.commands import ENVIRONMENT, Result

MODULES = {"mmkd-cache": "mmkd.pipeline.cli", "mmkd-student": "mmkd.student.cli"}


@contextlib.contextmanager
def _as_in_a_process(arguments: list[str], out: io.StringIO, err: io.StringIO) -> Iterator[None]:
    root, handler, threads = logging.getLogger(), logging.StreamHandler(err), torch.get_num_threads()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        with (
            mock.patch.object(sys, "argv", arguments),
            mock.patch.dict(os.environ, ENVIRONMENT, clear=True),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        torch.set_num_threads(threads)  # a worker's function, run inline, sets it to 1


def call(*arguments: object) -> Result:
    """Run `mmkd-cache ...` or `mmkd-student ...` here; a bug's exception comes through."""
    texts = [str(argument) for argument in arguments]
    out, err = io.StringIO(), io.StringIO()
    main = importlib.import_module(MODULES[texts[0]]).main
    code = 0
    with _as_in_a_process(texts, out, err):
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


def call_ok(*arguments: object) -> str:
    """Run a command that must succeed; return its stdout."""
    result = call(*arguments)
    assert result.code == 0, result.err[-2000:]
    return result.out


def refused(*arguments: object, code: int = 2) -> str:
    """Run a command that must end with this exit code and one clear line; return that line."""
    result = call(*arguments)
    assert result.code == code, f"exit code {result.code}: {result.err[-2000:]}"
    assert result.out == "", "stdout is for results"
    last = result.err.rstrip().splitlines()[-1]
    assert last.lower().startswith("error: ") or last.startswith("  "), result.err[-2000:]
    return result.err[result.err.lower().rindex("error: ") :].rstrip()
