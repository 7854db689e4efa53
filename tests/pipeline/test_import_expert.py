"""`mmkd-cache import-expert`: somebody's checkpoint becomes an expert that a build takes like a taught one."""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.frames.clip_set import ClipSet
from mmkd.cache_tools.recipes.recipe import load_recipe
from mmkd.cache_tools.views.canonical import canonical_view
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.manifest import Head
from mmkd.pipeline.experts.expert import load_expert, read_card
from mmkd.pipeline.imports.head_sources import head_sources
from mmkd.pipeline.imports.import_expert import matched_heads
from mmkd.pipeline.recipe import TeacherRecipe
from mmkd.student.key_maps.key_maps import map_weights
from mmkd.student.networks.networks import headed_network
from tests.helpers.epic_world import write_epic
from tests.helpers.in_process import call, call_ok, refused
from tests.helpers.original_swin import draw_swin, original_swin
from tests.helpers.original_tsm import draw_tsm, original_tsm

EXTRA = "A class of the checkpoint alone"


def stage_one(quick):
    data = ("--manifest", quick.root / "manifest.jsonl", "--videos", quick.root / "videos", "--workers", 0)
    return ("-c", quick.root / "teacher.yaml", *data)


@pytest.fixture(scope="module")
def original(quick, tmp_path_factory):
    """A checkpoint as MMAction writes it, its class list in an order of its own, and what it computes."""
    folder = tmp_path_factory.mktemp("original")
    classes = json.loads((quick.root / "manifest.jsonl").read_text().splitlines()[0])["heads"]["action"]
    names = [EXTRA, *reversed(classes)]
    generator = torch.Generator().manual_seed(5)
    backbone = draw_swin(seed=4)
    state = {f"backbone.{name}": value for name, value in backbone.items()}
    state["cls_head.fc_cls.weight"] = torch.randn(len(names), 768, generator=generator)
    state["cls_head.fc_cls.bias"] = torch.randn(len(names), generator=generator)
    torch.save(
        {"state_dict": state, "meta": {"epoch": 30}, "message_hub": {"x": np.float64(1)}}, folder / "swin.pth"
    )
    (folder / "label_map.txt").write_text("\n".join(f"[{name}]" for name in names))
    return Original(folder, classes, names, backbone, state)


