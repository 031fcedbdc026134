#!/usr/bin/env bash
#SBATCH --job-name=sparselt-prepare
#SBATCH --requeue
#SBATCH --open-mode=append
#
# Prepare shards on several nodes that share a file system; the bytes are those of one process on one machine:
#
#   sbatch [options of sbatch] slurm/prepare.sh [arguments of prepare]
#   sbatch --nodes=4 --cpus-per-task=64 slurm/prepare.sh prepare.source=texts/ prepare.output_dir=shards/mine
#   sbatch --array=0-15 --cpus-per-task=8 slurm/prepare.sh prepare.source=texts/ prepare.output_dir=shards/mine
#
# Submit from a shell whose `python` has sparselt_dist installed. A job on several nodes starts one process, a part of the
# work, on each (or one for each task that is asked for); of an array each task is a part. Parts wait for each other at every
# stage, --wait-minutes (30 if not given) for one that has not started: so all tasks of an array must find room at once, and
# %N is refused. Ask for no more than are sure to run together; a job on several nodes starts only when all are free. A job
# that was killed, requeued or submitted again continues.

set -uo pipefail

: "${SLURM_JOB_ID:?is not set: submit this script with sbatch}"

python=$(command -v python || command -v python3) || {
    echo "error: no python on PATH; activate the environment of sparselt_dist, then submit again" >&2
    exit 2
}
export PYTHONUNBUFFERED=1

if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    # Task numbers of an array need not begin at 0, but must have no gaps, for parts are numbered without.
    # shellcheck disable=SC2153 # Slurm sets them
    if ((SLURM_ARRAY_TASK_MAX - SLURM_ARRAY_TASK_MIN + 1 != SLURM_ARRAY_TASK_COUNT)); then
        echo "error: --array: found task numbers with gaps, expected consecutive ones, such as --array=0-15" >&2
        exit 2
    fi
    throttle=$(scontrol show job "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" | grep -o 'ArrayTaskThrottle=[0-9]*')
    throttle=${throttle#*=}
    if ((${throttle:-0} > 0 && throttle < SLURM_ARRAY_TASK_COUNT)); then
        echo "error: --array: found %$throttle, but tasks wait for each other, so all must run at once; leave it out, or" \
            "make an array of $throttle tasks" >&2
        exit 2
    fi
    part=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))/$SLURM_ARRAY_TASK_COUNT
    exec "$python" -m sparselt_dist.prepare "$@" --part "$part"
fi

# Since Slurm 22.05 srun no longer takes this from the job by itself.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi

# The first part that fails ends the others, which would wait for it.
# shellcheck disable=SC2016 # expanded by each task
exec srun --export=ALL --kill-on-bad-exit=1 --ntasks="${SLURM_NTASKS:-$SLURM_JOB_NUM_NODES}" bash -c \
    'exec "$0" -m sparselt_dist.prepare "$@" --part "$SLURM_PROCID/$SLURM_NTASKS"' "$python" "$@"
