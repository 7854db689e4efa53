"""An expert's folder: the card is sealed, the weights are hashed, and what is damaged can be made again."""

import errno
import hashlib
import json
import logging
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, replace

import pytest
import torch

from mmkd.cache_tools.cache.fingerprints import fingerprint
from mmkd.cache_tools.tasks.folder_lock import folder_lock
from mmkd.data_manifests.errors import InputError, MmkdError, StorageError
from mmkd.pipeline.experts import expert as expert_module
from mmkd.pipeline.experts.expert import (
    CARD_FILE,
    UNSEALED_SCHEMA,
    WEIGHTS_FILE,
    ExpertCard,
    load_expert,
    make_network,
    read_card,
    save_expert,
    write_card,
)
from mmkd.pipeline.recipe import ExpertRecipe
from mmkd.student.evaluation.run_files import RUN_FILE
from mmkd.student.training.checkpoint import encode_network
from tests.helpers.in_process import call, call_ok, refused

DATA = ("--manifest", "m", "--videos", "v")
CPU = torch.device("cpu")
LAYOUT = {"hidden": 8, "attention_heads": 1, "spatial_layers": 1, "temporal_layers": 1}


@pytest.fixture
def folder(tmp_path):
    """A folder with a small boxes expert that was never trained."""
    recipe = ExpertRecipe(modality="boxes", layout=LAYOUT)
    state = encode_network(make_network(recipe, {"action": 2}))
    card = ExpertCard(
        name="boxes",
        recipe=recipe.model_dump(mode="json"),
        heads={"action": ["öffnen", "close"]},
        manifest="0" * 64,
        views={"frames": 4},
        flow=None,
        boxes={"fps": 12.0, "max_boxes": 4, "sha256": ["1" * 64]},
        held_out={"fraction": 0.1, "seed": 0},
        weights_sha256=hashlib.sha256(state).hexdigest(),
        training={"steps": 1},
    )
    save_expert(tmp_path / "boxes", card, state)
    return tmp_path / "boxes"


def test_a_card_comes_back_as_it_was_written_and_gives_a_network(folder):
    expert = load_expert(folder, CPU)
    assert (expert.name, expert.modality) == ("boxes", "boxes")
    written = (folder / CARD_FILE).read_bytes()
    write_card(folder, expert.card)
    assert (folder / CARD_FILE).read_bytes() == written


def test_no_flipped_bit_of_a_card_changes_a_meaning_in_silence(folder):
    path, card = folder / CARD_FILE, read_card(folder)
    data = path.read_bytes()
    for bit in range(0, 8 * len(data), 3):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with suppress(MmkdError):
            assert read_card(folder) == card, f"bit {bit}"


def test_a_damaged_card_says_what_to_do(folder):
    path = folder / CARD_FILE
    path.write_text(path.read_text().replace('"fraction": 0.1', '"fraction": 0.2'))
    error = refused("mmkd-cache", "build", *DATA, "--expert", folder, "-o", "c", code=4)
    assert f"{path} is damaged (its hash differs); delete it and run the same `mmkd-cache teach` again" in error


