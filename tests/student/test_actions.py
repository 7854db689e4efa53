"""Verb and noun as one action: held against the rules of EPIC-KITCHENS' scorer, written out here for each clip."""

import csv
import json
import zipfile

import numpy as np
import pytest

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.manifest import Clip, Head, Manifest
from mmkd.student.evaluation.actions import action_scores
from mmkd.student.evaluation.evaluate import Averaged, score_split
from mmkd.student.evaluation.per_class import per_class_csv
from mmkd.student.evaluation.submission import check_epic_heads, submission, write_submission
from mmkd.student.evaluation.table_text import metric_lines
from tests.helpers.small_cache import write_cache

VERBS, NOUNS, CLIPS = 97, 300, 150


@pytest.fixture(scope="module")
def drawn():
    """Logits that know the labels a little, so that clips are right at every rank; and labels."""
    draw = np.random.default_rng(7)
    verbs, nouns = draw.integers(0, VERBS, CLIPS), draw.integers(0, NOUNS, CLIPS)
    verb, noun = draw.normal(size=(CLIPS, VERBS)), draw.normal(size=(CLIPS, NOUNS))
    verb[np.arange(CLIPS), verbs] += draw.uniform(0, 5, CLIPS)
    noun[np.arange(CLIPS), nouns] += draw.uniform(0, 5, CLIPS)
    return verb.astype(np.float32), noun.astype(np.float32), verbs, nouns


def softmax(row):
    exponentials = np.exp(row - row.max())
    return exponentials / exponentials.sum()


def published_actions(verb_row, noun_row, top=100):
    """The official scorer for one clip: products of the softmax of the 100 best verbs and nouns, best pairs first.

    Action ids are verb * 1000 + noun.
    """
    verbs, nouns = np.argsort(verb_row)[::-1][:top], np.argsort(noun_row)[::-1][:top]
    products = np.outer(softmax(verb_row[verbs].astype(np.float64)), softmax(noun_row[nouns].astype(np.float64)))
    best = np.argsort(products, axis=None)[::-1][:top]
    rows, columns = np.unravel_index(best, products.shape)
    return verbs[rows] * 1000 + nouns[columns]


def test_an_action_s_rank_is_the_published_scorer_s(drawn):
    verb, noun, verbs, nouns = drawn
    found = action_scores(verb, noun, verbs, nouns)
    for clip in range(CLIPS):
        ids = published_actions(verb[clip], noun[clip]).tolist()
        own = int(verbs[clip] * 1000 + nouns[clip])
        assert found.rank[clip] == ids.index(own) if own in ids else found.rank[clip] >= 100
    assert 0.1 < found.top_k(1) < 0.9
    assert found.top_k(1) < found.top_k(5)


def test_at_one_the_official_rule_is_both_right(drawn):
    verb, noun, verbs, nouns = drawn
    both = (verb.argmax(1) == verbs) & (noun.argmax(1) == nouns)
    np.testing.assert_array_equal(action_scores(verb, noun, verbs, nouns).rank == 0, both)


def test_confidence_and_cross_entropy_are_the_pair_s(drawn):
    verb, noun, verbs, nouns = drawn
    found = action_scores(verb, noun, verbs, nouns)
    for clip in range(0, CLIPS, 10):
        of_verb, of_noun = softmax(verb[clip].astype(np.float64)), softmax(noun[clip].astype(np.float64))
        assert found.confidence[clip] == pytest.approx(of_verb.max() * of_noun.max())
        assert found.nll[clip] == pytest.approx(-np.log(of_verb[verbs[clip]] * of_noun[nouns[clip]]))


def test_without_clips_there_are_no_scores():
    none = np.zeros(0, np.int64)
    found = action_scores(np.zeros((0, 3), np.float32), np.zeros((0, 4), np.float32), none, none)
    assert len(found.rank) == 0
    assert np.isnan(found.top_k(1))


@pytest.fixture(scope="module")
def epic(drawn, tmp_path_factory):
    """A cache over EPIC's class counts, its manifest with the official groups, and the student's logits."""
    verb, noun, verbs, nouns = drawn
    heads = (
        Head("verb", tuple(f"verb {n}" for n in range(VERBS))),
        Head("noun", tuple(f"noun {n}" for n in range(NOUNS))),
    )
    tail_verb, tail_noun, unseen = verbs >= 50, nouns % 3 == 0, np.arange(CLIPS) % 5 == 0
    groups = {
        "unseen": unseen,
        "tail_verb": tail_verb,
        "tail_noun": tail_noun,
        "tail_action": tail_verb | tail_noun,
    }
    clips = tuple(
        Clip(
            f"P01_11_{row}",
            "P01_11.MP4",
            "validation",
            {"verb": int(verbs[row]), "noun": int(nouns[row])},
            groups=tuple(name for name, members in groups.items() if members[row]),
        )
        for row in range(CLIPS)
    )
    manifest = Manifest("epic", heads, clips)
    root = tmp_path_factory.mktemp("epic") / "cache"
    logits = {"verb": verb[:, None], "noun": noun[:, None]}
    write_cache(root, manifest, {"validation": {"rgb": logits}}, shard_rows=CLIPS)
    return CacheReader(root), manifest, logits, groups


