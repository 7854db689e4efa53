"""The mixed teacher in a node's memory map: the numbers of memory, read once, and no store at any lookup."""

import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.layout import Shard, SplitLayout
from mmkd.data_manifests.errors import InputError, VerificationError
from mmkd.data_manifests.manifest import Clip, Head, Manifest
from mmkd.student.networks.networks import build_network
from mmkd.student.recipes.train import TrainRecipe
from mmkd.student.teacher import copy_file
from mmkd.student.teacher.cached_targets import CachedTargets, copies_folder, in_order, shared_targets
from mmkd.student.teacher.cached_teacher import mix_split
from mmkd.student.teacher.mixing import Mixture
from mmkd.student.teacher.targets import fetch_targets
from mmkd.student.training.loop import fit
from tests.helpers.array_targets import ArrayTargets
from tests.helpers.in_process import refused
from tests.helpers.moving_bars import MovingBars
from tests.helpers.small_cache import write_cache

HEADS = (Head("direction", ("left", "right", "up", "down")), Head("noun", tuple("defghi")))
EXPERTS, ROWS, VIEWS, SHARD_ROWS = ("rgb", "flow"), 10, 3, 4
SHARDS = 3 * VIEWS
WEIGHTS = {"direction": Mixture({"rgb": 0.25, "flow": 0.75}), "noun": Mixture({"rgb": 0.5, "flow": 0.5})}
SUBSET = np.array([9, 0, 4, 5, 2, 7])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A cache in which flow has nothing for row 4 and for view 1 of row 5."""
    random = np.random.default_rng(3)
    clips = [Clip(f"c{row}", f"c{row}.webm", "train", {"direction": 0, "noun": 0}) for row in range(ROWS)]
    logits = {
        expert: {
            head.name: random.standard_normal((ROWS, VIEWS, len(head.classes))).astype(np.float32) for head in HEADS
        }
        for expert in EXPERTS
    }
    for value in logits["flow"].values():
        value[4] = value[5, 1] = np.nan
    directory = tmp_path_factory.mktemp("shared") / "cache"
    write_cache(directory, Manifest("demo", HEADS, tuple(clips)), {"train": logits}, shard_rows=SHARD_ROWS)
    return directory


def open_targets(root, directory, *, weights=WEIGHTS, missing="renormalise", rows=SUBSET):
    return shared_targets(CacheReader(root), "train", weights, missing=missing, rows=rows, directory=directory)


def grid(rows):
    return [part.ravel() for part in np.meshgrid(np.arange(rows), np.arange(VIEWS), indexing="ij")]


@pytest.mark.parametrize("missing", ["renormalise", "drop", "label-only"])
def test_targets_of_the_map_are_those_of_memory_bit_for_bit(root, tmp_path, missing):
    teacher = mix_split(CacheReader(root), "train", WEIGHTS, missing)
    source = open_targets(root, tmp_path, missing=missing)
    rows, views = grid(len(SUBSET))
    for head, value in source.targets(rows, views).items():
        np.testing.assert_array_equal(value, teacher.logits[head][SUBSET[rows], views])
        assert value.dtype == np.float32
    np.testing.assert_array_equal(source.valid(rows, views), teacher.valid[SUBSET[rows], views])
    assert source.valid(rows, views).all() == (missing == "renormalise")
    np.testing.assert_array_equal(source.mask, teacher.valid)


def test_views_in_blocks_of_several_are_found():
    """(3 view blocks, 5 rows, 2 views of a block, 1 class), each holding 100 row + view."""
    values = np.array(
        [[[[100 * row + 2 * block + view] for view in range(2)] for row in range(5)] for block in range(3)]
    )
    source = CachedTargets({"a": values.astype(np.float32)}, np.ones((5, 6), np.bool_), np.array([4, 1]))
    rows, views = np.array([0, 1, 0, 1]), np.array([5, 0, 2, 3])
    assert source.targets(rows, views)["a"].ravel().tolist() == [405, 100, 402, 103]


def test_blocks_in_another_order_than_the_shards_are_refused():
    layout = SplitLayout("train", 4, 4, 2, 2)
    shards = list(layout.shards())
    blocks = [
        (slice(shard.rows.start, shard.rows.stop), slice(shard.views.start, shard.views.stop), np.zeros((2, 2, 1)))
        for shard in shards
    ]
    assert len(list(in_order(layout, blocks))) == 4
    for wrong in ([blocks[0], blocks[2], blocks[1], blocks[3]], blocks[:3]):
        with pytest.raises(ValueError, match=r"came in the place|shorter"):
            list(in_order(layout, wrong))
    assert shards[1] == Shard(layout, 1, 0)


# ---- when a copy is made


def test_what_changes_a_number_makes_another_copy_and_nothing_else_does(root, tmp_path):
    for missing in ("renormalise", "drop", "renormalise"):
        open_targets(root, tmp_path, missing=missing)
    open_targets(root, tmp_path, rows=np.arange(3))
    assert len(list(tmp_path.iterdir())) == 2
    changed = WEIGHTS | {"noun": Mixture({"rgb": 0.5000001, "flow": 0.4999999})}
    open_targets(root, tmp_path, weights=changed)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_copy_of_one_cache_is_not_anothers(root, tmp_path):
    other = tmp_path / "other"
    logits = {
        expert: {head.name: np.ones((ROWS, VIEWS, len(head.classes)), np.float32) for head in HEADS}
        for expert in EXPERTS
    }
    clips = [Clip(f"c{row}", f"c{row}.webm", "train", {"direction": 0, "noun": 0}) for row in range(ROWS)]
    write_cache(other, Manifest("demo", HEADS, tuple(clips)), {"train": logits})
    copies = tmp_path / "copies"
    mine, others = open_targets(root, copies), open_targets(other, copies)
    rows, views = grid(len(SUBSET))
    assert (others.targets(rows, views)["noun"] == 1).all()
    assert not (mine.targets(rows, views)["noun"] == 1).any()


def test_a_damaged_cache_is_refused_and_no_copy_of_it_stays(root, tmp_path):
    victim = next(path for path in sorted(root.rglob("*")) if path.is_file() and "flow/logits/noun/c" in str(path))
    sound = victim.read_bytes()
    victim.write_bytes(bytes([sound[0] ^ 1]) + sound[1:])
    try:
        with pytest.raises(VerificationError, match="is damaged"):
            open_targets(root, tmp_path)
    finally:
        victim.write_bytes(sound)
    assert not list(tmp_path.iterdir())


def test_a_split_without_any_teacher_leaves_no_copy(root, tmp_path):
    reader = CacheReader(root)
    reader.usable = lambda split, expert: np.zeros((ROWS, VIEWS), np.bool_)
    with pytest.raises(InputError, match="no usable teacher logits for split 'train'"):
        shared_targets(reader, "train", WEIGHTS, missing="drop", rows=SUBSET, directory=tmp_path)
    assert not list(tmp_path.iterdir())


def test_copies_are_not_kept_in_the_cache_and_links_do_not_hide_it(root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    for inside in (root, root / "copies", tmp_path / "link" / "copies"):
        with pytest.raises(InputError, match="lies in the cache"):
            copies_folder(inside, root)
    assert copies_folder(root.with_name("cache-copies"), root) == root.with_name("cache-copies")


def test_the_command_names_a_folder_that_cannot_hold_copies(tiny, tmp_path):
    """Exit codes of usage and of storage, before and after the clips are read."""
    command = ["mmkd-student", "train", *tiny.stage_two, "-o", tmp_path / "run", "--node-copies"]
    inside = tiny.root / "cache" / "copies"
    assert f"--node-copies {inside} lies in the cache" in refused(*command, inside)
    assert not inside.exists()
    (tmp_path / "file").touch()
    message = refused(*command, tmp_path / "file" / "copies", code=74)
    assert f"cannot keep a copy of the targets in {tmp_path / 'file' / 'copies'}: Not a directory" in message
    assert message.endswith("name another folder with --node-copies")


# ---- what a lookup costs, counted


class Events:
    """The interpreter's own audit of files opened and modules imported, while `listening`."""

    def __init__(self):
        self.listening, self.opened, self.imported = False, [], []
        sys.addaudithook(self.hear)  # it cannot be taken away, so it is one for all tests, and deaf between them

    def hear(self, event, arguments):
        if self.listening and event == "open":
            self.opened.append(str(arguments[0]))
        elif self.listening and event == "import":
            self.imported.append(arguments[0])

    def __enter__(self):
        self.opened, self.imported, self.listening = [], [], True
        return self

    def __exit__(self, *_):
        self.listening = False


