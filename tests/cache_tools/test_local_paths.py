"""Folders and files of this machine on a command line; only a cache may be a URL elsewhere."""

from mmkd.data_manifests.manifest_file import load_manifest
from tests.helpers.in_process import call, call_ok


def test_a_folder_is_named_by_a_path_or_a_file_url_and_no_other_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b").mkdir()
    for where in ("s3://bucket/flow", "https://host/flow"):
        result = call("mmkd-cache", "flow", "a b", "-o", where)
        assert (result.code, "is a URL; name a path of this machine" in result.err) == (2, True)
    manifest = ("manifest", "something-something", "--split", f"train={tmp_path / 't.json'}")
    (tmp_path / "t.json").write_text('[{"id": "1", "label": "a", "template": "A [b]", "placeholders": []}]')
    (tmp_path / "l.json").write_text('{"A b": "0", "C": "1"}')
    here = f"file://{tmp_path}"
    call_ok("mmkd-cache", *manifest, "--labels", f"{here}/l.json", "-o", f"{here}/a b/m.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a b", "l.json", "t.json"]
    assert load_manifest(tmp_path / "a b" / "m.jsonl").clips[0].clip_id == "1"
