#!/bin/sh
# Supervised against AllSpark with the same few labels and seed, on the embedded data set: both val mIoU, pictures and
# curves under exp/demo. Again is quick: a finished run is skipped, an interrupted one goes on. Another seed or split
# (seed=1 sh scripts/demo.sh) has its own folder; arguments go to both trainings.
set -eu
cd -- "$(dirname -- "$0")/.."
out=exp/demo${split:+/split_$split}${seed:+/seed_$seed}
split=${split:-1_30} # 16 labeled images of 480
seed=${seed:-0}
. scripts/setup.sh

for method in supervised allspark; do
    python train.py --dataset shapes --method $method --split "$split" --save-path "$out/$method" seed="$seed" "$@"
done
python -m allspark compare --out "$out" "supervised=$out/supervised" "AllSpark=$out/allspark"
