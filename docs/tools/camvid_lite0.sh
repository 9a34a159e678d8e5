#!/usr/bin/env bash
# Supervised training on 23 labels of CamVid with EfficientNet-Lite0, from its ImageNet weights and from scratch, with
# equal schedules and three seeds: six runs of ten minutes on one core, and a table. A finished run is skipped.
#
#     docs/tools/camvid_lite0.sh DATA_ROOT OUT
#
# Weights: python -m allspark weights fetch efficientnet_lite0 (Apache 2.0).
set -euo pipefail
data=$1 out=$2
weights=${weights:-pretrained_weights/tf_efficientnet_lite0.pth}
[ -e "$weights" ] || python -m allspark weights fetch efficientnet_lite0
runs=()
for seed in 0 1 2; do
    for start in "$weights" none; do
        row=supervised_scratch
        [ "$start" = none ] || row=supervised_imagenet
        python train.py --dataset camvid --method supervised --split 1_16 --save-path "$out/$row/seed_$seed" \
            data_root="$data" model.encoder=timm:tf_efficientnet_lite0 model.pretrained="$start" seed="$seed" \
            optim.lr=2e-4 optim.lr_multi=5 epochs=6 burn_in_epochs=0
        runs+=("$row=$out/$row/seed_$seed")
    done
done
python -m allspark compare "${runs[@]}" --out "$out/comparison"