@pytest.fixture(scope="module")
def events():
    return Events()


def bytes_read():
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def test_looking_up_opens_no_file_reads_no_byte_and_imports_nothing(root, tmp_path, events):
    source = open_targets(root, tmp_path)
    device = torch.device("cpu")
    fetch_targets(source, *grid(len(SUBSET)), device=device)
    idle = -bytes_read() + bytes_read()  # what asking costs
    with events:
        before = bytes_read()
        for _ in range(100):
            fetch_targets(source, *grid(len(SUBSET)), device=device)
        after = bytes_read()
    assert after - before == idle
    assert set(events.opened) <= {"/proc/self/io"}
    assert events.imported == []


def test_the_first_process_reads_every_shard_once_and_the_next_one_reads_the_copy_alone(root, tmp_path, events):
    with events:
        open_targets(root, tmp_path)
    shards = [name for name in events.opened if "/logits/" in name and "/c/" in name]
    assert len(shards) == len(set(shards)) == len(EXPERTS) * len(HEADS) * SHARDS
    with events:
        source = open_targets(root, tmp_path)
    assert not [name for name in events.opened if "targets.zarr" in name]
    assert len([name for name in events.opened if name.endswith(".node-copy")]) == 1
    (path,) = tmp_path.iterdir()
    logits = sum(value.nbytes for value in source.logits.values())
    assert path.stat().st_size < logits + source.mask.nbytes + 3 * 4096 + 2048


