from typing import Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from mmkd.cache_tools.recipes.recipe import Recipe, load_recipe, resolved_with_origins
from mmkd.data_manifests.errors import InputError


class Flow(Recipe):
    warps: int = Field(default=5, ge=1)
    epsilon: float = 0.01
    size_px: int | None = None


class Expert(Recipe):
    name: str
    network: Literal["small3d", "swin3d_t"] = "small3d"


class Range(Recipe):
    low: int = 0
    high: int = 9

    @model_validator(mode="after")
    def _in_order(self):
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) is above high ({self.high})")
        return self


class Ranged(Recipe):
    range: Range = Range()


class Demo(Recipe):
    name: str = "demo"
    seed: int = 0
    flip: bool = False
    clip_ids: tuple[str, ...] = ()
    weights: dict[str, float] = Field(default_factory=dict)
    flow: Flow = Flow()
    student: Expert | None = None
    experts: tuple[Expert, ...] = ()


def load(tmp_path, text="", model=Demo, **options):
    path = tmp_path / "demo.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(model, files=[path], environ=options.pop("environ", {}), **options)


def fault(tmp_path, text="", **options):
    with pytest.raises(InputError) as caught:
        load(tmp_path, text, **options)
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_recipe_cannot_be_changed():
    with pytest.raises(ValidationError):
        Demo().seed = 1