def test_epic_s_metrics_are_those_of_the_published_scorer(drawn, epic):
    verb, noun, verbs, nouns = drawn
    reader, manifest, logits, groups = epic
    scores = score_split(
        reader.split("validation"), logits, np.ones(CLIPS, np.bool_), Averaged.of(reader.init.policy)
    )
    metrics = scores.metrics(manifest.clips)
    ids = np.stack([published_actions(verb[clip], noun[clip]) for clip in range(CLIPS)])
    right = {
        "verb": np.argsort(verb, axis=1)[:, ::-1] == verbs[:, None],
        "noun": np.argsort(noun, axis=1)[:, ::-1] == nouns[:, None],
        "action": ids == (verbs * 1000 + nouns)[:, None],
    }
    every = np.ones(CLIPS, np.bool_)
    for head, found in right.items():
        for part, members in {"validation": every, "validation/unseen": groups["unseen"]}.items():
            for k in (1, 5):
                wanted = found[members, :k].any(1).mean()
                assert metrics[part][head][f"top{k}"] == pytest.approx(wanted), (part, head, k)
        tail = f"validation/tail_{head}"
        assert metrics[tail].keys() == {head}  # the scorer's tail: verbs by verb classes, actions by either
        assert metrics[tail][head]["top1"] == pytest.approx(found[groups[f"tail_{head}"], :1].any(1).mean())
        assert metrics[tail][head]["count"] == groups[f"tail_{head}"].sum()
    both = right["verb"][:, :5].any(1) & right["noun"][:, :5].any(1)
    assert metrics["validation"]["action"]["both_top5"] == pytest.approx(both.mean())
    assert metrics["validation"]["action"]["both_top5"] > metrics["validation"]["action"]["top5"]


def test_mean_per_class_accuracy_weighs_classes_alike(drawn, epic):
    verb, _, verbs, _ = drawn
    reader, manifest, logits, _ = epic
    usable = np.arange(CLIPS) != 3
    scores = score_split(reader.split("validation"), logits, usable, Averaged.of(reader.init.policy))
    right = (verb.argmax(1) == verbs)[usable]
    wanted = np.mean([right[verbs[usable] == own].mean() for own in np.unique(verbs[usable])])
    assert scores.metrics(manifest.clips)["validation"]["verb"]["mean_class"] == pytest.approx(wanted)
    rows = list(csv.DictReader(per_class_csv([scores], manifest).splitlines()))
    own = [row for row in rows if row["head"] == "verb"]
    assert len(own) == len(np.unique(verbs[usable]))
    assert np.mean([float(row["top1"]) for row in own]) / 100 == pytest.approx(wanted, abs=1e-4)
    assert sum(int(row["clips"]) for row in own) == CLIPS - 1
    assert own[0]["name"] == f"verb {own[0]['class']}"


def test_every_accuracy_says_over_how_many_views_it_is(epic):
    reader, manifest, logits, _ = epic
    every = np.ones(CLIPS, np.bool_)
    found = score_split(reader.split("validation"), logits, every, Averaged(positions=2, crops=3))
    lines = metric_lines(found.metrics(manifest.clips))
    assert lines[-1] == "validation: each clip by the mean logits of 6 views (2 positions in time, 3 crops)"
    assert Averaged.of(reader.init.policy) == Averaged(1, 1)


def test_the_submission_is_the_challenge_s_form(drawn, tmp_path):
    verb, noun, _, _ = drawn
    ids = [f"P01_11_{row}" for row in range(CLIPS)]
    unread = verb.copy()
    unread[3] = np.nan
    write_submission(tmp_path / "s.zip", submission(ids, {"verb": unread, "noun": noun}, (2, 3, 4)))
    with zipfile.ZipFile(tmp_path / "s.zip") as archive:
        assert archive.namelist() == ["test.json"]
        content = json.loads(archive.read("test.json"))
    assert {key: content[key] for key in content if key != "results"} == {
        "version": "0.2",
        "challenge": "action_recognition",
        "sls_pt": 2,
        "sls_tl": 3,
        "sls_td": 4,
    }
    assert list(content["results"]) == ids
    row = content["results"]["P01_11_7"]
    assert row["verb"] == {str(n): pytest.approx(float(verb[7, n])) for n in range(VERBS)}
    assert row["noun"] == {str(n): pytest.approx(float(noun[7, n])) for n in range(NOUNS)}
    assert set(content["results"]["P01_11_3"]["verb"].values()) == {0}
    first = (tmp_path / "s.zip").read_bytes()
    write_submission(tmp_path / "s.zip", submission(ids, {"verb": unread, "noun": noun}, (2, 3, 4)))
    assert (tmp_path / "s.zip").read_bytes() == first


def test_other_heads_are_no_submission():
    with pytest.raises(InputError, match=r"the heads verb of 97 classes, noun of 300 classes; .* action of 2"):
        check_epic_heads([Head("action", ("a", "b"))])
