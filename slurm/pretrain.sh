#!/usr/bin/env bash
#SBATCH --job-name=sparselt
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#
# Pretrain on one or several nodes:
#
#   sbatch [options of sbatch] slurm/pretrain.sh [arguments of pretrain]
#   sbatch --nodes=2 --gpus-per-node=8 --cpus-per-gpu=8 --time=24:00:00 slurm/pretrain.sh --config base run.name=first
#
# Submit from a shell whose `python` has sparselt_dist installed. One process starts for each GPU, or for each task where
# the job has no GPUs. Without --cpus-per-gpu, --cpus-per-task or --exclusive many clusters give all processes of a node one
# core. Two minutes before the time limit Slurm tells every rank; they save a checkpoint and end with code 75, this script
# requeues the job, and its next start continues the same run folder. Every other exit code is the job's.
#
# A sweep: SWEEP names keys and their values, and each task of an array is one combination, in a run folder of its own. Its
# name is that of run.name or run.output_dir here, never in a file, with the values behind it:
#
#   export SWEEP='objective.name=mlm|cwt; run.seed=1|2|3'
#   sbatch --array=0-5 --gpus=1 --cpus-per-gpu=8 slurm/pretrain.sh --config base run.name=both
#
# Inside a container: CONTAINER is a command that runs another one in it, or options of srun (Pyxis):
#
#   CONTAINER='apptainer exec --nv sparselt_dist.sif' sbatch --gpus-per-node=8 --exclusive slurm/pretrain.sh --config base
#   CONTAINER='--container-image=sparselt_dist:cuda --container-mounts=/data' sbatch ... slurm/pretrain.sh --config base

set -uo pipefail

: "${SLURM_JOB_ID:?is not set: submit this script with sbatch}"

fail() {
    echo "error: $1" >&2
    exit 2
}