class Original:
    def __init__(self, folder: Path, classes, names, backbone, state):
        self.folder, self.classes, self.names, self.backbone, self.state = folder, classes, names, backbone, state
        self.file = folder / "swin.pth"

    def options(self, quick):
        """Options of the command, but for -o."""
        swin = ("--modality", "rgb", "--network", "swin3d_t")
        return (self.file, *swin, "--classes", self.folder / "label_map.txt", *stage_one(quick))

    def logits(self, pixels):
        """Return (classes,) by the manifest's order of a view uint8 (T, S, S, 3), with ImageNet's numbers."""
        mean, std = (torch.tensor(v).view(1, 3, 1, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        clips = (torch.from_numpy(pixels).permute(3, 0, 1, 2)[None].float() / 255 - mean) / std
        all_classes = original_swin(self.backbone, clips) @ self.state["cls_head.fc_cls.weight"].T
        all_classes = (all_classes + self.state["cls_head.fc_cls.bias"])[0]
        return np.array([all_classes[self.names.index(name)] for name in self.classes])


@pytest.fixture(scope="module")
def imported(quick, original):
    """The folder of the imported expert, and what the command said."""
    out = original.folder / "rgb"
    return out, call_ok("mmkd-cache", "import-expert", *original.options(quick), "-o", out)


def test_the_report_accounts_for_every_key_and_class(original, imported):
    out, said = imported
    assert "expert 'rgb' imported" in said
    assert f"swin.pth: {len(original.state)} keys used, names of 'video-swin', weights at 'state_dict'" in said
    count = len(original.classes)
    assert f"head action: {count} classes matched by name among {count + 1} of 'head'" in said
    card = read_card(out)
    assert card.training["imported"]["map"] == "video-swin"
    assert card.heads == {"action": original.classes}
    assert card.held_out["fraction"] == 0  # clips that it did not train on are not known


def test_a_cache_holds_the_logits_of_the_original_on_the_same_views(
    quick, original, imported, tmp_path, one_thread
):
    out, _ = imported
    call_ok("mmkd-cache", "build", *stage_one(quick), "--expert", out, "-o", tmp_path / "cache")
    reader = CacheReader(tmp_path / "cache")
    named = {"data.manifest": str(quick.root / "manifest.jsonl"), "data.videos": str(quick.root / "videos")}
    recipe = load_recipe(TeacherRecipe, files=[quick.root / "teacher.yaml"], named=named | {"data.workers": 0})
    clip_set, expert = ClipSet(recipe.data), load_expert(out, torch.device("cpu"))
    table = reader.split("train")
    for row, number in ((0, 0), (5, 1), (11, 0)):
        clips = [clip for clip in clip_set.manifest.split("train") if clip.clip_id == table.clip_ids[row]]
        (item,) = clip_set.probe(clips)
        view = table.view(row, number)
        frames = clip_set.source.read(item.clip.video, np.arange(item.facts.frame_count), item.video)
        pixels = canonical_view(frames, view, recipe.views.size_px)
        expected = original.logits(pixels)
        exact = expert.logits({"rgb": torch.from_numpy(pixels)[None]})["action"][0]
        np.testing.assert_allclose(exact, expected, rtol=1e-5, atol=1e-5 * np.ptp(expected))
        stored = reader.logits("train", "rgb")["action"][row, number]
        np.testing.assert_allclose(stored, expected, atol=2e-3 * np.ptp(expected))
        assert np.ptp(expected) > 5, "the comparison must not be between constants"
    assert reader.held_out is None


def test_the_same_import_again_changes_nothing_and_another_is_refused(quick, original, imported, tmp_path):
    out, _ = imported
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert "was there already" in call_ok("mmkd-cache", "import-expert", *original.options(quick), "-o", out)
    state = {name: value + 1 for name, value in original.state.items()}
    state |= {name: value for name, value in original.state.items() if name.endswith("index")}
    torch.save(state, tmp_path / "other.pth")
    other = (tmp_path / "other.pth", *original.options(quick)[1:])
    message = refused("mmkd-cache", "import-expert", *other, "-o", out)
    assert "holds an expert of another source" in message
    taught = quick.root / "experts" / "rgb"
    assert "made with another recipe" in refused(
        "mmkd-cache", "import-expert", *original.options(quick), "-o", taught
    )
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_build_warns_of_clips_that_the_network_was_trained_on(quick, original, imported, tmp_path):
    manifest = (quick.root / "manifest.jsonl").read_text().splitlines()[1:]
    clips = [json.loads(line) for line in manifest]
    seen = [clip["clip_id"] for clip in clips if clip["split"] == "standard"][:3]
    (tmp_path / "seen.txt").write_text("\n".join(seen))
    out = tmp_path / "rgb"
    options = (*original.options(quick), "--trained-on", tmp_path / "seen.txt", "--licence", "CC BY-NC 4.0")
    call_ok("mmkd-cache", "import-expert", *options, "-o", out)
    assert read_card(out).training["imported"]["licence"] == "CC BY-NC 4.0"
    built = call("mmkd-cache", "build", *stage_one(quick), "--expert", out, "-o", tmp_path / "cache")
    assert built.code == 0
    assert "LEAK: expert 'rgb' was trained on 3 of 14 clips of split 'standard' (seen.txt)" in built.err
    assert (out / "weights.safetensors").read_bytes() == (imported[0] / "weights.safetensors").read_bytes()
    empty = tmp_path / "none.txt"
    empty.write_text("")
    text = refused("mmkd-cache", "import-expert", *options[:-4], "--trained-on", empty, "-o", tmp_path / "new")
    assert "none.txt names no clip" in text
    assert not (tmp_path / "new").exists()


def test_a_dry_run_reports_and_writes_nothing(quick, original, tmp_path):
    said = call_ok(
        "mmkd-cache", "import-expert", *original.options(quick), "-o", tmp_path / "rgb", "--dry-run", "--json"
    )
    report = json.loads(said)
    assert (report["used"], report["left_over"], report["computed"]) == (len(original.state), [], [])
    assert list(tmp_path.iterdir()) == []


def without(name):
    return lambda state: state.pop(name)


def with_value(name, value):
    return lambda state: state.update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("backbone.norm.bias"), r"swin3d_t: 1 missing \(norm\.bias\)"),
        (with_value("backbone.norm.extra", torch.ones(1)), r"1 unexpected \(norm\.extra\)"),
        (with_value("backbone.norm.bias", torch.ones(3)), "that is the closest one"),
        (
            with_value("backbone.norm.bias", torch.full((768,), float("nan"))),
            r"not finite numbers: backbone\.norm\.bias",
        ),
        (without("cls_head.fc_cls.weight"), "no whole classifier"),
        (
            lambda state: [state.pop(key) for key in list(state) if "cls_head" in key],
            "the checkpoint has no classifier",
        ),
        (with_value("cls_head.fc_cls.weight", torch.ones(3, 768)), "no whole classifier"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_written(quick, original, tmp_path, change, message):
    state = dict(original.state)
    change(state)
    torch.save(state, tmp_path / "w.pth")
    options = (tmp_path / "w.pth", *original.options(quick)[1:])
    text = refused("mmkd-cache", "import-expert", *options, "-o", tmp_path / "out" / "rgb")
    assert "\n" not in text
    assert re.search(message, text), text
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]


def test_the_closest_network_is_named_for_a_checkpoint_of_another(quick, original, tmp_path):
    from torchvision.models.video import r3d_18

    torch.save({"model": r3d_18(weights=None).state_dict()}, tmp_path / "w.pth")
    options = (tmp_path / "w.pth", *original.options(quick)[1:])
    (tmp_path / "k400.txt").write_text(
        "\n".join(map(str, range(400 - len(original.names)))) + "\n" + "\n".join(original.names)
    )
    text = refused(
        "mmkd-cache", "import-expert", *options, "--classes", tmp_path / "k400.txt", "-o", tmp_path / "rgb"
    )
    assert "has a class list already" in text
    options = [
        tmp_path / "k400.txt" if option == original.folder / "label_map.txt" else option for option in options
    ]
    text = refused("mmkd-cache", "import-expert", *options, "-o", tmp_path / "rgb")
    assert "not those of swin3d_t" in text
    assert "the closest is r3d_18: name it with --network" in text
    options[options.index("swin3d_t")] = "r3d_18"
    assert "expert 'rgb' imported" in call_ok("mmkd-cache", "import-expert", *options, "-o", tmp_path / "rgb")


@pytest.mark.parametrize("count", [3, 200])
def test_a_class_list_of_another_length_is_refused(quick, original, tmp_path, count):
    (tmp_path / "classes.txt").write_text("\n".join(map(str, range(count))))
    options = [
        tmp_path / "classes.txt" if option == original.folder / "label_map.txt" else option
        for option in original.options(quick)
    ]
    text = refused("mmkd-cache", "import-expert", *options, "-o", tmp_path / "rgb")
    assert f"classes.txt has {count} classes, but the classifier 'head'" in text
    assert f"has {len(original.names)} rows" in text


def test_a_folder_that_holds_something_else_is_left_alone(quick, original, tmp_path):
    for name in ("training", "weights.safetensors"):
        out = tmp_path / name.partition(".")[0]
        out.mkdir()
        (out / name).mkdir() if name == "training" else (out / name).write_bytes(b"mine")
        options = (*original.options(quick), "-o", out, "--name", "rgb")
        assert "name another folder with -o" in refused("mmkd-cache", "import-expert", *options)
        assert [path.name for path in out.iterdir()] == [name]


def test_averaged_weights_are_imported_by_name(quick, original, tmp_path):
    plain = headed_network("small3d", heads={"head": len(original.names)}, channels=3).state_dict()
    state = {name.removeprefix("backbone.").replace("heads.head.", "head."): value for name, value in plain.items()}
    averaged = {f"module.{name}": value + 1 for name, value in state.items()} | {"n_averaged": torch.tensor(3)}
    torch.save({"model": state, "model_ema": averaged, "args": argparse.Namespace(lr=0.1)}, tmp_path / "w.pth")
    options = [tmp_path / "w.pth", *original.options(quick)[1:]]
    options[options.index("swin3d_t")] = "small3d"
    said = call_ok("mmkd-cache", "import-expert", *options, "-o", tmp_path / "plain")
    assert "other weights in the file: model_ema" in said
    said = call_ok(
        "mmkd-cache", "import-expert", *options, "--weights-key", "model_ema", "-o", tmp_path / "averaged"
    )
    assert "weights at 'model_ema'" in said
    first = "network.backbone.layers.0.0.weight"
    found = [load_file(tmp_path / name / "weights.safetensors")[first] for name in ("plain", "averaged")]
    torch.testing.assert_close(found[1], found[0] + 1)
    assert read_card(tmp_path / "averaged").training["imported"]["key"] == "model_ema"


def test_one_classifier_is_cut_into_the_rows_of_each_head(tmp_path):
    weight = torch.arange(21.0).reshape(7, 3)
    mapped = map_weights({"new_fc.weight": weight, "base_model.layer1.0.conv1.net.weight": torch.ones(1)}, tmp_path)
    heads = (Head("verb", ("open", "take")), Head("noun", ("pan", "cup", "lid")))
    files = {"verb": tmp_path / "verbs.txt", "noun": tmp_path / "nouns.txt"}
    files["verb"].write_text("take\nopen\nclose")
    files["noun"].write_text("lid\npan\ntap\ncup")
    sources = head_sources(["verb=head[0:3]", "noun=head[3:7]"], ["verb", "noun"], list(mapped.classifiers))
    layers, reports = matched_heads(mapped, sources, heads, files)
    assert torch.equal(layers["verb"].weight, weight[[1, 0]])
    assert torch.equal(layers["noun"].weight, weight[[4, 6, 3]])
    assert torch.equal(layers["noun"].bias, torch.zeros(3))  # the file's classifier has none
    assert (reports["noun"].rows, reports["noun"].classes) == (4, 3)
    for rows in ("[0:8]", "[3:3]"):
        sources = head_sources([f"verb=head{rows}", "noun=head[3:7]"], ["verb", "noun"], ["head"])
        with pytest.raises(InputError, match=r"--head verb=head.*that classifier has rows 0 to 7"):
            matched_heads(mapped, sources, heads, files)


def test_a_name_that_cannot_be_an_experts_is_refused(quick, original, tmp_path):
    result = call("mmkd-cache", "import-expert", *original.options(quick), "-o", tmp_path / "my-expert")
    assert result.code == 2
    assert "'my-expert' cannot be an expert's name; give one with --name" in result.err


@pytest.mark.parametrize(("modality", "channels"), [("rgb", 3), ("flow", 10)])
def test_epic_s_published_tsm_becomes_an_expert_with_its_own_look(modality, channels, tmp_path, one_thread):
    """Its stack of 5 (u, v) pairs and its numbers: ImageNet's mean as both for RGB, .5 and .226 of codes for
    flow."""
    world = write_epic(tmp_path)
    call_ok("mmkd-cache", "manifest", "epic-kitchens", tmp_path / "annotations", "-o", tmp_path / "m.jsonl")
    state = draw_tsm(channels, 397, seed=6)
    torch.save({"state_dict": state}, tmp_path / "tsm.ckpt")
    stack = 5 if modality == "flow" else 1
    (tmp_path / "teacher.yaml").write_text(
        f"views: {{sampling: dense, frames: 8, seconds_between_frames: 0.1, size_px: 64}}\n"
        f"experts: {{tsm: {{modality: {modality}, flow_stack: {stack}, train: {{flow_scale_px: 8}}}}}}\n"
    )
    data = ("--manifest", tmp_path / "m.jsonl", "--videos", world.videos, "-c", tmp_path / "teacher.yaml")
    classes = [f"{head}={tmp_path / 'annotations' / f'EPIC_100_{head}_classes.csv'}" for head in ("verb", "noun")]
    call_ok(
        *("mmkd-cache", "import-expert", tmp_path / "tsm.ckpt", "--network", "tsm_resnet50"),
        *("--modality", modality, "--classes", classes[0], "--classes", classes[1], *data),
        *("--name", "tsm", "-o", tmp_path / "tsm"),
    )
    network = load_expert(tmp_path / "tsm", torch.device("cpu")).network
    generator = torch.Generator().manual_seed(7)
    if modality == "rgb":
        pixels = torch.randint(0, 256, (1, 8, 64, 64, 3), generator=generator, dtype=torch.uint8)
        mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        clips, inputs = (pixels.permute(0, 1, 4, 2, 3) / 255 - mean) / mean, {"rgb": pixels}
    else:
        codes = torch.randint(0, 256, (1, 8, 10, 64, 64), generator=generator).float()
        clips, inputs = (codes / 255 - 0.5) / 0.226, {"flow": codes / 255 * 16 - 8}
    expected = original_tsm(state, clips)
    with torch.inference_mode():
        found = network(inputs)
    joined = torch.cat([found["verb"], found["noun"]], 1)
    torch.testing.assert_close(joined, expected, rtol=1e-4, atol=2e-5 * float(expected.std()))
