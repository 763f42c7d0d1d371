#!/usr/bin/env bash
# Pretrain on machines that have ssh, and one disk with the rows, the run and Python:
#   GPUS=8 ssh.sh hosts.txt --config 7b.toml --data rows --out run
# The hosts are lines of a file, or words with commas between them; processes find each other at
# the first one, so all must know it by that name. The rest goes to `mptbook pretrain`. Ctrl-C or
# SIGTERM saves and ends the run.
#
# Options are as in the manuals of ssh and torchrun. Tested with a stand-in for ssh on one
# machine, not on a cluster.
set -euo pipefail

die() { echo "error: $1" >&2; exit 2; }
: "${GPUS:=8}" "${PORT:=29400}" "${RESTARTS:=8}"
[[ ${1:--} != -* && ${2:-} == --* ]] || die "usage: ssh.sh HOSTS --config FILE --data ROWS --out RUN"
[[ $GPUS =~ ^[1-9][0-9]*$ ]] || die "GPUS=$GPUS is no number of GPUs of each host"
[[ $PORT =~ ^[1-9][0-9]*$ ]] || die "PORT=$PORT is no port of the first host"
[[ $RESTARTS =~ ^[0-9]+$ ]] || die "RESTARTS=$RESTARTS is no number of restarts"
torchrun=$(command -v torchrun) || die "torchrun is not found; activate the environment first"
if [[ -f $1 ]]; then read -rd '' -a hosts < "$1" || true; else IFS=, read -ra hosts <<< "$1"; fi
[[ ${#hosts[@]} -gt 0 ]] || die "$1 names no host; write one a line"
shift

# What this script holds open every host reads: when it ends, however it ends, so do they.
hold=$(mktemp -d)
trap 'rm -rf "$hold"' EXIT
mkfifo "$hold/open"
exec 3<> "$hold/open"
stopping=false
trap 'stopping=true' INT TERM

for host in "${hosts[@]}"; do
    # Without the first of these restarted processes look for those that died (pytorch#135712).
    # --local-addr: a host is called by the name it has here, whatever it calls itself.
    printf -v run '%q ' env TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "$torchrun" \
        --nnodes "${#hosts[@]}" --nproc-per-node "$GPUS" --local-addr "${host#*@}" \
        --rdzv-backend c10d --rdzv-id "mptbook-$PORT" --rdzv-endpoint "${hosts[0]#*@}:$PORT" \
        --max-restarts "$RESTARTS" --shutdown-timeout 600 -m mptbook pretrain "$@" --resume
    # There the end of the input becomes a SIGTERM, at which the run saves and ends.
    there="exec 3<&0; $run 3<&- < /dev/null & run=\$!; { read -r; kill \$run; } <&3 > /dev/null 2>&1 &"
    there+=" watch=\$!; wait \$run; code=\$?; kill \$watch 2> /dev/null; exit \$code"
    printf -v there 'cd %q && exec bash -c %q' "$PWD" "$there"
    ssh -o BatchMode=yes -o ServerAliveInterval=30 "$host" "$there" < "$hold/open" 3>&- &
done

code=0
for _ in "${hosts[@]}"; do wait -n || { code=$?; break; }; done
"$stopping" || [[ $code == 0 ]] || echo "error: a host ended with code $code; ending all" >&2
exec 3>&-
wait
exit "$code"
