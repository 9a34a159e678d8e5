#!/usr/bin/env bash
# The rows of "From ImageNet weights" in docs/results.md, but for the three frames of `splits make`, one run after the
# other: days on one core. Finished runs are skipped, interrupted ones resumed.
#
#     docs/tools/camvid_results.sh DATA_ROOT OUT    # VIT=FILE: also the rows of the ViT-S, from its weights
set -euo pipefail
data=$1 out=$2
rows() { docs/tools/camvid_pretrained.sh "$data" "$@"; }

LIST=1_16 SEEDS=0 rows "$out" supervised_lr1e-4 supervised_lr2e-4 supervised_lr4e-4 supervised_lr16e-4 \
    supervised_12_epochs supervised supervised_ceiling fixmatch
python docs/tools/parts.py "$out/1_16/supervised/seed_0/latest.pth" # what the deepest map is worth
LIST=1_16 SEEDS=0 rows "$out" supervised_flattened                  # trained without it
LIST=1_16 SEEDS=1 rows "$out" supervised
LIST=1_16 SEEDS=0 rows "$out" supervised_all
LIST=1_61 SEEDS=0 rows "$out" supervised supervised_ceiling fixmatch
for draw in 0 1 2; do
    LIST=random_6_$draw rows "$out" supervised allspark_revised allspark_revised_no_attention allspark \
        allspark_no_attention
    LIST=random_6_$draw SEEDS=$draw rows "$out" fixmatch allspark_revised_without unimatch selftrain \
        supervised_strong_1 fixmatch_strong_1 allspark_labeled_context
done
LIST=random_6_0 SEEDS=0 rows "$out" unimatch_v2 imas supervised_ceiling fixmatch_unused fixmatch_frozen supervised_frozen
LIST=random_6_0 SEEDS=1 rows "$out" unimatch_v2 imas maskmatch pseudoseg pseudoseg_decoder supervised_ema \
    allspark_random_grouping supervised_24_epochs fixmatch_24_epochs allspark_revised_24_epochs allspark_12_epochs \
    allspark_12_epochs_threshold
LIST=random_6_1 SEEDS=2 rows "$out" unimatch_v2 supervised_ema allspark_random_grouping supervised_ceiling \
    supervised_24_epochs supervised_ema_24_epochs allspark_revised_24_epochs
LIST=random_6_2 SEEDS=0 rows "$out" imas allspark_random_grouping supervised_24_epochs allspark_revised_24_epochs \
    allspark_revised_without_24_epochs
# Pretrained against random weights
LIST=1_16 rows "$out" supervised_lr2e-4
LIST=1_16 WEIGHTS=none rows "$out/scratch" supervised_lr2e-4
if [ -n "${VIT:-}" ]; then # a DINOv2 ViT-S, in its own or timm's names
    export ENCODER=vit_s SEEDS=0
    LIST=1_16 WEIGHTS=$VIT rows "$out/vit_s" supervised
    LIST=1_16 WEIGHTS=none rows "$out/vit_s_scratch" supervised
    LIST=random_6_0 WEIGHTS=$VIT rows "$out/vit_s" supervised allspark_revised allspark_revised_no_attention
fi
