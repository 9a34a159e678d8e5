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
# One task per GPU. A task uses the GPU with the number of its SLURM_LOCALID, or the only one it sees
# (--gpus-per-task=1). Two nodes of eight GPUs:
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 scripts/slurm_train.sh batch_size=16
# Another recipe: dataset=cityscapes method=imas split=1_4 sbatch scripts/slurm_train.sh (methods: docs/methods.md)
# Your own recipe: sbatch scripts/slurm_train.sh --config my.yaml. Parallel runs need different folders:
#   for seed in 0 1 2; do save_path=exp/voc/seed_$seed sbatch scripts/slurm_train.sh seed=$seed; done
# Two minutes before the time limit, Slurm sends SIGUSR1: training finishes its step, saves and exits with code 75, and
# the job requeues itself and resumes. A preempted job that is requeued does the same. A task that dies ends the others
# within 60 s. Use --signal=USR1@300 if a step or a checkpoint takes long.
# Compute nodes often have no network: run scripts/setup.sh once on the login node.
set -euo pipefail
recipe=(${save_path:+--save-path "$save_path"})
if [[ " $* " == *" --config"[\ =]* ]]; then
    recipe+=(${method:+--method "$method"} ${split:+--split "$split"})
else
    recipe+=(--dataset "${dataset:-pascal}" --method "${method:-fixmatch}" --split "${split:-1_8}")
fi

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    echo "usage: sbatch scripts/slurm_train.sh [key.path=value ...]" >&2
    exit 2
fi
job=$SLURM_JOB_ID # in an array job, the id of this task
[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
# Slurm runs a copy of this file; the job record has the path of the original, followed by the arguments.
script=$(scontrol show job "$job" | sed -n 's/^ *Command=//p')
script=${script%%$'\n'*}
cd -- "${script%%/slurm_train.sh*}/.."
. scripts/setup.sh

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${MASTER_ADDR:-${hosts%%$'\n'*}}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not inherit it from sbatch

status=0 # --wait, not --kill-on-bad-exit: tasks that exit one after the other are not killed
srun --wait=60 --kill-on-bad-exit=0 python train.py ${recipe[@]+"${recipe[@]}"} "$@" || status=$?
if [[ $status -eq 75 ]]; then
    echo "slurm_train: stopped and saved; requeueing"
    scontrol requeue "$job" || echo "slurm_train: not requeued (already in the queue?); submit it again to resume" >&2
fi
exit $status