# Sets the variable that is named to a text without the blanks around it.
trim() {
    local bare=${2#"${2%%[![:space:]]*}"}
    printf -v "$1" '%s' "${bare%"${bare##*[![:space:]]}"}"
}

# In a container `python` is the container's own.
container=()
if [[ -n ${CONTAINER:-} ]]; then
    read -ra container <<<"$CONTAINER"
    python=python
else
    python=$(command -v python || command -v python3) ||
        fail "no python on PATH; activate the environment of sparselt_dist, then submit again"
fi

arguments=("$@")

# Sets `overrides` and `label` to those of a combination, by its number; fails for a number beyond the last.
combine() {
    local axis value rest=$1
    local -a values
    overrides=() label=''
    for ((axis = ${#keys[@]} - 1; axis >= 0; axis--)); do
        IFS='|' read -ra values <<<"${choices[axis]}"
        trim value "${values[rest % ${#values[@]}]}"
        rest=$((rest / ${#values[@]}))
        overrides=("${keys[axis]}=$value" ${overrides[@]+"${overrides[@]}"})
        label=${value//[^[:alnum:]._-]/_}${label:+-$label}
    done
    ((rest == 0))
}

# The array's task number counts through the combinations of SWEEP, the last key fastest.
if [[ -n ${SWEEP:-} ]]; then
    [[ -n ${SLURM_ARRAY_TASK_ID:-} ]] || fail "SWEEP is set for a job that is no array; submit with --array=0-N"
    IFS=';' read -ra axes <<<"${SWEEP//$'\n'/;}"
    keys=() choices=()
    for axis in "${axes[@]}"; do
        trim text "$axis"
        [[ -n $text ]] || continue
        [[ $text == *=?* ]] || fail "SWEEP: found '$text', expected key=VALUE|VALUE, separated by ';'"
        keys+=("${text%%=*}") choices+=("${text#*=}")
    done
    declare -A numbers=()
    for ((number = 0; ; number++)); do
        combine "$number" || break
        twin=${numbers[x$label]:-}
        [[ -z $twin ]] ||
            fail "SWEEP: tasks $twin and $number would share a folder, NAME-$label; expected values that differ in letters or digits"
        numbers[x$label]=$number
    done
    combine "$SLURM_ARRAY_TASK_ID" ||
        fail "--array: found task $SLURM_ARRAY_TASK_ID, expected 0-$((number - 1)): SWEEP has $number combinations"
    # Runs must not meet in one folder: name and folder that were given get the combination's values behind them. A folder
    # in a configuration file would be that of all, so it is always named here.
    name=sweep folder=
    for argument in ${arguments[@]+"${arguments[@]}"}; do
        case $argument in
        run.name=*) name=${argument#*=} ;;
        run.output_dir=*) folder=${argument#*=} ;;
        esac
    done
    name=$name-$label folder=${folder:+${folder%/}-$label}
    arguments+=("${overrides[@]}" "run.name=$name" "run.output_dir=${folder:-runs/$name}")
    echo "job $SLURM_JOB_ID: task $SLURM_ARRAY_TASK_ID of the sweep: ${overrides[*]}, in ${folder:-runs/$name}"
fi

# The first node's name where it resolves, else the address by which Slurm knows it.
first_host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
if ! getent hosts "$first_host" >/dev/null; then
    address=$(scontrol show node "$first_host" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
    first_host=${address:-$first_host}
fi
export MASTER_ADDR=$first_host

# The port follows from the job's number, so jobs that share a node differ; this script runs on the first node, where
# a port taken by another program shows. The next choice is far off, where no neighbour in the queue looks first.
port=$((20000 + SLURM_JOB_ID % 10000))
while (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
    port=$((20000 + (port - 20000 + 3571) % 10000))
done
export MASTER_PORT=$port

# Since Slurm 22.05 srun no longer takes this from the job by itself.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi

# A clean stop must not be cut short by the first rank that ends (--kill-on-bad-exit=0); a rank that died must not keep
# the others waiting for ever (--wait). Every line of the job's output begins with its rank (--label).
options=(--export=ALL --kill-on-bad-exit=0 --wait=300 --label)
gpus=${SLURM_GPUS_ON_NODE:-0}
if ((gpus > 0)); then
    ranks=$((SLURM_JOB_NUM_NODES * gpus))
    asked=${SLURM_GPUS:-$ranks}
    asked=${asked##*:}
    [[ $asked =~ ^[0-9]+$ && $asked != "$ranks" && $SLURM_GPUS != *,* ]] &&
        fail "--gpus: found $asked, not as many on each of $SLURM_JOB_NUM_NODES nodes ($gpus on the first); use --gpus-per-node"
    # These are of the job's tasks; here a task is a GPU.
    unset SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK SLURM_NTASKS_PER_GPU
    options+=(--ntasks="$ranks" --ntasks-per-node="$gpus")
    if ((${SLURM_NTASKS:-$SLURM_JOB_NUM_NODES} < ranks)); then
        options+=(--overcommit) # fewer tasks, hence perhaps fewer cores, were asked for than GPUs
    fi
fi
if [[ ${container[0]:-} == --* ]]; then
    options+=("${container[@]}")
    container=()
fi

# A notice that comes before a rank can take it is held until then, not fatal (coreutils 8.31 and later). Asked where the
# rank starts: with Pyxis that is in the container, whose programs may be others than this node's.
# shellcheck disable=SC2016 # expanded by each task
hold=(sh -c 'env --block-signal=USR1 true 2>/dev/null && exec env --block-signal=USR1 "$@"; exec "$@"' sh)

# Slurm signals the ranks itself. Where it signals only this shell (--signal=B:..., scancel --batch), srun hands it on,
# always as USR1: a TERM would make it kill them.
step='' signalled=0
# shellcheck disable=SC2317 # called by a trap
forward() {
    signalled=1
    if [[ -n $step ]]; then kill -s USR1 "$step" 2>/dev/null; fi
}
trap forward USR1 TERM

if ((${SLURM_RESTART_COUNT:-0} > 0)); then
    arguments+=(--resume auto) # whatever the first start was told, a later one continues it
fi

# Left by another launcher in the shell that submits, they would hide the places that Slurm gives the ranks.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_SIZE LOCAL_WORLD_SIZE

export PYTHONUNBUFFERED=1
srun "${options[@]}" "${hold[@]}" ${container[@]+"${container[@]}"} \
    "$python" -m sparselt_dist.pretrain ${arguments[@]+"${arguments[@]}"} &
step=$!

while :; do # a signal ends the wait, not the step
    signalled=0
    wait "$step"
    code=$?
    ((signalled)) || break
done

job=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
    job=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}
fi

# Cancelled, preempted, or at the end of its time limit: whether it runs again is then not for us to say.
ending() {
    [[ $(scontrol show job "$job" 2>/dev/null) =~ JobState=(COMPLETING|CANCELLED|TIMEOUT|PREEMPTED) ]]
}

if ((code == 75)) && ! ending; then
    if scontrol requeue "$job"; then
        echo "job $job: stopped after a checkpoint and requeued; it continues at the next start"
        exit 0
    fi
    echo "error: job $job could not be requeued; submit it again to continue" >&2
fi
exit "$code"
