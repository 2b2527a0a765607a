#!/usr/bin/env bash
# Train a small detector in a few minutes: install, make the built-in data set of shapes, train from
# random weights, and evaluate. If interrupted, run it again to continue.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ensure_installed
data=$ROOT/datasets/shapes
output=$ROOT/output/quickstart
if [ ! -f "$data/annotations/instances_val2017.json" ]; then # none, or interrupted
    rm -rf "$data"
    "$PYTHON" "$ROOT/datasets/shapes.py" "$data"
fi
bash "$ROOT/start_scripts/train_fasterrcnn_resnet50_amp_torch.sh" --data-path "$data" \
    --weights-backbone none --min-size 128 --batch-size 4 --epochs 3 --lr-scheduler cosineannealinglr \
    --lr 0.03 --warmup-steps 50 --clip-grad-norm 10 --output-dir "$output" --resume auto "$@"
cat << END

In that folder:
  report.html       curves, errors and images with boxes; open it in a browser
  suspects.json     annotations that may be wrong, worst first, in COCO's format
  model_best.pth    the checkpoint with the best AP
  detections.json   detections on the validation images, in COCO's results format
  metrics.jsonl     all losses and APs
Next, train on your own images: README.md, "Your own data".
END