def test_each_layer_wins_over_the_ones_before(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("seed: 1\nname: a\nflow:\n  warps: 2\n  epsilon: 0.5\n")
    second.write_text("seed: 2\nflow: {warps: 3}\n")
    layers = {"files": [first, second], "environ": {}}
    assert load_recipe(Demo, environ={}).seed == 0
    recipe = load_recipe(Demo, **layers)
    assert (recipe.seed, recipe.name, recipe.flow) == (2, "a", Flow(warps=3, epsilon=0.5))
    layers["environ"] = {"MMKD_SEED": "3", "MMKD_FLOW__WARPS": "4", "OTHER_SEED": "9"}
    assert load_recipe(Demo, **layers).seed == 3
    assert load_recipe(Demo, **layers).flow == Flow(warps=4, epsilon=0.5)
    layers["overrides"] = ["seed=4", "flow.warps=6", "flow.warps=7"]
    assert load_recipe(Demo, **layers).seed == 4
    assert load_recipe(Demo, **layers).flow.warps == 7
    layers["named"] = {"seed": 5, "flow.epsilon": None}
    recipe = load_recipe(Demo, **layers)
    assert (recipe.seed, recipe.flow.epsilon) == (5, 0.5)


def test_origin_of_each_value(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("flow:\n  warps: 2\n  epsilon: 1e-3\nclip_ids: [a]\nweights: {rgb: 1, flow: 2}\n")
    second.write_text("# comment\nname: b\n\nweights:\n  rgb: 3\n")
    recipe, values = resolved_with_origins(
        Demo,
        files=[first, second],
        environ={"MMKD_FLOW__WARPS": "4"},
        overrides=["student={name: x}"],
        named={"seed": 7},
    )
    assert recipe.weights == {"rgb": 3, "flow": 2}
    assert {value.path: value.origin for value in values} == {
        "name": f"{second}:2",
        "seed": "--seed",
        "flip": "default",
        "clip_ids": f"{first}:4",
        "weights.rgb": f"{second}:5",
        "weights.flow": f"{first}:5",
        "flow.warps": "MMKD_FLOW__WARPS",
        "flow.epsilon": f"{first}:3",
        "flow.size_px": "default",
        "student.name": "--set student",
        "student.network": "default",
        "experts": "default",
    }
    assert {value.path: value.value for value in values}["flow.epsilon"] == 1e-3


def test_structured_override_replaces_the_origins_below_it(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("flow: {warps: 2}")
    _, values = resolved_with_origins(Demo, files=[path], environ={}, overrides=["flow={warps: 3}"])
    assert next(v for v in values if v.path == "flow.warps").origin == "--set flow"


def test_all_faults_are_named_together(tmp_path):
    text = "sede: 1\nflow:\n  warps: 0\n  warp: 3\n  epsilon: .nan\nexperts:\n- network: vgg\n"
    lines = fault(tmp_path, text, environ={"MMKD_FLIP": "perhaps"}).splitlines()
    assert lines[0] == "7 faults in the configuration:"
    by_path = {line.split(": ")[1]: line for line in lines[1:]}
    assert by_path["sede"].startswith("  demo.yaml:1: sede: unknown key, did you mean seed? (allowed: clip_ids,")
    assert by_path["flow.warps"] == ("  demo.yaml:3: flow.warps: input should be greater than or equal to 1, got 0")
    assert by_path["flow.warp"] == (
        "  demo.yaml:4: flow.warp: unknown key, did you mean warps? (allowed: epsilon, size_px, warps)"
    )
    assert "finite" in by_path["flow.epsilon"]
    assert by_path["experts.0.name"] == "  demo.yaml:6: experts.0.name: missing, and it has no default"
    assert "'small3d' or 'swin3d_t', got 'vgg'" in by_path["experts.0.network"]
    assert by_path["flip"].startswith("  MMKD_FLIP: flip: ")


def test_settings_that_clash_are_placed_where_all_of_them_are_and_nowhere_else(tmp_path):
    """The section's own line in a file would be wrong where --set gives one of them, its whole text too long."""
    text, clash = "range:\n  low: 3\n", "range: value error, low (3) is above high (2)"
    assert fault(tmp_path, text, model=Ranged, overrides=["range.high=2"]).splitlines()[1] == f"  {clash}"
    said = fault(tmp_path, model=Ranged, overrides=["range={low: 3, high: 2}"])
    assert said.splitlines()[1] == f"  --set range: {clash}"


@pytest.mark.parametrize("text", ["student: {name: x, nam: y}", "experts: [{name: x, nam: y}]"])
def test_allowed_keys_are_listed_inside_optional_and_listed_models(tmp_path, text):
    assert "unknown key, did you mean name? (allowed: name, network)" in fault(tmp_path, text)


def test_an_unknown_variable_prints_the_nearest_name_and_not_all_of_them(tmp_path):
    message = fault(tmp_path, environ={"MMKD_FLOW__WARP": "1", "MMKD_": "2"})
    assert "MMKD_FLOW__WARP: flow.warp: unknown key, did you mean MMKD_FLOW__WARPS? (`config show` lists" in message
    assert len(message) < 400


def test_value_below_an_unknown_section_is_traced_to_where_it_was_written(tmp_path):
    message = fault(tmp_path, environ={"MMKD_FLOWS__WARPS": "1"}, overrides=["studnt.name=x"])
    assert "MMKD_FLOWS__WARPS: flows: unknown key, did you mean MMKD_FLOW__WARPS?" in message
    assert "--set studnt.name: studnt: unknown key, did you mean student?" in message


def test_allowed_variables_reach_into_named_sections(tmp_path):
    class Named(Recipe):
        experts: dict[str, Expert] = Field(default_factory=dict)
        listed: tuple[Expert, ...] = ()

    message = fault(tmp_path, model=Named, environ={"MMKD_EXPERTS__RGB__NETWORKS": "1"})
    assert "did you mean name? (allowed: name, network)" in message or "MMKD_EXPERTS__<NAME>__NETWORK?" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("flow.warps", "expected PATH=VALUE"),
        ("=3", "expected PATH=VALUE"),
        ("flow..warps=3", "expected PATH=VALUE"),
        ("flow.warps=many", "--set flow.warps: flow.warps: input should be a valid integer"),
        ("flow.wraps=3", "--set flow.wraps: flow.wraps: unknown key, did you mean warps?"),
        ("flow=3", "--set flow: flow: input should be a valid dictionary or instance of Flow, got 3"),
        ("clip_ids=[1", "--set clip_ids:1: not valid YAML"),
    ],
)
def test_bad_override_is_refused(tmp_path, override, words):
    assert words in fault(tmp_path, overrides=[override])


def test_unknown_named_flag_is_refused(tmp_path):
    assert "--sede: sede: unknown key" in fault(tmp_path, named={"sede": 1})


def test_text_of_an_option_stays_text_where_the_field_wants_text(tmp_path):
    recipe = load(tmp_path, overrides=["name=012"], environ={"MMKD_STUDENT__NAME": "12"})
    assert recipe.name == "012"
    assert recipe.student == Expert(name="12")
    assert load(tmp_path, overrides=["name=null", "flow.size_px=null"]).name == "null"
    assert load(tmp_path, overrides=["name=: @x"]).name == ": @x"
    assert load(tmp_path, overrides=["name="]).name == ""


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-3", 1e-3), ("1E5", 1e5), ("-2e+3", -2000.0), ("+.5", 0.5), ("3.", 3.0), ("7", 7.0)],
)
def test_numbers_mean_what_they_look_like(tmp_path, written, value):
    assert load(tmp_path, f"flow: {{epsilon: {written}}}").flow.epsilon == value
    assert load(tmp_path, overrides=[f"flow.epsilon={written}"]).flow.epsilon == value


