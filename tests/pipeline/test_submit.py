"""`submit`: the scripts that it prints, their words, and what it refuses before anything is submitted."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.helpers.command_lines import parse
from tests.helpers.commands import ENVIRONMENT
from tests.helpers.in_process import call, call_ok, refused

DATA = ("--manifest", "the manifest.jsonl", "--videos", "v")
BUILD = ("mmkd-cache", "submit", "build", "-c", "a recipe.yaml", *DATA, "--expert", "e/rgb", "--expert", "e/it's")
CLUSTER = {"partition": "gpu", "time": "12:00:00", "gpus": 1, "tasks": 4, "sbatch": ["--constraint=a100"]}
PLACES = ("the manifest.jsonl", "v", "e/rgb", "e/it's")
EXPERTS = {"rgb": {"modality": "rgb"}, "two words": {"modality": "flow"}}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = {"cluster": CLUSTER, "experts": EXPERTS, "data": {"workers": 6}}
    Path("a recipe.yaml").write_text(yaml.safe_dump(recipe))
    Path("student.yaml").write_text(yaml.safe_dump({"cluster": {"nodes": 2, "gpus": 8, "memory": "500G"}}))


def make(place: str) -> None:
    Path(place).parent.mkdir(exist_ok=True)
    Path(place).touch() if place.endswith(".jsonl") else Path(place).mkdir()


def scripts_of(*arguments: object) -> list[str]:
    """Return the scripts that a command prints; bash takes each of them."""
    found = json.loads(call_ok(*arguments, "--print", "--json"))["scripts"]
    assert call_ok(*arguments, "--print") == "\n".join(found)
    for script in found:
        subprocess.run(["/bin/bash", "-n"], input=script, text=True, check=True)
        assert max(map(len, script.splitlines())) < 160
    return found


def words_of(script: str, program: str) -> list[str]:
    """Return the words of the script's command, which the command itself takes."""
    (line,) = re.findall(rf"^(?:srun [^\n]*)?({program} .*) &$", script.replace("\\\n", " "), re.MULTILINE)
    parse(line)
    return shlex.split(line)


def sbatch_lines(script: str) -> set[str]:
    return set(re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE))


def test_a_build_s_script_has_the_very_words_that_were_typed_and_what_the_recipe_asks_for(tmp_path):
    build, verify = scripts_of(*BUILD, "-o", "cache dir", "--views", "8", "--retry-unusable", "--gpus", 0)
    assert words_of(build, "mmkd-cache") == [
        *("mmkd-cache", "build", "-c", "a recipe.yaml", *DATA, "--expert", "e/rgb", "--expert", "e/it's"),
        *("-o", "cache dir", "--views", "8", "--retry-unusable"),
    ]
    wanted = {"--partition=gpu", "--time=12:00:00", "--array=0-3", "--cpus-per-task=7", "--constraint=a100"}
    assert wanted < sbatch_lines(build)
    assert not any("gpus" in line for line in sbatch_lines(build))
    assert f"\ncd {shlex.quote(str(tmp_path))} || exit 2\n" in build
    assert verify.endswith("\nmmkd-cache finalize 'cache dir' && mmkd-cache verify 'cache dir'\n")
    assert "--dependency=afterok:ID_OF_mmkd-build" in sbatch_lines(verify)
    assert not any("array" in line or "signal" in line for line in sbatch_lines(verify))
    assert len(scripts_of(*BUILD, "-o", "c", "--no-verify")) == 1


def test_options_win_over_the_recipe_and_sbatch_options_add_to_it(monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "MMKD_VIEWS__SIZE_PX", "32")
    own = ("--partition", "other", "--tasks", 9, "--at-once", 2, "--after", 5, "--after", 6, "--sbatch=--qos=low")
    build, _ = scripts_of(*BUILD, "-o", "c", *own)
    wanted = {"--partition=other", "--array=0-8%2", "--dependency=afterok:5:6", "--qos=low", "--constraint=a100"}
    assert wanted < sbatch_lines(build)
    assert "\nexport MMKD_VIEWS__SIZE_PX=32\n" in build


def test_the_number_of_tasks_may_be_what_plan_said():
    Path("plan.json").write_text(json.dumps({"tasks": 17}))
    assert "--array=0-16" in sbatch_lines(scripts_of(*BUILD, "-o", "c", "--plan", "plan.json")[0])
    said = refused(*BUILD, "-o", "c", "--plan", "plan.json", "--tasks", 2)
    assert "--plan and --tasks both say how many tasks" in said
    Path("plan.json").write_text("[]")
    assert "not what `mmkd-cache plan --json` printed" in refused(*BUILD, "-o", "c", "--plan", "plan.json")


