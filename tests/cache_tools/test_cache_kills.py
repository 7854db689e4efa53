"""A build killed by SIGKILL anywhere, in the middle of its writes above all, loses the shards in work alone."""

import itertools
import re

import pytest

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.data_manifests.errors import InputError
from tests.helpers.forked import Forked, contents

ONE_SPLIT = ("--set", 'build.splits=["train"]', "--set", "build.shard_rows=7")
KINDS = {
    "start": r"\w+ (targets\.zarr/.*|init\.json)",
    "claim": r"\w+ claims/.*",
    "computing": r"decoded",
    "in a shard's write": r"(opened|half|written|placed) targets\.zarr/\w+/(thumbprint|rgb|boxes)/.*/?c/.*",
    "between objects and record": r"(opened|half|written) commits/.*",
    "after the record": r"(placed|synced) commits/.*|deleting claims/train/.*",
    "finalize": r"\w+ (index\.jsonl|root\.json)|deleted claims/init/.*",
}
INSTANTS = dict(zip(KINDS, (5, 2, 2, 16, 9, 4, 6), strict=True))


@pytest.fixture(scope="module")
def undisturbed(quick: Forked, tmp_path_factory):
    """The bytes of an undisturbed build of one split, and the names of its steps in order."""
    folder = tmp_path_factory.mktemp("undisturbed")
    result = quick.build(folder / "cache", *ONE_SPLIT, faults={"trace": str(folder / "steps")})
    assert result.code == 0, result.err
    return contents(folder / "cache"), (folder / "steps").read_text().splitlines()


def kind_of(number: int, steps: list[str]) -> str:
    """What the build is doing at a step; what precedes the first shard and looks like one is the start."""
    name = steps[number - 1]
    kinds = [kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, name)]
    first_shard = next(i for i, step in enumerate(steps, 1) if step == "decoded")
    if "start" in kinds and number > first_shard:
        kinds.remove("start")
    next_key = next((step.split()[-1] for step in steps[number:] if not step.startswith("decoded")), "")
    if name.startswith("synced targets") and number > first_shard:
        kinds = ["between objects and record" if next_key.startswith("commits/") else "in a shard's write"]
    return kinds[0] if kinds else ""


def choose(steps: list[str], wanted: dict[str, int]) -> list[int]:
    """Spread so many instants of each kind over the build."""
    by_kind = {kind: [n for n in range(1, len(steps) + 1) if kind_of(n, steps) == kind] for kind in wanted}
    chosen = []
    for kind, count in wanted.items():
        there = by_kind[kind]
        assert len(there) >= count, f"{len(there)} steps are {kind!r}"
        chosen += [there[(2 * number + 1) * len(there) // (2 * count)] for number in range(count)]
    return sorted(chosen)


def kill_and_resume(quick: Forked, out, number: int, undisturbed) -> str:
    """Kill a build at a step, resume it, and compare; return where it hit."""
    expected, steps = undisturbed
    killed = quick.build(out, *ONE_SPLIT, faults={"acts": [{"at": number, "do": "kill"}]})
    assert killed.code == -9
    where = f"step {number:3} of {len(steps)}, {kind_of(number, steps)}: {steps[number - 1]}"
    there = {key for key in contents(out) if not key.startswith((".tmp/", "claims/", "tasks/"))}
    if "root.json" not in there:
        with pytest.raises(InputError, match=r"not finished|is not a cache"):
            CacheReader(out)
    records = len([key for key in there if key.startswith("commits/")])
    objects = {
        key: (out / key).stat().st_mtime_ns for key in there if re.search(r"/(thumbprint|rgb|boxes)/.*c/", key)
    }
    resumed = quick.build(out, *ONE_SPLIT)
    assert resumed.code == 0, f"{where}: {resumed.err}"
    assert contents(out) == expected, where
    kept = sum((out / key).stat().st_mtime_ns == modified for key, modified in objects.items())
    assert kept >= 2 * records, f"{where}: what was committed was computed again"
    return where


def test_builds_killed_at_many_instants_resume_to_the_same_bytes(quick, undisturbed, tmp_path, capsys):
    steps = undisturbed[1]
    instants = choose(steps, INSTANTS)
    kinds = [kind_of(number, steps) for number in instants]
    assert len(set(instants)) >= 30
    assert kinds.count("in a shard's write") >= 10
    assert kinds.count("between objects and record") >= 5
    with capsys.disabled():
        print()
        for number in instants:
            print("killed at", kill_and_resume(quick, tmp_path / f"{number}", number, undisturbed))


def test_a_build_killed_again_and_again_arrives(quick, undisturbed, tmp_path):
    for attempt in itertools.count():
        assert attempt < 12, "no progress"
        faults = {"acts": [{"at": 120 + 7 * attempt, "do": "kill"}]}
        result = quick.build(tmp_path / "cache", *ONE_SPLIT, faults=faults)
        if result.code == 0:
            break
        assert result.code == -9
    assert attempt >= 2, "killed too late to mean anything"
    assert contents(tmp_path / "cache") == undisturbed[0]