def test_making_a_copy_needs_memory_for_shards_whatever_the_split(tmp_path, monkeypatch):
    """9.2 MB of float32 logits for each of two experts, in 30 shards; a dozen of a shard's size are in hand."""
    monkeypatch.setattr(copy_file, "BLOCK_BYTES", 1 << 16)
    rows, head = 640, Head("direction", tuple(f"class {number}" for number in range(1200)))
    values = np.random.default_rng(0).standard_normal((rows, VIEWS, 1200)).astype(np.float32)
    clips = [Clip(f"c{row}", f"c{row}.webm", "train", {"direction": 0}) for row in range(rows)]
    logits = {name: {"direction": values} for name in EXPERTS}
    write_cache(tmp_path / "cache", Manifest("demo", (head,), tuple(clips)), {"train": logits}, shard_rows=64)

    def make(missing):
        mixtures, reader = {"direction": WEIGHTS["direction"]}, CacheReader(tmp_path / "cache")
        copies = tmp_path / "copies"
        return shared_targets(reader, "train", mixtures, missing=missing, rows=SUBSET, directory=copies)

    make("renormalise")  # what is imported and kept at the first time does not count
    tracemalloc.start()
    try:
        source = make("drop")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < values.nbytes / 2
    found = source.targets(np.arange(len(SUBSET)), np.full(len(SUBSET), 2))["direction"]
    np.testing.assert_allclose(found, values[SUBSET, 2], atol=3e-3)


# ---- training


def test_training_from_the_map_is_training_from_memory_bit_for_bit(root, tmp_path):
    recipe = TrainRecipe(network="small3d", epochs=4, batch_size=4, learning_rate=1e-3, loader_threads=2)
    teacher = mix_split(CacheReader(root), "train", WEIGHTS, "drop")
    memory = ArrayTargets({"direction": teacher.logits["direction"]})
    everything = open_targets(root, tmp_path, missing="drop", rows=np.arange(ROWS))
    mapped = CachedTargets({"direction": everything.logits["direction"]}, everything.mask, everything.rows)
    networks = {}
    for name, source in {"memory": memory, "map": mapped}.items():
        networks[name] = build_network(recipe, heads={"direction": 4}, modality="rgb")
        dataset = MovingBars(ROWS, views=VIEWS, labelled=False)
        fit(networks[name], dataset, recipe, targets=source, progress=False)
    for name, value in networks["memory"].state_dict().items():
        assert torch.equal(value, networks["map"].state_dict()[name]), name


def test_the_arrays_are_maps_of_the_copy_and_not_of_memory(root, tmp_path):
    source = open_targets(root, tmp_path)
    (path,) = tmp_path.iterdir()
    assert str(path) in Path("/proc/self/maps").read_text()
    with pytest.raises(ValueError, match="read-only"):
        source.logits["noun"][...] = 0
