#!/bin/sh
# Has the baseline converged? The demo's baseline beside one of 1.5 times the steps, and the student, on 1,120 standard
# and 560 compositional clips that no demo run sees (the demo's own 280 are few: two runs differ by 2 points by chance).
# After demo.sh. Usage: CACHE=mmkd-cache STUDENT=mmkd-student converged.sh DIRECTORY SEED EPOCHS
set -eu
dir=$1 seed=$2 epochs=$3
run=$dir/seed-$seed more=$dir/further
further="--manifest $more/manifest.jsonl --videos $more/videos"

say() { printf '\n== %s\n' "$*" >&2; }

say "further clips: $more"
$CACHE demo "$more" --standard-clips 1120 --compositional-clips 560
$CACHE manifest something-something --dataset mmkd-demo --labels "$more/labels.json" --videos "$more/videos" \
    --split train="$more/train.json" --split standard="$more/standard.json" \
    --split compositional="$more/compositional.json" -o "$more/manifest.jsonl"
# Evaluation views come from a cache; which expert's logits it holds does not matter here.
$CACHE teach rgb -c "$more/teacher.yaml" $further --set experts.rgb.train.epochs=5 -o "$more/expert"
$CACHE build -c "$more/teacher.yaml" $further --expert "$more/expert" --set build.views=1 -o "$more/cache"

say "baseline, $epochs epochs"
$STUDENT train -c "$dir/student.yaml" --manifest "$dir/manifest.jsonl" --videos "$dir/videos" --seed "$seed" \
    --cache "$run/cache" --labels-only --set train.epochs="$epochs" -o "$run/baseline-$epochs"

for name in baseline "baseline-$epochs" student; do
    say "$name, seed $seed"
    $STUDENT evaluate "$run/$name" $further --cache "$more/cache"
done
