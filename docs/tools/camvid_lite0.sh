#!/usr/bin/env bash
# Supervised training on 23 labels of CamVid with EfficientNet-Lite0, from its ImageNet weights and from scratch, with
# equal schedules and three seeds: six runs and a table.
#
#     docs/tools/camvid_lite0.sh DATA_ROOT OUT
#
# Weights: python -m allspark weights fetch efficientnet_lite0 (Apache 2.0).
set -euo pipefail
data=$1 out=$2
weights=pretrained_weights/tf_efficientnet_lite0.pth
[ -e "$weights" ] || python -m allspark weights fetch efficientnet_lite0
runs=()
for seed in 0 1 2; do
    for start in none "$weights"; do
        name=scratch
        [ "$start" = none ] || name=imagenet
        python train.py --dataset camvid --method supervised --split 1_16 --save-path "$out/${name}_$seed" \
            data.data_root="$data" model.encoder=timm:tf_efficientnet_lite0 model.pretrained="$start" seed="$seed"
        runs+=("$name=$out/${name}_$seed")
    done
done
python -m allspark compare "${runs[@]}" --out "$out/comparison" --paired scratch
