#!/usr/bin/env bash
# The comparison from pretrained weights (docs/results.md): CamVid, one footing of an encoder for all rows.
#
#     docs/tools/camvid_pretrained.sh DATA_ROOT OUT ROW...    # "" for all rows; default: SEEDS="0 1 2" LIST=random_6_0
#     ENCODER=vit_s WEIGHTS=FILE docs/tools/camvid_pretrained.sh ...
#
# Runs are in OUT/LIST/ROW/seed_N; finished ones are skipped, interrupted ones resumed. On one core, supervised rows take
# 3 to 7 minutes, others 6 to 16. ENCODER=lite0, the default, is EfficientNet-Lite0 from the ImageNet weights of
# `python -m allspark weights fetch efficientnet_lite0` (Apache 2.0). vit_s is dinov2_small with the DPT decoder, from
# weights in timm's or DINOv2's format (WEIGHTS=none: random ones).
set -euo pipefail
seeds=${SEEDS:-0 1 2} list=${LIST:-random_6_0}
data=$1 out=$2/$list
shift 2
# The footing: learning rate and length were chosen on supervised training alone (the rows supervised_lr* and
# supervised_12_epochs, seed 0), before any other row was run
footing=(epochs=6 burn_in_epochs=2 model.bottleneck.warmup_epochs=3)
case ${ENCODER:-lite0} in
    lite0)
        weights=${WEIGHTS:-pretrained_weights/tf_efficientnet_lite0.pth}
        [ "$weights" = none ] || [ -e "$weights" ] || python -m allspark weights fetch efficientnet_lite0
        footing+=(model.encoder=timm:tf_efficientnet_lite0 optim.lr=8e-4 optim.lr_multi=5)
        ;;
    vit_s)
        weights=${WEIGHTS:?give the file of the weights}
        footing+=(model.encoder=dinov2_small model.decoder=dpt crop_size=252 optim.lr=2e-5 optim.lr_multi=40)
        footing+=(model.bottleneck.place=tokens precision=bf16)
        ;;
    *)
        echo "ENCODER=$ENCODER: must be lite0 or vit_s" >&2
        exit 2
        ;;
esac
own=model.bottleneck
declare -A rows=(
    [supervised]="supervised burn_in_epochs=0"
    [supervised_scratch]="supervised burn_in_epochs=0 model.pretrained=none"
    [supervised_lr1e-4]="supervised burn_in_epochs=0 optim.lr=1e-4"
    [supervised_lr2e-4]="supervised burn_in_epochs=0 optim.lr=2e-4"
    [supervised_lr4e-4]="supervised burn_in_epochs=0 optim.lr=4e-4"
    [supervised_lr16e-4]="supervised burn_in_epochs=0 optim.lr=16e-4"
    [supervised_12_epochs]="supervised burn_in_epochs=0 epochs=12 optim.lr=2e-4"
    [supervised_flattened]="supervised burn_in_epochs=0 method.name=flattened:Flattened"
    [supervised_ema]="supervised burn_in_epochs=0 method.name=supervised_ema:SupervisedEMA"
    [supervised_ema_24_epochs]="supervised burn_in_epochs=0 epochs=24 method.name=supervised_ema:SupervisedEMA"
    [supervised_all]="supervised burn_in_epochs=0 epoch_of=labeled --labeled-id-path splits/camvid/train.txt"
    [supervised_ceiling]="supervised burn_in_epochs=0 epoch_of=labeled batch_size=8 --labeled-id-path $out/ceiling.txt"
    [selftrain]="selftrain" [fixmatch]="fixmatch" [unimatch]="unimatch" [unimatch_v2]="unimatch_v2"
    [imas]="imas" [maskmatch]="maskmatch" [pseudoseg]="pseudoseg"
    [pseudoseg_decoder]="pseudoseg method.gamma=1"
    [supervised_frozen]="supervised burn_in_epochs=0 method.name=norm_statistics:SupervisedFrozen"
    [fixmatch_frozen]="fixmatch method.name=norm_statistics:FixMatchFrozen"
    [fixmatch_unused]="fixmatch method.name=norm_statistics:FixMatchUnused"
    [supervised_24_epochs]="supervised burn_in_epochs=0 epochs=24" [fixmatch_24_epochs]="fixmatch epochs=24"
    [allspark_revised_24_epochs]="allspark_revised epochs=24"
    [allspark_revised_without_24_epochs]="allspark_revised epochs=24 $own=none"
    [allspark_12_epochs]="allspark epochs=12" [allspark_12_epochs_threshold]="allspark epochs=12 method.threshold=0.95"
    [allspark_12_epochs_own_channels]="allspark epochs=12 $own.own_channels=true"
    [allspark]="allspark" [allspark_revised]="allspark_revised"
    [allspark_revised_without]="allspark_revised $own=none"
    [allspark_revised_never_read]="allspark_revised $own.warmup_epochs=null"
    [allspark_revised_own_channels]="allspark_revised $own.own_channels=true"
)
for row in allspark allspark_revised; do
    rows[${row}_no_attention]="$row $own.attention=none"
    rows[${row}_random_grouping]="$row $own.grouping_input=random"
    rows[${row}_labeled_context]="$row $own.context=labeled"
done
for row in supervised fixmatch; do
    for p in 0.5 1; do
        rows[${row}_strong_$p]="${rows[$row]} data.photometric_probability=$p"
    done
done
[ $# -gt 0 ] && [ -n "$1" ] || set -- "${!rows[@]}"

# The ceiling, an upper bound of every method: half of a batch from the labeled images, half from all others, with their
# true labels
mkdir -p "$out"
lists=splits/camvid/$list
copies=$(($(wc -l <"$lists/unlabeled.txt") / $(wc -l <"$lists/labeled.txt")))
{ for _ in $(seq "$copies"); do cat "$lists/labeled.txt"; done; cat "$lists/unlabeled.txt"; } >"$out/ceiling.$$"
mv "$out/ceiling.$$" "$out/ceiling.txt"

for row in "$@"; do
    for seed in $seeds; do
        # shellcheck disable=SC2086 # the words of a row are arguments
        PYTHONPATH=docs/tools python train.py --dataset camvid --split "$list" --save-path "$out/$row/seed_$seed" \
            --method ${rows[$row]%% *} data_root="$data" num_workers=0 device=cpu 'log.writers=[]' \
            evaluation.pictures=0 model.pretrained="$weights" seed="$seed" \
            "${footing[@]}" $(printf '%s' "${rows[$row]#"${rows[$row]%% *}"}")
    done
done
