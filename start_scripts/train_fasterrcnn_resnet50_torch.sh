#!/usr/bin/env bash
# Train Faster R-CNN with a ResNet-50-FPN on one device, in float32.
# train.py's defaults are the COCO recipe: ImageNet backbone, 26 epochs with lr steps after 16 and 22,
# 2 images per device, lr 0.02 for 16 images per step, momentum 0.9, weight decay 1e-4, horizontal
# flip, batches of similar aspect ratio. Flags on the command line override them:
#   bash train_fasterrcnn_resnet50_torch.sh --data-path my_images --epochs 12
# CUDA_VISIBLE_DEVICES selects the device; without a GPU, it trains on the CPU.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run_one "$@"
