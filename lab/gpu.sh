#!/usr/bin/env bash
# Measure this code base on a GPU, or train GPT-2 124M from scratch there; lab/gpu.py says what and how.
#   lab/gpu.sh measure --out_dir=out/gpu
#   lab/gpu.sh train --out_dir=out/gpu --shared=../shared
#   lab/gpu.sh table --out_dir=out/gpu
set -euo pipefail
cd "$(dirname "$0")/.."
[[ "${1:-}" == -* ]] || set -- --do="${1:-}" "${@:2}" # options alone, as --help, go through
exec "${PYTHON:-python3}" lab/gpu.py "$@"
