#!/bin/sh
# The whole road on the demo data set: video files -> manifest -> three experts -> cache -> baseline and student
# -> table. Usage: CACHE=mmkd-cache STUDENT=mmkd-student demo.sh DIRECTORY SEED; FRESH=1 adds the baseline that
# sees new views every epoch. Each command skips what is already done.
set -eu
dir=$1 seed=$2
out=$dir/seed-$seed
data="--manifest $dir/manifest.jsonl --videos $dir/videos"
boxes="--boxes $dir/bounding_boxes.json"

say() { printf '\n== %s\n' "$*" >&2; }

say "data set: $dir"
$CACHE demo "$dir"
$CACHE manifest something-something --dataset mmkd-demo --labels "$dir/labels.json" --videos "$dir/videos" \
    --split train="$dir/train.json" --split standard="$dir/standard.json" \
    --split compositional="$dir/compositional.json" -o "$dir/manifest.jsonl"

for expert in rgb flow boxes; do
    say "expert: $expert"
    $CACHE teach $expert -c "$dir/teacher.yaml" $data $boxes --seed "$seed" -o "$out/experts/$expert"
done

say "cache"
$CACHE build -c "$dir/teacher.yaml" $data $boxes -o "$out/cache" \
    --expert "$out/experts/rgb" --expert "$out/experts/flow" --expert "$out/experts/boxes"
$CACHE inspect "$out/cache"

train="$STUDENT train -c $dir/student.yaml $data --cache $out/cache --seed $seed"
say "baseline: RGB on labels alone"
$train --labels-only -o "$out/baseline"
runs="--run baseline=$out/baseline"
if [ "${FRESH:-}" ]; then
    say "baseline with fresh views every epoch"
    $train --labels-only --fresh-views -o "$out/baseline-fresh"
    runs="$runs --run baseline-fresh=$out/baseline-fresh"
fi
say "student: RGB on the cached teacher"
$train -o "$out/student"

say "table, seed $seed"
$STUDENT compare --cache "$out/cache" --manifest "$dir/manifest.jsonl" --weights uniform $runs \
    --run student="$out/student" --out "$out/table.json"
