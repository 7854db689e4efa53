"""What several test files share: a tiny demo data set, and a teacher and a cache made from it, once a session."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.helpers.commands import run_ok
from tests.helpers.places import check_data
from tests.helpers.tiny import TINY_RECIPE, Tiny

if TYPE_CHECKING:
    from tests.helpers.forked import Forked


def pytest_configure() -> None:
    """Refuse a wrong MMKD_TEST_DATA before anything runs."""
    check_data()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread in torch, whatever the machine: so times and sums do not depend on it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Forked"]:
    """A smaller data set, untrained experts, their cache, and builds that start at once; not to be written into."""
    from tests.helpers.forked import Forked

    with Forked(tmp_path_factory.mktemp("quick")) as forked:
        yield forked


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Data set, manifest, three experts (one epoch each) and a cache; tests must not write into it."""
    root = tmp_path_factory.mktemp("tiny")
    sizes = ("--train-clips", 14, "--standard-clips", 14, "--compositional-clips", 14)
    run_ok("mmkd-cache", "demo", root, *sizes)
    (root / "tiny.yaml").write_text(TINY_RECIPE)
    splits = [
        part
        for name in ("train", "standard", "compositional")
        for part in ("--split", f"{name}={root / name}.json")
    ]
    run_ok(
        "mmkd-cache",
        "manifest",
        "something-something",
        *splits,
        "--labels",
        root / "labels.json",
        "--dataset",
        "mmkd-demo",
        "-o",
        root / "manifest.jsonl",
    )
    made = Tiny(root)
    for name in ("rgb", "flow", "boxes"):
        run_ok("mmkd-cache", "teach", name, *made.stage_one, "-o", root / "experts" / name)
    run_ok("mmkd-cache", "build", *made.stage_one, *made.experts, "-o", root / "cache")
    return made
