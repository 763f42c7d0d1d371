#!/usr/bin/env bash
# Pretrain on 1 to 64 machines under Slurm, all on one shared disk:
#   sbatch --nodes 55 --time 24:00:00 slurm.sh --config 7b.toml --data rows --out run
# What follows the script goes to `mptbook pretrain`, paths as from where sbatch is called.
#
# Options and signals are as in the manuals of sbatch, srun and scancel, those of torchrun as in
# PyTorch's. Tested with stand-ins for Slurm's commands, not on a cluster.
#SBATCH --job-name=mptbook
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@900
set -euo pipefail

die() { echo "error: $1" >&2; exit 2; }
[[ ${1:-} == --* ]] || die "usage: sbatch slurm.sh --config FILE --data ROWS --out RUN"
[[ -n ${SLURM_JOB_ID:-} ]] || die "this is no Slurm job; start it by sbatch"
[[ ${SLURM_GPUS_ON_NODE:-0} -gt 0 ]] || die "the job has no GPUs; sbatch --gpus-per-node 8"
command -v torchrun > /dev/null || die "torchrun is not found; activate the environment, then sbatch"
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# Without it restarted processes look for those that died (pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# B: above has Slurm tell this script alone that the time ends, 15 minutes before; USR1, as a
# cancelled job gets SIGTERM and is not to come again. srun would answer a SIGTERM by killing all;
# scancel has each torchrun get it, which passes it on, and the run saves after its step.
stopping=false
trap 'stopping=true; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

# One torchrun on each node, not bound to some of its cores: eight processes need them all. The
# port comes from the job, so that two jobs do not meet. 600 seconds to save in, not torchrun's 30.
srun --kill-on-bad-exit=1 --cpu-bind=none torchrun \
    --nnodes "${#nodes[@]}" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "${nodes[0]}:$((20000 + SLURM_JOB_ID % 10000))" \
    --max-restarts 8 --shutdown-timeout 600 \
    -m mptbook pretrain "$@" --resume &
step=$!

# In the background, as a trap waits for what is in the foreground; and it interrupts `wait`.
code=0
wait "$step" || code=$?
while kill -0 "$step" 2> /dev/null; do
    code=0
    wait "$step" || code=$?
done
if "$stopping" && [[ $code != 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID" # this script again, and the run goes on
fi
exit "$code"
