"""The model card as people read it: README.md with the front matter that Hugging Face's hub reads.

Front matter: https://huggingface.co/docs/hub/model-cards (license, datasets, metrics, tags, model-index).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from mmkd.data_manifests.counted import counted

UNKNOWN = "unknown"
FILL_IN = (
    "**Fill in the licence** (`license` above): the one that data set, starting weights and teacher allow. "
    "`--license` of `mmkd-student export` sets it."
)


def card_text(card: Mapping[str, Any]) -> str:
    """Return README.md of an exported student."""
    front = yaml.safe_dump(front_matter(card), sort_keys=False, allow_unicode=True, width=1000)
    parts = (
        title(card),
        usage(card),
        data(card),
        teacher(card),
        accuracies(card),
        checks(card),
        *([int8(card)] if card["int8"] else []),
        cost(card),
        limits(card),
    )
    return f"---\n{front}---\n\n" + "\n\n".join("\n".join(part) for part in parts) + "\n"


def front_matter(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that the hub reads."""
    tags = [
        "video-classification",
        "action-recognition",
        "mmkd",
        *dict.fromkeys(name.rpartition(".")[2] for name in card["check"]["files"]),
    ]
    if card["teacher"]:
        tags.append("knowledge-distillation")
    front: dict[str, Any] = {
        "license": card["license"],
        "library_name": "mmkd",
        "pipeline_tag": "video-classification",
        "tags": tags,
        "metrics": ["accuracy"],
    }
    if card["dataset"]:
        front["datasets"] = [card["dataset"]]
        results = [result(card, *row) for row in metric_rows(card)]
        if results:
            front["model-index"] = [{"name": name_of(card), "results": results}]
    return front


def name_of(card: Mapping[str, Any]) -> str:
    """Return what the model is called."""
    return f"{card['network']} on {card['dataset'] or 'a data set'}"