def test_experts_are_taught_by_a_task_each(tmp_path):
    teach = ("mmkd-cache", "submit", "teach", "-c", "a recipe.yaml", *DATA, "-o", "some experts", "--seed", 3)
    (script,) = scripts_of(*teach)
    assert "\nnames=(rgb 'two words')\nname=${names[$SLURM_ARRAY_TASK_ID]}\n" in script
    assert "--array=0-1" in sbatch_lines(script)
    stub = tmp_path / "mmkd-cache"
    stub.write_text('#!/bin/bash\nprintf "%s\\n" "$@" > words\n')
    stub.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_ID": "1"}
    subprocess.run(["/bin/bash", "-c", script], env=environment, check=True)
    words = ["teach", "two words", "-c", "a recipe.yaml", *DATA, "--seed", "3", "-o", "some experts/two words"]
    assert Path("words").read_text().splitlines() == words
    (script,) = scripts_of(*teach[:3], "rgb", *teach[3:], "--gpus", 2)
    assert "\nnames=(rgb)\n" in script
    assert '\nsrun --kill-on-bad-exit=0 --cpus-per-task=7 mmkd-cache teach "$name" ' in script
    assert "the recipe has no expert 'rbg'" in refused(*teach[:3], "rbg", *teach[3:])


def test_flow_takes_of_a_recipe_its_cluster_alone():
    flow = ("mmkd-cache", "submit", "flow", "a video.mp4", "v", "-b", 15, "--enlarge", "--short-side", 64)
    (script,) = scripts_of(*flow, "-c", "a recipe.yaml", "-o", "out")
    assert words_of(script, "mmkd-cache") == [
        *("mmkd-cache", "flow", "a video.mp4", "v", "-o", "out", "-b", "15", "--short-side", "64", "--enlarge")
    ]
    assert {"--partition=gpu", "--array=0-3"} < sbatch_lines(script)
    assert "flow has options and no recipe" in refused(*flow, "-o", "out", "--tasks", 2, "--set", "flow.step=2")
    assert "one HDF5 file has one writer" in refused(*flow, "-o", "out.h5", "--tasks", 2)
    assert "how many tasks? Give --tasks N, or cluster.tasks" in refused(*flow, "-o", "out")


def test_a_student_trains_with_a_process_for_each_gpu_of_each_node():
    train = ("mmkd-student", "submit", "-c", "student.yaml", *DATA, "--cache", "c", "-o", "r", "--temperature", 4)
    (script,) = scripts_of(*train)
    assert words_of(script, "mmkd-student") == [
        *("mmkd-student", "train", "-c", "student.yaml", *DATA, "--cache", "c", "-o", "r", "--temperature", "4.0")
    ]
    assert {"--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--mem=500G"} < sbatch_lines(script)
    assert "\n# One student, trained by 16 processes.\n" in script
    assert "\nsrun --kill-on-bad-exit=0 --cpus-per-task=3 mmkd-student train " in script
    (alone,) = scripts_of(*train, "--nodes", 1, "--gpus", 1)
    assert "srun" not in alone


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--gpus", 4), "cluster.gpus 4: a task of build is one process on one GPU; ask for more tasks"),
        (("--time", "12h"), r"--time: cluster.time: .*'12h'"),
        (("--sbatch=--array=0-3"), "the script has its own --array"),
        (("--set", "cluster.partitoin=x"), "did you mean partition"),
        (("--set", "build.viws=3"), "did you mean views"),
        (("--after", "x"), "--after x: give the number of a job"),
        (("-o", "file.txt"), "file.txt is a file, not a cache"),
    ],
)
def test_what_cannot_be_submitted_is_one_line_and_nothing_is_printed(options, said):
    Path("file.txt").write_text("")
    options = (options,) if isinstance(options, str) else options
    assert re.search(said, refused(*BUILD, "-o", "c", "--print", *options))


def test_without_slurm_there_is_one_line_and_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setitem(ENVIRONMENT, "PATH", str(tmp_path))
    for place in PLACES:
        assert "there is no such file or folder here" in refused(*BUILD, "-o", "c")
        make(place)
    said = refused(*BUILD, "-o", "c")
    assert said == (
        "error: there is no Slurm on this machine (no sbatch): submit from a machine of the cluster, or --print "
        "the script"
    )


def test_what_fails_at_once_leaves_nothing_submitted(monkeypatch, tmp_path):
    """Slurm takes the first job and refuses the second: the first is cancelled (by stand-ins)."""
    sbatch = '#!/bin/bash\n[ -e once ] && { echo "sbatch: error: no" >&2; exit 1; }; touch once; echo 41\n'
    for name, text in {"sbatch": sbatch, "scancel": '#!/bin/bash\necho "$@" > cancelled\n'}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setitem(ENVIRONMENT, "PATH", f"{tmp_path}:/usr/bin:/bin")
    for place in PLACES:
        make(place)
    said = refused(*BUILD, "-o", "c")
    assert said.endswith("Slurm refused it: no; what was submitted before it was cancelled again (job 41)")
    assert Path("cancelled").read_text() == "41\n"
    Path("once").unlink()
    result = call(*BUILD, "-o", "c", "--no-verify", "--json")
    assert json.loads(result.out) == {"jobs": {"mmkd-build": "41"}, "follow": ["mmkd-cache status c"]}
