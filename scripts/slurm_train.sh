#!/usr/bin/env bash
#SBATCH --job-name=allspark
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

# sbatch scripts/slurm_train.sh [train.py options and key.path=value ...]
# One task per GPU; every task sees its node's GPUs and train.py picks its own by SLURM_LOCALID. Two nodes of eight:
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 scripts/slurm_train.sh batch_size=16
# Another recipe: change the three lines, or say it in front: method=fixmatch split=1_4 sbatch scripts/slurm_train.sh
# A recipe of your own: sbatch scripts/slurm_train.sh --config my.yaml. Runs side by side need folders of their own:
#   for seed in 0 1 2; do save_path=exp/voc/seed_$seed sbatch scripts/slurm_train.sh seed=$seed; done
# Two minutes before its time is up, slurm sends SIGUSR1: training finishes its step, saves and ends with exit code 75,
# and the job puts itself back into the queue and goes on where it was. So does a job that is preempted and requeued.
# A task that dies ends the others within 60 s. Give --signal=USR1@300 to sbatch where a step or a checkpoint is slow.
# Compute nodes often have no network: run scripts/setup.sh once on the login node.
set -euo pipefail
dataset=${dataset:-pascal}
method=${method:-allspark}
split=${split:-1_8}
recipe=(--dataset "$dataset" --method "$method" --split "$split" --save-path "${save_path:-exp/$dataset/$method/$split}")
[[ " $* " != *" --config"[\ =]* ]] || recipe=(${save_path:+--save-path "$save_path"})

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    echo "usage: sbatch scripts/slurm_train.sh [key.path=value ...]" >&2
    exit 2
fi
job=$SLURM_JOB_ID # a task of an array may have the id of the whole array, too
[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
# Slurm runs a copy of this file; the job's record says where the file itself is, and its arguments behind that.
script=$(scontrol show job "$job" | sed -n 's/^ *Command=//p')
script=${script%%$'\n'*}
cd -- "$(dirname -- "${script%%.sh*}.sh")/.."
. scripts/setup.sh

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${MASTER_ADDR:-${hosts%%$'\n'*}}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun no longer takes it from sbatch by itself

status=0 # --wait, not --kill-on-bad-exit: tasks that end in order, one after the other, are left in peace
srun --wait=60 --kill-on-bad-exit=0 python train.py ${recipe[@]+"${recipe[@]}"} "$@" || status=$?
if [[ $status -eq 75 ]]; then
    echo "slurm_train: stopped and saved; back into the queue"
    scontrol requeue "$job" || echo "slurm_train: not requeued (is it already?); sbatch it again to go on" >&2
fi
exit $status