def test_plain_text_that_yaml_1_1_would_convert_stays_text(tmp_path):
    recipe = load(tmp_path, "clip_ids: [012345, no, on, 12:30, 2024-01-01, 1_000, 0x1f, 1e]")
    assert recipe.clip_ids == ("012345", "no", "on", "12:30", "2024-01-01", "1_000", "0x1f", "1e")


def test_number_where_text_is_wanted_asks_for_quotes(tmp_path):
    assert fault(tmp_path, "clip_ids:\n- 80962\n").endswith(
        "demo.yaml:1: clip_ids.0: input should be a valid string, got 80962; put quotes around it"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nflow: [1\nname: x", "demo.yaml:3: not valid YAML"),
        ("seed: 1\n\tname: x", "demo.yaml:2: not valid YAML"),
        ("seed: 1\nname: a\nseed: 2", "demo.yaml:3: key seed already stands in line 1"),
        ("flow:\n  warps: 1\n  warps: 1", "demo.yaml:3: key flow.warps already stands in line 2"),
        ("experts:\n- name: a\n  name: b", "demo.yaml:3: key name already stands in line 2"),
        ("flow: &f {warps: 1}", "demo.yaml:1: anchors"),
        ("a: 1\nb: *f", "demo.yaml:2: anchors"),
        ("seed: !!python/object/apply:os.getpid []", "demo.yaml:1: could not determine a constructor"),
        ("- seed", "demo.yaml:1: a recipe is `key: value` lines"),
        ("seed: 1\n---\nseed: 2", "demo.yaml:2: not valid YAML: but found another document"),
        ("5: x", "demo.yaml:1: a key must be text; put quotes around '5'"),
        ("<<: {seed: 1}", "demo.yaml:1: <<: unknown key"),
        ("name: \x00", "demo.yaml: not valid YAML"),
        ("flow:", "demo.yaml:1: flow: input should be a valid dictionary or instance of Flow, got None"),
        ("seed: " + "9" * 5000, "demo.yaml: Exceeds the limit"),
        ("name: " + "[" * 1200 + "]" * 1200, "demo.yaml"),
    ],
)
def test_bad_file_is_refused_with_its_line(tmp_path, text, words):
    assert words in fault(tmp_path, text)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the recipe .*none\.yaml: No such file"):
        load_recipe(Demo, files=[tmp_path / "none.yaml"], environ={})
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"name: \xe9")
    with pytest.raises(InputError, match=r"latin\.yaml: it is not UTF-8"):
        load_recipe(Demo, files=[latin], environ={})
    latin.write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(InputError, match="larger than"):
        load_recipe(Demo, files=[latin], environ={})


def test_empty_file_byte_order_mark_and_crlf(tmp_path):
    assert load(tmp_path, "# nothing\n") == Demo()
    path = tmp_path / "windows.yaml"
    path.write_bytes(b"\xef\xbb\xbfseed: 4\r\nname: w\r\n")
    assert load_recipe(Demo, files=[path], environ={}) == Demo(seed=4, name="w")
