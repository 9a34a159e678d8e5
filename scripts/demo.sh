#!/bin/sh
# Supervised and AllSpark, revised, with the same few labels and seed on the embedded data set, at once, one thread each: both
# val mIoU, pictures and curves under exp/demo. Again is quick: a finished run is skipped, an interrupted one goes on.
# Another seed or split (seed=1 sh scripts/demo.sh) has its own folder; arguments go to both trainings.
set -eu
cd -- "$(dirname -- "$0")/.."
out=exp/demo${split:+/split_$split}${seed:+/seed_$seed}
split=${split:-1_30} # 16 labeled images of 480
seed=${seed:-0}
. scripts/setup.sh
export OMP_NUM_THREADS=1 # the sums of a step, and so the result, do not depend on the number of cores

train() { # a pipe has the exit status of its end: the file says whether its beginning succeeded
    name=$1 && shift
    { python -u train.py --dataset shapes --split "$split" --save-path "$out/$name" "$@" 2>&1 && : >"$out/$name/done"; } |
        sed "s/^/$name: /"
}

echo "demo: training supervised and AllSpark side by side, five to six minutes on two cores"
mkdir -p "$out"
rm -f "$out/supervised/done" "$out/allspark/done"
set -- epochs=12 burn_in_epochs=6 evaluation.interval=3 seed="$seed" "$@" # half of the recipe's schedule
train supervised --method supervised "$@" &
train allspark --method allspark_revised warmup_epochs=7 "$@" &
wait
if [ ! -e "$out/supervised/done" ] || [ ! -e "$out/allspark/done" ]; then
    echo "demo: a training did not finish, see above" >&2
    exit 1
fi
python -m allspark compare --out "$out" "supervised=$out/supervised" "AllSpark=$out/allspark"
