#!/usr/bin/env bash
#SBATCH --job-name=sparselt-evaluate
#SBATCH --requeue
#SBATCH --open-mode=append
#
# Evaluate checkpoints, run folders or exported models, each with the same arguments, one process and one GPU at most:
#
#   sbatch [options of sbatch] slurm/evaluate.sh MODEL... [options of evaluate]
#   sbatch --gpus=1 slurm/evaluate.sh runs/first --tasks yardsticks
#   sbatch --gpus=1 --array=0-5 slurm/evaluate.sh runs/both-*
#   sbatch --dependency=afterok:JOB --gpus=1 slurm/evaluate.sh runs/first
#
# Submit from a shell whose `python` has sparselt_dist installed. Of an array each task takes its share of the models, so
# task numbers must have no gaps; otherwise one comes after the other. A model that fails does not keep the next from
# its turn; the job ends with the first failure's code. CONTAINER: as in slurm/pretrain.sh, a command.

set -uo pipefail

: "${SLURM_JOB_ID:?is not set: submit this script with sbatch}"

fail() {
    echo "error: $1" >&2
    exit 2
}

container=()
if [[ -n ${CONTAINER:-} ]]; then
    read -ra container <<<"$CONTAINER"
    python=python
else
    python=$(command -v python || command -v python3) ||
        fail "no python on PATH; activate the environment of sparselt_dist, then submit again"
fi
export PYTHONUNBUFFERED=1

models=()
while (($#)) && [[ $1 != -* ]]; do
    models+=("$1")
    shift
done
((${#models[@]})) || fail "found no model; expected checkpoints, run folders or exported models before the options"

first=0 stride=1
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    # shellcheck disable=SC2153 # Slurm sets them
    ((SLURM_ARRAY_TASK_MAX - SLURM_ARRAY_TASK_MIN + 1 == SLURM_ARRAY_TASK_COUNT)) ||
        fail "--array: found task numbers with gaps, expected consecutive ones, such as --array=0-$((${#models[@]} - 1))"
    first=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN)) stride=$SLURM_ARRAY_TASK_COUNT
fi

worst=0
for ((number = first; number < ${#models[@]}; number += stride)); do
    echo "evaluating ${models[number]}"
    ${container[@]+"${container[@]}"} "$python" -m sparselt_dist.evaluate "${models[number]}" "$@"
    code=$?
    ((worst)) || worst=$code
done
exit "$worst"