def metric_rows(card: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield split or group, head and metrics of every evaluation with a clip that counts."""
    for evaluation in card["evaluations"]:
        for part, heads in evaluation["metrics"].items():
            for head, metrics in heads.items():
                if metrics.get("top1") is not None:
                    yield part, head, metrics


def result(card: Mapping[str, Any], part: str, head: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return one accuracy for the hub."""
    return {
        "task": {"type": "video-classification"},
        "dataset": {"name": card["dataset"], "type": card["dataset"], "split": part},
        "metrics": [{"type": "accuracy", "name": f"top-1, {head}, {views_of(metrics)}", "value": metrics["top1"]}],
    }


def title(card: Mapping[str, Any]) -> list[str]:
    """Return title, licence and the files."""
    lines = [f"# {name_of(card)}", ""]
    views = card["views"]
    lines.append(
        f"Action recognition from RGB video: {counted(views['frames'], 'frame')} of {views['size_px']} x "
        f"{views['size_px']} pixels in, one score for each class out. Made by `mmkd-student export`."
    )
    if card["license"] == UNKNOWN:
        lines += ["", FILL_IN]
    return lines


def usage(card: Mapping[str, Any]) -> list[str]:
    """Return how each file is run; a test runs these lines."""
    lines = [
        "## Use",
        "",
        "`frames`: uint8 (B, T, S, S, 3), RGB, any B. Normalisation is inside. T frames are "
        f"{sampled(card['views'])}; the middle square of each is resized to S x S (area averages when shrinking).",
    ]
    snippets = {"model.onnx": ONNX_USE, "model.pt2": PT2_USE}
    for name in card["check"]["files"]:
        if name in snippets:
            lines += ["", "```python", *snippets[name].splitlines(), "```"]
    return lines


ONNX_USE = """import json, onnxruntime
session = onnxruntime.InferenceSession("model.onnx")
told = json.loads(session.get_modelmeta().custom_metadata_map["mmkd"])
for (head, names), logits in zip(told["classes"].items(), session.run(None, {"frames": frames})):
    print(head, [names[best] for best in logits.argmax(1)])"""
PT2_USE = """import json, torch
extra = {"mmkd.json": ""}
student = torch.export.load("model.pt2", extra_files=extra).module()
told = json.loads(extra["mmkd.json"])
for (head, names), logits in zip(told["classes"].items(), student(torch.from_numpy(frames))):
    print(head, [names[best] for best in logits.argmax(1)])"""


def sampled(views: Mapping[str, Any]) -> str:
    """Return in words which frames of a clip a view has when testing."""
    if views["sampling"] == "uniform":
        return "the middle ones of T equal parts of the clip"
    distance = views.get("seconds_between_frames")
    apart = f"{distance:g} s" if distance else f"{views['stride']} native frames"
    return f"{apart} apart, in the middle of the clip"


def data(card: Mapping[str, Any]) -> list[str]:
    """Return data set, classes and where it started."""
    counts = ", ".join(f"`{head}` {len(names)}" for head, names in card["classes"].items())
    split = f", split `{card['train_split']}`" if card["train_split"] else ""
    start = card["starting_weights"]
    return [
        "## Data",
        "",
        f"- Data set: {cell(card['dataset'] or 'not stated by the run')}{split}.",
        f"- Classes: {counts}; their names are in every model file and in `card.json`.",
        f"- Network: `{card['network']}`, {card['epochs']} epochs, "
        + (f"from the weights file `{start}`, whose licence counts, too." if start else "from random weights."),
    ]


def teacher(card: Mapping[str, Any]) -> list[str]:
    """Return whom the student learned from."""
    lines = ["## Teacher", ""]
    if not card["teacher"]:
        return [*lines, "None: it learned from labels alone."]
    for head, mixture in card["teacher"].items():
        weights = mixture.get("weights", mixture) if isinstance(mixture.get("weights"), dict) else mixture
        shares = ", ".join(f"{name} {value:.3g}" for name, value in weights.items())
        lines.append(f"- `{head}`: the weighted sum of the logits of experts: {shares}.")
        if weights is not mixture:
            kept = {key: value for key, value in mixture.items() if key != "weights"}
            lines.append(f"  Further: {kept}." if kept else "")
    return [*lines, f"- Fingerprint of their cache: `{card['cache']}`."]


def accuracies(card: Mapping[str, Any]) -> list[str]:
    """Return a table of what the run's evaluations say."""
    rows = [
        [f"`{cell(part)}`", head, percent(own["top1"]), percent(own.get("top5")), str(own["count"]), views_of(own)]
        for part, head, own in metric_rows(card)
    ]
    if not rows:
        return ["## Accuracy", "", "Not evaluated: there was no evaluation in the run's folder."]
    head = ["split or group", "head", "top-1", "top-5", "clips", "views of a clip"]
    return ["## Accuracy", "", "Of the student itself, in percent.", "", *table(head, rows)]


def views_of(metrics: Mapping[str, Any]) -> str:
    """Return over which views an accuracy is."""
    positions, crops = metrics.get("positions", 0), metrics.get("crops", 0)
    return f"{counted(positions, 'position')} x {counted(crops, 'crop')}" if positions else "not stated"


def checks(card: Mapping[str, Any]) -> list[str]:
    """Return how far each file is from the student."""
    rows = [
        [f"`{name}`", f"{own['largest']:.2g}", f"{own['mean']:.2g}", percent(own["top1"]), str(own["views"])]
        for name, own in card["check"]["files"].items()
    ]
    head = ["file", "largest difference of a logit", "mean", "same best class, %", "views"]
    return [
        "## Check",
        "",
        f"Each file against the student itself, on {card['check']['frames']}.",
        "",
        *table(head, rows),
    ]


def int8(card: Mapping[str, Any]) -> list[str]:
    """Return what 8 bits cost in accuracy."""
    found = card["int8"]
    rows = [
        [head, percent(own["top1"]), percent(own["top1_int8"]), percent(own["same"]), str(own["clips"])]
        for head, own in found["heads"].items()
    ]
    head = ["head", "top-1 in 32 bits, %", "top-1 in 8 bits, %", "same class, %", "clips with a label"]
    return [
        "## In 8 bits",
        "",
        "`model.int8.onnx` is run as `model.onnx` is. Weights and activations have 8 bits (ONNX Runtime's static "
        f"quantisation, ranges from training clips). Over {found['frames']}:",
        "",
        *table(head, rows),
    ]


def number(value: float) -> str:
    """Return three digits of a number, or all before the point where there are more."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def cost(card: Mapping[str, Any]) -> list[str]:
    """Return what it costs on the machine where it was exported."""
    found = card["cost"]
    if not found:
        return ["## Cost", "", "Not measured."]
    where = found["machine"]
    gpu = f", {where['gpu']}" if "gpu" in where else ""
    sizes = ", ".join(f"`{name}` {size:.1f} MiB" for name, size in found["file_mib"].items())
    rows = [
        [
            row["form"],
            str(row["batch"]),
            *(number(row[name]) for name in ("median_ms", "p95_ms", "clips_per_second")),
            "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
        ]
        for row in found["rows"]
    ]
    return [
        "## Cost",
        "",
        f"{found['million_parameters']:.2f} million parameters, {found['gmac']:.3g} GMAC a view; {sizes}.",
        "",
        f"On {where['processor']}{gpu}, {counted(where['torch_threads'], 'thread')}, torch {where['torch']}; the "
        "views are in memory.",
        "",
        *table(["form", "batch", "median, ms", "95 % below, ms", "clips/s", "memory, MiB"], rows),
    ]


def limits(card: Mapping[str, Any]) -> list[str]:
    """Return what it is not good for."""
    lines = [
        "## Limits",
        "",
        "- It knows the classes of its list alone, and names one of them for any video, whatever it shows.",
        "- Its accuracy is known for the data above, seen as above; other cameras, places or ways to cut a clip "
        "may give another.",
        "- Scores are not probabilities before a softmax, and no one has calibrated them for other data.",
    ]
    if card["teacher"]:
        lines.append("- What its teacher gets wrong it may have learned, too.")
    if not card["check"]["real"]:
        lines.append("- The files were compared with the student on noise, not on real frames.")
    return lines


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def percent(value: float | None) -> str:
    """Return a fraction in percent, a dash for none."""
    return "-" if value is None else f"{100 * value:.1f}"


def cell(text: str) -> str:
    """Return a text that stays within its cell."""
    return text.replace("|", "\\|")
