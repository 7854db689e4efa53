"""`make bench` runs every benchmark that this machine can run, and says why it passes over another."""

import pytest

from tests.benchmarks import quick
from tests.helpers.places import TESTS

SCRIPTS = sorted(path.name for path in quick.FOLDER.glob("*.py") if path.name != "quick.py")


def test_each_script_is_run_once():
    assert sorted(benchmark.script for benchmark in quick.BENCHMARKS) == SCRIPTS


def test_what_cannot_run_here_is_skipped_with_its_reason_and_a_failure_counts(monkeypatch, tmp_path, capfd):
    (tmp_path / "good.py").write_text("print('figures')")
    (tmp_path / "bad.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(quick, "FOLDER", tmp_path)
    absent = quick.Benchmark("absent.py", (), lambda: "it needs a thing")
    monkeypatch.setattr(quick, "BENCHMARKS", (quick.Benchmark("good.py", ()), absent))
    assert quick.main() == 0
    said = capfd.readouterr().out
    assert "figures" in said
    assert "== absent.py skipped: it needs a thing" in said
    monkeypatch.setattr(quick, "BENCHMARKS", (quick.Benchmark("bad.py", ()), quick.Benchmark("good.py", ())))
    assert quick.main() == 1
    said = capfd.readouterr()
    assert "failed: bad.py" in said.err
    assert "figures" in said.out


@pytest.mark.parametrize("benchmark", quick.BENCHMARKS, ids=lambda benchmark: benchmark.script)
def test_the_options_are_the_script_s(benchmark):
    text = (quick.FOLDER / benchmark.script).read_text()
    if "place_options(" in text:  # which has those that several scripts share
        text += (TESTS / "helpers" / "demo_place.py").read_text()
    assert all(f'add_argument("{option}"' in text for option in benchmark.options if option.startswith("--"))
