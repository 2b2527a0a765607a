#!/usr/bin/env bash
# From nothing to a trained detector in a few minutes: install, make the built-in data set of shapes,
# train on it from random weights and evaluate. Run again, it goes on where it was stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ensure_installed
data=$ROOT/datasets/shapes
output=$ROOT/output/quickstart
[ -f "$data/annotations/instances_val2017.json" ] || "$PYTHON" "$ROOT/datasets/shapes.py" "$data"
bash "$ROOT/start_scripts/train_fasterrcnn_resnet50_amp_torch.sh" --data-path "$data" \
    --weights-backbone none --min-size 128 --batch-size 4 --epochs 3 --lr-scheduler cosineannealinglr \
    --lr 0.03 --warmup-steps 50 --clip-grad-norm 10 --output-dir "$output" --resume auto "$@"
cat << END

In that folder:
  report.html       open it in a browser: curves, errors, images with boxes
  model_best.pth    the detector with the best AP
  detections.json   its boxes on the validation images, in COCO's results format
  metrics.jsonl     every loss and every AP
Train on your own images next: README.md, "Your own data".
END
