#!/usr/bin/env bash
# Train Faster R-CNN with a ResNet-50-FPN on all devices of several machines, in mixed precision. Start
# it on each machine, with the same flags, and with the output folder on a shared file system:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=first.machine bash train_fasterrcnn_resnet50_amp_multinode_torch.sh
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=first.machine bash train_fasterrcnn_resnet50_amp_multinode_torch.sh
# MASTER_ADDR is the machine with NODE_RANK 0; MASTER_PORT (default: 29400) must be free there.
# After a failure, all processes restart from the newest checkpoint, up to MAX_RESTARTS times (default:
# 3); start a failed machine again with the same command, the others wait for it. The rest is as in
# train_fasterrcnn_resnet50_amp_dist_torch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

for name in NNODES NODE_RANK MASTER_ADDR; do
    [ -n "${!name:-}" ] || fail "$name is not set: NNODES=2 NODE_RANK=0 MASTER_ADDR=first.machine bash $0"
done
export NNODES NODE_RANK MASTER_ADDR MAX_RESTARTS=${MAX_RESTARTS:-3}
run_all --amp --resume auto "$@"
