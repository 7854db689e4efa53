"""Standard streams that are closed or full: one line and a documented code; work does without its messages."""

import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(sys.executable).with_name("mmkd-cache")
POOL = (
    "from mmkd.cache_tools.process.streams import guard_streams; guard_streams();"
    "from mmkd.cache_tools.process.pool import run_tasks; from mmkd.cache_tools.process.progress import Progress;"
    "found = [value for _, value in run_tasks(eval, ['1 + 1', 'print(5) or 7'], workers=1)];"
    "progress = Progress('counting', total=2); progress.__enter__(); progress.__exit__(None, None, None);"
    "assert sorted(found) == [2, 7], found; print('done')"
)


def shell(line: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", line, "bash", *map(str, arguments)], capture_output=True, text=True, timeout=250, check=False
    )


@pytest.mark.parametrize(
    ("stream", "reason"), [(">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")]
)
def test_a_result_that_cannot_be_written_is_a_storage_error_in_one_line(stream, reason):
    done = shell(f'"$1" --help {stream}', COMMAND)
    assert (done.returncode, done.stdout) == (74, "")
    assert done.stderr == f"error: cannot write to standard output: {reason}\n"


@pytest.mark.parametrize("stream", ["2>/dev/full", "2>&-", "<&- >&- 2>&-"])
def test_an_error_that_nobody_can_read_keeps_its_code(tmp_path, stream):
    done = shell(f'"$1" status "$2" {stream}', COMMAND, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


@pytest.mark.parametrize("stream", ["2>/dev/full", "2>&-", "<&- 2>&-"])
def test_workers_and_progress_do_without_a_stderr(stream):
    done = shell(f'"$1" -c "$2" {stream}', sys.executable, POOL)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_a_reader_that_has_seen_enough_is_no_error():
    done = shell('set -o pipefail; "$1" --help | head -c 1', COMMAND)
    assert (done.returncode, done.stderr, len(done.stdout)) == (0, "", 1)
