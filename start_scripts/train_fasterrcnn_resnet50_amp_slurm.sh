#!/usr/bin/env bash
# Train Faster R-CNN with a ResNet-50-FPN under Slurm, in mixed precision: one torchrun on each node.
#   bash train_fasterrcnn_resnet50_amp_slurm.sh --data-path my_images --output-dir my_output
# submits itself; set options of sbatch by SBATCH_FLAGS="--nodes=4 --partition=gpu". Two minutes before
# the time limit, or on preemption, all processes save and the job is requeued and resumes, until the
# training is complete. Install first (init_torch.sh). The project and the output folder must be on a
# file system that all nodes share.
#SBATCH --job-name=faster-rcnn
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

if [ -z "${SLURM_JOB_ID:-}" ]; then
    # Slurm runs a copy of this file in another folder: pass the path of the original.
    START_SCRIPTS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    export START_SCRIPTS
    read -ra flags <<< "${SBATCH_FLAGS:-}"
    exec sbatch ${flags[@]+"${flags[@]}"} "$START_SCRIPTS/$(basename "${BASH_SOURCE[0]}")" "$@"
fi
: "${START_SCRIPTS:?submit this file by: bash start_scripts/train_fasterrcnn_resnet50_amp_slurm.sh}"

NNODES=$SLURM_JOB_NUM_NODES
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))} # two jobs may share a node
export NNODES MASTER_ADDR MASTER_PORT

# NODE_RANK is set on each node. When one node ends, srun waits a minute for the others.
srun --kill-on-bad-exit=0 --wait=60 bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$0" "$@"' \
    "$START_SCRIPTS/train_fasterrcnn_resnet50_amp_multinode_torch.sh" "$@" &
step=$!
signalled=
trap 'signalled=1; kill -USR1 "$step" || true' USR1 TERM # srun passes it to all nodes

wait_for_step() {
    exit_code=0
    wait "$step" || exit_code=$?
}
wait_for_step
while [ -n "$signalled" ]; do # a signal interrupts wait, but not srun
    signalled=
    wait_for_step
done
if [ "$exit_code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$exit_code"
