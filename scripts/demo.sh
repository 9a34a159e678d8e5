#!/bin/sh
# Train supervised and allspark_revised on the embedded data set with the same few labels, at the same time, one thread
# each. Writes both val mIoU, pictures and curves to exp/demo. Finished runs are skipped, interrupted ones resumed.
# Another seed or split (seed=1 sh scripts/demo.sh) gets its own folder; arguments go to both runs. At the end the model
# segments a photo, yours with photo=/path/to/photo.jpg sh scripts/demo.sh
set -eu
case ${photo:-/} in /*) ;; *) photo=$PWD/$photo ;; esac
cd -- "$(dirname -- "$0")/.."
out=exp/demo${split:+/split_$split}${seed:+/seed_$seed}
split=${split:-1_30} # 16 labeled images of 480
seed=${seed:-0}
. scripts/setup.sh
export OMP_NUM_THREADS=1 # results do not depend on the number of cores

train() { # a pipe has the exit status of its last command; the file records that of the first
    name=$1 && shift
    { python -u train.py --dataset shapes --split "$split" --save-path "$out/$name" "$@" 2>&1 && : >"$out/$name/done"; } |
        while IFS= read -r line || [ -n "$line" ]; do printf '%s: %s\n' "$name" "$line"; done # sed would buffer its output in a log
}

echo "demo: training supervised (labeled images) and allspark_revised (all images): five to six minutes on two cores"
mkdir -p "$out"
rm -f "$out/supervised/done" "$out/allspark_revised/done"
set -- epochs=12 burn_in_epochs=6 evaluation.interval=3 seed="$seed" "$@" # half of the recipe's schedule
train supervised --method supervised "$@" &
train allspark_revised --method allspark_revised warmup_epochs=7 "$@" &
wait
if [ ! -e "$out/supervised/done" ] || [ ! -e "$out/allspark_revised/done" ]; then
    echo "demo: a training did not finish, see above" >&2
    exit 1
fi
python -m allspark compare --out "$out" "supervised=$out/supervised" "allspark_revised=$out/allspark_revised" >/dev/null
sed '/^$/q' "$out/table.md" # its first table
python -m allspark predict --checkpoint "$out/allspark_revised" --what overlay,index --out "$out/photo" \
    "${photo:-data/shapes/images/val/0000.png}"
cat <<EOF
demo: $out/predictions.png shows validation images, their ground truth and both predictions. One seed is no comparison:
docs/results.md has several. photo=/path/to/photo.jpg sh scripts/demo.sh segments your photo, but only into the classes
of shapes. For your own classes, run \`. scripts/setup.sh\` in this shell, and follow "Your own data" in README.md.
EOF
