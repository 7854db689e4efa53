"""The two commands as a user meets them: help, version, origins of values, what goes to stdout or to stderr."""

import json
import re
import subprocess
import sys
import tomllib

import click
import pytest

from mmkd.cache_tools.recipes.yaml_text import parse_yaml
from mmkd.pipeline.recipe import TeacherRecipe
from mmkd.student.recipes.student import StudentRecipe
from tests.helpers.command_lines import ALL, parse
from tests.helpers.commands import ENVIRONMENT
from tests.helpers.in_process import MODULES, call, call_ok, refused
from tests.helpers.places import ROOT

DATA = ("--manifest", "m", "--videos", "v")
HEAVY = ("torch", "torchvision", "zarr", "h5py", "cv2", "decord")


@pytest.mark.parametrize("name", ALL)
def test_every_command_and_option_has_help(name):
    command = ALL[name]
    assert command.help, name
    assert command.help.split("\n")[0].endswith((".", ":")), "help is sentences"
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts[-1]} has no help"


@pytest.mark.parametrize("name", ALL)
def test_help_comes_by_h_too_is_never_cut_and_ends_with_an_example_that_the_command_takes(name):
    shown = call_ok(*name.split(), "-h")
    assert shown == call_ok(*name.split(), "--help")
    assert "..." not in re.sub(r"\[?[A-Z]+\]?\.\.\.", "", shown), "three points but for arguments that repeat"
    _, found, examples = shown.partition("  Example")
    assert found, "help without an example"
    assert max(map(len, examples.splitlines())) <= 80
    lines = examples.partition("\n")[2].replace("\\\n", " ").splitlines()
    for line in lines:
        assert line.split()[: len(name.split())] == name.split() or isinstance(ALL[name], click.Group)
        parse(line.split(" > ")[0])


def test_a_group_lists_the_whole_first_sentence_of_each_command():
    shown = " ".join(call_ok("mmkd-cache", "-h").split())
    for name, command in ALL.items():
        if name.startswith("mmkd-cache ") and name.count(" ") == 1:
            assert " ".join(command.help.split("\n\n")[0].split()).split(". ")[0].rstrip(".") in shown


