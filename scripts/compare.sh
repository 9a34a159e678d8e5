#!/bin/sh
# Train several methods with several seeds, one run after the other, and compare them: table.md (mean and standard
# deviation over seeds), seeds.png, curves.png and predictions.png. Finished runs are skipped, interrupted ones resumed.
# Settings are environment variables; arguments (key.path=value) go to every run:
#   dataset=pascal split=1_8 methods="supervised fixmatch fixmatch+allspark" seeds="0 1" gpus=4 sh scripts/compare.sh
#   config=mydata.yaml split=1_8 methods="supervised fixmatch" seeds=0 gpus=1 sh scripts/compare.sh      # your own data
# methods: fixmatch+allspark is fixmatch with model.bottleneck=allspark. budget: epochs (default: of the recipe).
# gpus, port: as for train.sh (default: one process, on a GPU if there is one). paired: the row that is subtracted from
# the others, seed by seed (default: the first). out: folder of the results (default:
# exp/compare/<dataset>/<split>[/<budget>_epochs]); use another one for other arguments.
set -euf
cd -- "$(dirname -- "$0")/.."
config=${config:-} # a recipe of your own; its file name is the name of the data set
[ -z "$config" ] || dataset=$(basename -- "$config" .yaml)
dataset=${dataset:-${DATASET:-shapes}}
split=${split:-${SPLIT:-}}
methods=${methods:-${METHODS:-supervised selftrain fixmatch unimatch unimatch_v2 imas maskmatch pseudoseg \
allspark allspark_revised}}
seeds=${seeds:-${SEEDS:-0 1 2}}
budget=${budget:-${BUDGET:-}}

[ -n "$config" ] || [ "$dataset" != shapes ] || split=${split:-1_30} # 16 labeled images of 480
if [ -z "$split$config" ]; then
    echo "compare: no split of $dataset given; run split=NAME sh scripts/compare.sh" >&2
    exit 2
fi
out=${out:-exp/compare/$dataset${split:+/$split}${budget:+/${budget}_epochs}}
paired=${paired:-}
[ -n "${gpus:-}" ] || set -- device=auto "$@"

total=0
for row in $methods; do # report a typo before hours of training
    if [ ! -e "configs/methods/${row%%+*}.yaml" ]; then
        echo "compare: method $row: configs/methods/${row%%+*}.yaml does not exist; correct methods=\"...\"" >&2
        exit 2
    fi
    paired=${paired:-$row}
    for seed in $seeds; do total=$((total + 1)); done
done
. scripts/setup.sh
trap 'exit 130' INT # stop the comparison, not only the current run
echo "compare: $dataset $split${budget:+, $budget epochs}: $methods; seeds $seeds; $total runs into $out"

number=0 finished='' base='' failed=''
for row in $methods; do
    case $row in *+*) bottleneck=${row#*+} ;; *) bottleneck='' ;; esac
    for seed in $seeds; do
        number=$((number + 1)) folder=$out/$row/seed_$seed
        echo "compare: run $number of $total: $row, seed $seed"
        if dataset=$dataset method=${row%%+*} split=$split save_path=$folder \
            sh scripts/train.sh "${gpus:-1}" "${port:-29500}" \
            ${config:+--config "$config"} \
            "seed=$seed" ${budget:+"epochs=$budget"} ${bottleneck:+"model.bottleneck=$bottleneck"} "$@"; then
            finished="$finished
$row=$folder"
            [ "$row" != "$paired" ] || base=$row
        else
            case $? in 75 | 130) echo "compare: stopped; run the same command again to resume" >&2 && exit 75 ;; esac
            failed="$failed $row seed $seed,"
        fi
    done
done

status=0
IFS='
' # folder names may contain blanks
set -- $finished
[ $# -eq 0 ] || python -m allspark compare --out "$out" ${base:+"--paired=$base"} "$@" || status=$?
if [ -n "$failed" ]; then
    echo "compare: did not finish, see above:${failed%,}" >&2
    exit 1
fi
exit $status
