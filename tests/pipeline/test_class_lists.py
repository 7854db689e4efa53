"""Class lists as publishers write them, and classes matched by name."""

import json

import pytest

from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.manifest import Head
from mmkd.pipeline.imports.class_files import read_class_names
from mmkd.pipeline.imports.class_matching import match_classes
from mmkd.pipeline.imports.head_sources import HeadSource, class_files, head_sources
from tests.helpers.places import DATA, needs_data

NAMES = ("Pushing [something]", "Closing something", "Holding something")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", json.dumps({"id2label": {str(n): name for n, name in enumerate(NAMES)}, "label2id": {}})),
        ("id2label.json", json.dumps({str(n): NAMES[n] for n in (2, 0, 1)})),
        ("labels.json", json.dumps({NAMES[n]: str(n) for n in (1, 2, 0)})),
        ("numbers.json", json.dumps({NAMES[n]: n for n in (1, 2, 0)})),
        ("list.json", json.dumps(NAMES)),
        ("label_map.txt", "\ufeff" + "\n".join(NAMES) + "\n\n"),
        (
            "EPIC_100_verb_classes.csv",
            "id,key,instances\n1,Closing something,\"['a']\"\n0,Pushing [something],x\n2," + NAMES[2],
        ),
    ],
)
def test_every_published_form_gives_the_names_by_number(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_class_names(tmp_path / name) == NAMES


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"x": "0", "y": "0"}', "each once"),
        ("a.json", '{"0": "x", "2": "y"}', "none has number 1"),
        ("a.json", '{"x": 1, "y": "b"}', "expected a list of class names"),
        ("a.json", '["x", 3]', "expected a list of class names"),
        ("a.json", "[", "not valid JSON"),
        ("a.csv", "number,verb\n0,x\n", "has the columns id and key; this one has number, verb"),
        ("a.csv", "id,key\n0,x\n0,y\n", r"a\.csv:3: id '0'"),
        ("a.csv", "id,key\n0,x\n1\n", r"a\.csv:3: id '1' with key None"),
        ("a.txt", "one\n", "at least two names"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_list_that_is_none_is_refused_by_name(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message) as caught:
        read_class_names(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@needs_data
def test_the_published_lists_are_read():
    found = {path.name: read_class_names(path) for path in sorted(DATA.rglob("EPIC_100_*_classes*.csv"))}
    verbs = [names for name, names in found.items() if "verb" in name]
    assert verbs
    assert all((len(names), names[0]) == (97, "take") for names in verbs)
    assert all(len(names) == 300 for name, names in found.items() if "noun" in name)


def test_classes_are_matched_by_name_without_brackets_case_or_blanks(tmp_path):
    head = Head("action", ("holding  Something", "Pushing something"))
    assert match_classes(NAMES, head, tmp_path) == [2, 0]


def test_a_class_that_is_missing_or_there_twice_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"lists/a lacks 1 class of head 'action': 'Tearing'; is it"):
        match_classes(NAMES, Head("action", ("Tearing", "Closing something")), tmp_path / "lists" / "a")
    with pytest.raises(InputError, match="classes 0 and 1 have the same name"):
        match_classes(("A [b]", "a b"), Head("action", ("x", "y")), tmp_path)
    with pytest.raises(InputError, match="head 'action' of the manifest: classes 0 and 1"):
        match_classes(NAMES, Head("action", ("A [b]", "a b")), tmp_path)


def test_heads_take_the_classifier_of_their_name_the_only_one_or_the_one_that_is_named():
    assert head_sources([], ["verb", "noun"], ["noun", "verb"]) == {
        "verb": HeadSource("verb"),
        "noun": HeadSource("noun"),
    }
    assert head_sources([], ["action"], ["head"]) == {"action": HeadSource("head")}
    found = head_sources(["verb=head[0:97]", "noun=[97:397]"], ["verb", "noun"], ["head"])
    assert found == {"verb": HeadSource("head", (0, 97)), "noun": HeadSource("head", (97, 397))}


@pytest.mark.parametrize(
    ("texts", "heads", "message"),
    [
        ([], ["verb", "noun"], "no classifier of the checkpoint is called 'verb'; it has head"),
        (["verb:head"], ["verb"], "expected HEAD=NAME"),
        (["action=head"], ["verb"], "the manifest has no head 'action'; it has verb"),
        (["verb=fc"], ["verb"], "the checkpoint's classifiers are head"),
    ],
)
def test_a_head_without_a_classifier_is_refused(texts, heads, message):
    with pytest.raises(InputError, match=message):
        head_sources(texts, heads, ["head"])


def test_every_head_needs_one_class_list(tmp_path):
    assert class_files(["a=b.txt"], ["action"])["action"].name == "a=b.txt"  # no head is called a
    assert set(class_files(["verb=v", "noun=n"], ["verb", "noun"])) == {"verb", "noun"}
    for texts, message in (
        (["v"], "give HEAD=FILE for each"),
        (["verb=v"], "head 'noun' has no class list"),
        (["verb=v", "verb=w"], "has a class list already"),
    ):
        with pytest.raises(InputError, match=message):
            class_files(texts, ["verb", "noun"])