def loaded_after(*arguments: object) -> tuple[int, set[str]]:
    """Run a command in a fresh process; return its exit code and which heavy packages it had imported."""
    code = (
        "import atexit, importlib, sys\n"
        f"atexit.register(lambda: print('LOADED', *[m for m in {HEAVY} if m in sys.modules], file=sys.stderr))\n"
        "importlib.import_module(sys.argv.pop(1)).main()\n"
    )
    texts = [str(argument) for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, MODULES[texts[0]], *texts[1:]],
        capture_output=True,
        text=True,
        timeout=60,
        env=ENVIRONMENT,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("LOADED")]
    return done.returncode, set(lines[-1].split()[1:])


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("mmkd-cache", "--help"), 0),
        (("mmkd-student", "train", "--help"), 0),
        (("mmkd-cache", "--version"), 0),
        (("mmkd-cache", "config", "schema"), 0),
        (("mmkd-student", "config", "example", "demo"), 0),
        (("mmkd-cache", "build", "--expert", "e", "-o", "c", "--set", "viws.frames=8"), 2),
        (("mmkd-cache", "teach", "rgb", "-o", "e", "-c", "no-such.yaml"), 2),
        (("mmkd-cache", "teach", "audio", "-o", "e", *DATA), 2),
        (("mmkd-student", "train", "--cache", "c", "-o", "r", "--set", "train.epochs=0"), 2),
        (("mmkd-student", "train", "--cache", "c", "-o", "r", *DATA, "--fresh-views"), 2),
        (("mmkd-student", "train", "--cache", "c", "-o", "r", "--missing", "guess"), 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_help_and_configuration_errors_import_nothing_heavy(arguments, code):
    assert loaded_after(*arguments) == (code, set())


def test_version_is_the_package_s():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for program in MODULES:
        assert call_ok(program, "--version").split()[-1] == version


def test_config_show_names_the_origin_of_every_value(tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data:\n  workers: 1\nviews:\n  frames: 4\n  size_px: 64\nbuild: {views: 3}\n")
    monkeypatch.setitem(ENVIRONMENT, "MMKD_VIEWS__SIZE_PX", "32")
    options = ["-c", recipe, "--set", "build.views=5", "--manifest", "m.jsonl", "--videos", "v"]
    lines = dict(line.split(": ", 1) for line in call_ok("mmkd-cache", "config", "show", *options).splitlines())
    assert lines["views.frames"] == f"4  # {recipe}:4"
    assert lines["views.size_px"] == "32  # MMKD_VIEWS__SIZE_PX"
    assert lines["build.views"] == "5  # --set build.views"
    assert lines["data.manifest"] == '"m.jsonl"  # --manifest'
    assert lines["flow.preset"] == '"default"  # default'
    data = ["--manifest", "m", "--videos", "v"]
    shown = call_ok("mmkd-student", "config", "show", *data, "--set", "loss.temperature=4")
    assert "loss.temperature: 4.0  # --set loss.temperature\n" in shown


def test_a_variable_of_one_command_does_not_disturb_the_other(monkeypatch):
    stage_one, stage_two = set(TeacherRecipe.model_fields), set(StudentRecipe.model_fields)
    assert TeacherRecipe.of_other_commands == stage_two - stage_one
    assert StudentRecipe.of_other_commands == stage_one - stage_two
    monkeypatch.setitem(ENVIRONMENT, "MMKD_VIEWS__SIZE_PX", "32")  # of both
    monkeypatch.setitem(ENVIRONMENT, "MMKD_BUILD__VIEWS", "3")
    monkeypatch.setitem(ENVIRONMENT, "MMKD_LOSS__TEMPERATURE", "3")
    shown = call_ok("mmkd-cache", "config", "show", *DATA)
    assert "views.size_px: 32  # MMKD_VIEWS__SIZE_PX\nviews.scale" in shown
    assert "build.views: 3  # MMKD_BUILD__VIEWS\n" in shown
    shown = call_ok("mmkd-student", "config", "show", *DATA)
    assert "views.size_px: 32  # MMKD_VIEWS__SIZE_PX\n" in shown
    assert "loss.temperature: 3.0  # MMKD_LOSS__TEMPERATURE\n" in shown
    assert "build" not in shown
    monkeypatch.setitem(ENVIRONMENT, "MMKD_VIEW__SIZE_PX", "32")
    for program in MODULES:
        assert "MMKD_VIEW__SIZE_PX: view: unknown key" in refused(program, "config", "show", *DATA)


def test_all_faults_of_a_recipe_are_reported_with_their_lines(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("views:\n  frames: none\n  sise_px: 56\nbuild:\n  views: 0\n")
    error = refused("mmkd-cache", "config", "show", "-c", recipe, "--manifest", "m", "--videos", "v")
    assert error.startswith("error: 3 faults in the configuration:")
    for line, path in ((2, "views.frames"), (3, "views.sise_px"), (5, "build.views")):
        assert f"{recipe}:{line}: {path}: " in error
    assert "did you mean size_px?" in error


@pytest.mark.parametrize("data_set", ["demo", "something-something", "epic-kitchens"])
def test_example_recipes_are_complete_and_valid(data_set, tmp_path):
    for program, model in (("mmkd-cache", TeacherRecipe), ("mmkd-student", StudentRecipe)):
        text = call_ok(program, "config", "example", data_set)
        values, _ = parse_yaml(text, "example")
        recipe = model.model_validate(values | {"data": {"manifest": "m", "videos": "v"}})
        if data_set != "demo":
            experts = recipe.experts.values() if isinstance(recipe, TeacherRecipe) else [recipe]
            for expert in experts:  # METHOD: the authors' optimisation
                train = expert.train
                assert (train.epochs, train.batch_size, train.warmup_epochs) == (30, 16, 3)
                assert (train.learning_rate, train.weight_decay, train.clip_norm) == (1e-4, 0.02, 5)
                assert train.network == "swin3d_t"
            if isinstance(recipe, TeacherRecipe):
                heard = ["audio"] if data_set == "epic-kitchens" else []
                assert [e.modality for e in recipe.experts.values()] == ["rgb", "flow", "boxes", *heard]
                views = recipe.views
                dense = (8, 224, "dense", pytest.approx(8 / 60, abs=1e-5))
                uniform = (16, 224, "uniform", None)
                assert (views.frames, views.size_px, views.sampling, views.seconds_between_frames) == (
                    uniform if data_set == "something-something" else dense
                )


def test_json_is_one_object_on_stdout_and_progress_on_stderr(tiny, tmp_path):
    built = call("mmkd-cache", "build", *tiny.stage_one, *tiny.experts, "-o", tiny.root / "cache", "--json")
    assert built.code == 0, built.err
    assert json.loads(built.out)["skipped_shards"] > 0
    assert "probing videos" in built.err
    inspected = call("mmkd-cache", "inspect", tiny.root / "cache", "--json")
    assert set(json.loads(inspected.out)["splits"]) == {"train", "standard", "compositional"}
    taught = call("mmkd-cache", "teach", "boxes", *tiny.stage_one, "-o", tiny.root / "experts" / "boxes", "--json")
    assert json.loads(taught.out)["trained"] is False
    short = ["--set", "train.epochs=1", "--set", "train.warmup_epochs=0", "--weights", "uniform"]
    trained = call("mmkd-student", "train", *tiny.stage_two, *short, "-o", tmp_path / "run", "--json")
    assert trained.code == 0, trained.err
    assert json.loads(trained.out)["metrics"]["standard"]["action"]["count"] == 14
    assert "training: 14/14 clips" in trained.err
    uniform = ["--set", "teacher.weights=uniform"]
    evaluated = call("mmkd-student", "evaluate", *tiny.stage_two, *uniform, tmp_path / "run", "--json")
    assert json.loads(evaluated.out) == json.loads(trained.out)["metrics"]
    manifest = ["--cache", tiny.root / "cache", "--manifest", tiny.root / "manifest.jsonl"]
    compared = call("mmkd-student", "compare", *manifest, "--run", f"student={tmp_path / 'run'}", "--json")
    rows = json.loads(compared.out)["rows"]
    assert list(rows) == ["rgb expert", "flow expert", "boxes expert", "teacher", "student"]
    for result in (built, inspected, taught, trained, evaluated, compared):
        assert not any(line.startswith("{") for line in result.err.splitlines()), "the result is on stdout alone"


def test_without_json_a_build_prints_lines_for_people(tiny):
    built = call_ok("mmkd-cache", "build", *tiny.stage_one, *tiny.experts, "-o", tiny.root / "cache")
    assert built.startswith(f"{tiny.root / 'cache'}: 0 shards built")


def test_undefined_numbers_are_null_in_json(capsys):
    from mmkd.cache_tools.process.command import print_result

    print_result({"top1": float("nan"), "parts": [1.5, float("inf")]}, as_json=True, lines=[])
    assert json.loads(capsys.readouterr().out) == {"top1": None, "parts": [1.5, None]}
