#!/bin/sh
# Does patience pay? The demo's baseline and student beside those of 1.5 times the steps, on 1,120 standard and 560
# compositional clips that no demo run sees (the demo's own 280 are few: two runs differ by 2 points by chance).
# After demo.sh. Usage: CACHE=mmkd-cache STUDENT=mmkd-student converged.sh DIRECTORY SEED EPOCHS
set -eu
dir=$1 seed=$2 epochs=$3
run=$dir/seed-$seed more=$dir/further
train="$STUDENT train -c $dir/student.yaml --manifest $dir/manifest.jsonl --videos $dir/videos --cache $run/cache"

say() { printf '\n== %s\n' "$*" >&2; }

say "further clips: $more"
$CACHE demo "$more" --standard-clips 1120 --compositional-clips 560
$CACHE manifest something-something --dataset mmkd-demo --labels "$more/labels.json" --videos "$more/videos" \
    --split train="$more/train.json" --split standard="$more/standard.json" \
    --split compositional="$more/compositional.json" -o "$more/manifest.jsonl"

say "baseline, $epochs epochs"
$train --seed "$seed" --labels-only --set train.epochs="$epochs" -o "$run/baseline-$epochs"
say "student, $epochs epochs"
$train --seed "$seed" --set train.epochs="$epochs" -o "$run/student-$epochs"

for name in baseline "baseline-$epochs" student "student-$epochs"; do
    say "$name, seed $seed"
    $STUDENT evaluate "$run/$name" --manifest "$more/manifest.jsonl" --videos "$more/videos"
done
