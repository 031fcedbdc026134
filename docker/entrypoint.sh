#!/bin/sh
# What a container runs. Every branch ends in exec, so that signals reach the program itself.
#
#   nothing, options, key.path=value, pretrain ...   pretrain on all devices; RANKS=N sets the number of ranks
#   another command of `sparselt`                    that command
#   anything else                                    is run as it stands
set -eu

case "${1:-}" in
healthcheck)
    # Healthy: no run has started below the working directory, or one has written its journal lately.
    minutes=${HEALTH_MINUTES:-60}
    [ -z "$(find . -maxdepth 4 -name metrics.jsonl -print -quit)" ] ||
        [ -n "$(find . -maxdepth 4 -name metrics.jsonl -mmin "-$minutes" -print -quit)" ]
    exit
    ;;
pretrain | "" | -* | *=*)
    if [ "${1:-}" = pretrain ]; then shift; fi
    exec deepspeed ${RANKS:+--num_gpus "$RANKS"} -m sparselt_dist.pretrain "$@"
    ;;
prepare | shards | doctor | plan | evaluate | typing | export | convert | compare | mlflow-sync)
    exec sparselt "$@"
    ;;
*)
    exec "$@"
    ;;
esac
