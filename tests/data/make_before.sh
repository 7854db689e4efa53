#!/bin/sh
# Makes before.tar.xz: a manifest, two experts, a cache, a finished run and a stopped one, as commit cc9a7f6 wrote them.
# Usage: BIN=/folder/of/its/mmkd-cache sh make.sh, in an empty folder. Backbones start from zeros, which stay zeros
# and pack well; the heads learn.
set -eu
$BIN/mmkd-cache demo d --train-clips 14 --standard-clips 14 --compositional-clips 14
$BIN/mmkd-cache manifest something-something --dataset before --labels d/labels.json --videos d/videos \
    --split train=d/train.json --split standard=d/standard.json -o manifest.jsonl
$BIN/python - <<'P'
import json, pathlib, torch
from mmkd.student.networks import headed_network
state = headed_network("small3d", heads={"action": 2}, channels=3).backbone.state_dict()
torch.save({k: torch.ones_like(v) if "running_var" in k else torch.zeros_like(v) for k, v in state.items()}, "zeros.pth")
# three clips a split are enough
lines = pathlib.Path("manifest.jsonl").read_text().splitlines()
head, rows = lines[0], [json.loads(line) for line in lines[1:]]
kept = [row for split in ("train", "standard") for row in [r for r in rows if r["split"] == split][:4]]
pathlib.Path("manifest.jsonl").write_text("\n".join([head, *map(json.dumps, kept)]) + "\n")
videos = pathlib.Path("videos"); videos.mkdir()
for row in kept:
    (videos / row["video"]).write_bytes((pathlib.Path("d/videos") / row["video"]).read_bytes())
boxes = json.loads(pathlib.Path("d/bounding_boxes.json").read_text())
ids = {row["clip_id"] for row in kept}
pathlib.Path("boxes.json").write_text(json.dumps({k: v for k, v in boxes.items() if k in ids}))
P
cat > teacher.yaml <<'Y'
data: {manifest: manifest.jsonl, videos: videos, workers: 0}
views: {frames: 4, size_px: 32, evaluation_crops: 1}
held_out: {fraction: 0.3}
boxes: {max_boxes: 4, files: [boxes.json]}
experts:
  rgb: {modality: rgb, train: {network: small3d, weights: zeros.pth, epochs: 1, warmup_epochs: 0, batch_size: 2, loader_threads: 1}}
  boxes: {modality: boxes, layout: {hidden: 16, attention_heads: 2, spatial_layers: 1, temporal_layers: 1}, train: {epochs: 1, warmup_epochs: 0, batch_size: 2, loader_threads: 1}}
build: {views: 2, shard_views: 2, shard_rows: 4, batch_views: 8}
Y
cat > student.yaml <<'Y'
data: {manifest: manifest.jsonl, videos: videos, workers: 0}
train: {network: small3d, weights: zeros.pth, epochs: 2, warmup_epochs: 0, batch_size: 2, loader_threads: 1}
Y
for name in rgb boxes; do $BIN/mmkd-cache teach $name -c teacher.yaml -o experts/$name; done
$BIN/mmkd-cache build -c teacher.yaml --expert experts/rgb --expert experts/boxes -o cache
$BIN/mmkd-student train -c student.yaml --cache cache -o run --node-copies copies
$BIN/mmkd-student train -c student.yaml --set train.epochs=30 --cache cache -o stopped --node-copies copies & pid=$!
while ! grep -qs . stopped/metrics.jsonl; do sleep .1; done
kill -TERM $pid; wait $pid || [ $? -eq 75 ]
rm -r d copies
find . -name '*.lock' -delete
tar cJf ../before.tar.xz --sort=name --mtime=2026-11-27 --owner=0 --group=0 .
