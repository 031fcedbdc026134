#!/bin/sh
# What a container runs. Every branch ends in exec, so that signals reach the program itself.
#
#   nothing, options, key.path=value, pretrain ...   pretrain on all devices; RANKS=N sets the number of ranks
#   the name of a shipped profile, ...               the same with that profile
#   another command of `sparselt`                    that command
#   anything else                                    is run as it stands
#
# A configuration mounted at /config/config.yaml (or where CONFIG says) is used by pretrain, doctor and plan; --config and
# overrides on the command line stand above it. Several containers are one run where HOSTS names them all, separated by
# commas, and HOST_NUMBER says which of them this is; each starts RANKS ranks (1 if not given).
set -eu

CONFIG=${CONFIG:-/config/config.yaml}

pretrain() {
    if [ -r "$CONFIG" ]; then set -- --config "$CONFIG" "$@"; fi
    if [ -z "${HOSTS:-}" ]; then
        exec deepspeed ${RANKS:+--num_gpus "$RANKS"} -m sparselt_dist.pretrain "$@"
    fi
    hostfile=$(mktemp)
    echo "$HOSTS" | tr , '\n' | sed "s/\$/ slots=${RANKS:-1}/" >"$hostfile"
    exec deepspeed --hostfile "$hostfile" --no_ssh --node_rank "$HOST_NUMBER" --master_addr "${HOSTS%%,*}" \
        -m sparselt_dist.pretrain "$@"
}

case "${1:-}" in
healthcheck)
    # Healthy: no run has started below the working directory, or one has written its journal lately.
    minutes=${HEALTH_MINUTES:-60}
    [ -z "$(find . -maxdepth 4 -name metrics.jsonl -print -quit)" ] ||
        [ -n "$(find . -maxdepth 4 -name metrics.jsonl -mmin "-$minutes" -print -quit)" ]
    exit
    ;;
quickstart | crammed | crammed-* | base | large | slt-continue)
    profile=$1
    shift
    pretrain --config "$profile" "$@"
    ;;
pretrain | "" | -* | *=*)
    if [ "${1:-}" = pretrain ]; then shift; fi
    pretrain "$@"
    ;;
doctor | plan)
    command=$1
    shift
    if [ -r "$CONFIG" ]; then set -- --config "$CONFIG" "$@"; fi
    exec sparselt "$command" "$@"
    ;;
prepare | shards | evaluate | typing | export | convert | compare | mlflow-sync)
    exec sparselt "$@"
    ;;
*)
    exec "$@"
    ;;
esac