def test_a_card_without_a_seal_opens_with_a_warning_and_gets_one(folder, caplog):
    card, path = read_card(folder), folder / CARD_FILE
    sealed = path.read_bytes()
    path.write_text(json.dumps(asdict(card) | {"schema": UNSEALED_SCHEMA}))
    with caplog.at_level(logging.WARNING):
        assert read_card(folder) == card
    assert f"{path} has no seal" in caplog.text
    write_card(folder, card)
    assert path.read_bytes() == sealed


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda card: card.update(schema="mmkd-expert-9"), "has schema 'mmkd-expert-9'"),
        (lambda card: card.pop("heads"), "does not describe an expert: heads: Field required"),
        (lambda card: card.update(heads="action"), "does not describe an expert"),
        (lambda card: card.update(heads={"action": [1, 2]}), "does not describe an expert"),
        (lambda card: card.update(training=[]), "does not describe an expert"),
        (lambda card: card.update(name=None), "does not describe an expert"),
        (lambda card: card.update(more=1), "does not describe an expert"),
        (lambda card: card["recipe"].update(modality="smell"), "does not describe an expert"),
        (lambda card: card["recipe"].pop("modality"), "does not describe an expert"),
        (lambda card: card["heads"].update(action=["a", "b", "c"]), "does not describe its weights"),
    ],
)
def test_a_wrong_card_with_a_right_seal_is_refused(folder, change, says):
    card = asdict(read_card(folder))
    change(card)
    (folder / CARD_FILE).write_text(json.dumps(card | {"seal": fingerprint(card)}))
    with pytest.raises(InputError, match=says) as caught:
        load_expert(folder, CPU)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": NaN}', '{"a": "\\ud800"}', "\x00", "[" * 100_000])
def test_a_card_that_is_no_card_is_refused_by_name(folder, text):
    (folder / CARD_FILE).write_text(text)
    with pytest.raises(MmkdError, match=CARD_FILE):
        read_card(folder)


def test_lost_or_damaged_weights_are_trained_again_by_the_advice_that_says_so(quick, tmp_path):
    shutil.copytree(quick.root / "experts" / "rgb", tmp_path / "rgb")
    (tmp_path / "rgb" / WEIGHTS_FILE).write_bytes(b"damaged")
    options = [*quick.options()[:8], "--workers", 0]
    error = refused("mmkd-cache", "build", *options, "--expert", tmp_path / "rgb", "-o", tmp_path / "c", code=4)
    assert "run the same `mmkd-cache teach` again" in error

    teach = [
        "mmkd-cache",
        "teach",
        "boxes",
        *options,
        "--set",
        "experts.boxes.train.epochs=1",
        "-o",
        tmp_path / "e",
    ]
    call_ok(*teach)
    written = {name: (tmp_path / "e" / name).read_bytes() for name in (CARD_FILE, WEIGHTS_FILE)}
    assert "was there already" in call_ok(*teach)
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(b"damaged")):
        damage(tmp_path / "e" / WEIGHTS_FILE)
        again = call(*teach)
        assert (again.code, "trained" in again.out) == (0, True)
        assert f"{tmp_path / 'e' / WEIGHTS_FILE} is missing or damaged" in again.err
        assert {name: (tmp_path / "e" / name).read_bytes() for name in written} == written
    (tmp_path / "e" / CARD_FILE).unlink()  # as the advice for a damaged card says
    call_ok(*teach)
    assert {name: (tmp_path / "e" / name).read_bytes() for name in written} == written


def test_an_expert_of_an_earlier_version_is_sealed_by_the_same_teach(quick, tmp_path):
    teach = ["mmkd-cache", "teach", "rgb", *quick.options()[:8], "--workers", 0, "-o", tmp_path / "rgb"]
    shutil.copytree(quick.root / "experts" / "rgb", tmp_path / "rgb")
    path = tmp_path / "rgb" / CARD_FILE
    sealed = path.read_bytes()
    path.write_text(json.dumps(asdict(replace(read_card(tmp_path / "rgb"), schema=UNSEALED_SCHEMA))))
    assert "was there already" in call_ok(*teach)
    assert path.read_bytes() == sealed


def test_a_folder_has_one_teaching_at_a_time_and_never_a_run_s(quick, tmp_path):
    teach = ["mmkd-cache", "teach", "rgb", *quick.options()[:8], "--workers", 0, "-o", tmp_path / "e"]
    with folder_lock(tmp_path / "e"):
        error = refused(*teach)
        assert f"{tmp_path / 'e'} is in use by process {os.getpid()} on host" in error
    assert not (tmp_path / "e").exists()
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / RUN_FILE).write_text("{}")
    assert "holds a run of `mmkd-student train`" in refused(*teach)


@pytest.mark.parametrize("name", [CARD_FILE, WEIGHTS_FILE])
def test_a_pipe_in_the_place_of_an_expert_s_file_is_an_error_and_no_wait(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(MmkdError, match=name):
        load_expert(folder, CPU)


def test_a_card_that_the_disk_does_not_give_is_a_fault_of_the_machine(folder, monkeypatch):
    def fail(path, **_):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(expert_module, "read_regular", fail)
    with pytest.raises(StorageError, match=r"cannot read .*expert.json: Input/output error"):
        read_card(folder)


def test_newer_fields_of_a_layout_enter_a_fingerprint_off_their_defaults_alone(folder):
    card = read_card(folder)
    fields = card.fingerprint_fields(None)["layout"]
    assert fields == {**LAYOUT, "dropout": 0.1}
    for change in ({"norm_eps": 0.1}, {"sides": True}, {"states": True}):
        other = replace(card, recipe=card.recipe | {"layout": card.recipe["layout"] | change})
        assert other.fingerprint_fields(None)["layout"] == fields | change
