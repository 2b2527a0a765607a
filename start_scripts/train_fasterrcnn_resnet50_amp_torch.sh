#!/usr/bin/env bash
# Train Faster R-CNN with a ResNet-50-FPN on one device, in mixed precision.
# What is not said here is train.py's default, which is the COCO recipe: ImageNet backbone, 26 epochs
# with drops after 16 and 22, 2 images on each device, lr 0.02 for 16 images in a step, momentum 0.9,
# weight decay 1e-4, horizontal flip, batches of similar shape. Flags of your own come last and win:
#   bash train_fasterrcnn_resnet50_amp_torch.sh --data-path my_images --epochs 12
# CUDA_VISIBLE_DEVICES chooses the device; without one it trains on the CPU.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run_one --amp "$@"
