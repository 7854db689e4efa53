"""Where things lie: the checkout, what an earlier version wrote, and the published data (never committed)."""

import os
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""
TESTS = ROOT / "tests"
BEFORE = TESTS / "data" / "before.tar.xz"
"""Experts, a cache and runs that commit cc9a7f6 wrote, see data/make_before.sh."""
VARIABLE = "MMKD_TEST_DATA"
DATA = Path(os.environ.get(VARIABLE) or ROOT.parent / "shared" / "data")
"""Folder of the published data: where MMKD_TEST_DATA says, else beside the checkout."""
_REASON = f"the published data is not at {DATA}; name its folder with {VARIABLE}"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=_REASON)


def skip_without_data() -> None:
    """Skip the test that calls it, as `needs_data` does for a whole test."""
    if not DATA.is_dir():
        pytest.skip(_REASON)


def check_data() -> None:
    """Refuse a named folder that is not there: who names it wants those tests to run."""
    if VARIABLE in os.environ and not DATA.is_dir():
        raise pytest.UsageError(f"{VARIABLE} names {DATA}, which is not a folder")


def unpack_before(folder: Path) -> Path:
    """Lay the files of the earlier version into a folder; recipes name them relative to it."""
    with tarfile.open(BEFORE) as archive:
        archive.extractall(folder, filter="data")
    return folder
