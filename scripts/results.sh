#!/bin/sh
# sh scripts/results.sh: the tables and curves of the runs whose numbers are kept in docs/runs/, each folder of it a
# footing (data set, lists, budget) that its rows share. <footing>/<row>/seed_<n> holds config.yaml, metrics.jsonl and, if
# younger than revision 5182294, run.json as train.py wrote them; what `allspark compare` makes of them goes beside the
# rows; parts.json of scripts/parts.py becomes parts.png.
set -eu
cd -- "$(dirname -- "$0")/.."
. scripts/setup.sh
for footing in docs/runs/*/; do
    set --
    for row in supervised $(LC_ALL=C ls "$footing"); do # the first row is the one that others are compared with
        case " $* " in *" $row="*) continue ;; esac
        for run in "$footing$row"/seed_*; do
            [ ! -d "$run" ] || set -- "$@" "$row=$run"
        done
    done
    python -m allspark compare --out "${footing%/}" "$@" >/dev/null
    [ ! -f "${footing}parts.json" ] || python scripts/parts.py --draw "${footing}parts.json"
    echo "results: ${footing}table.md"
done
