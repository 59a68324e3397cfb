#!/usr/bin/env bash
# Everything that only a GPU can show, in one go: build, correctness, kernels, training. Results go to benchmarks/results, and to $OUT too
# where that is set. Without a network, wheels of what is missing may lie in .whl.
#   bash benchmarks/on_gpu.sh            all
#   bash benchmarks/on_gpu.sh test       build and correctness alone; or: sanitize, kernels, training, layouts; of kernels: loss, embedding, linear
set -uo pipefail
cd "$(dirname "$0")/.."
export TOKENIZERS_PARALLELISM=false DS_BUILD_OPS=0 MEGATRON_PATCH_CUDA=1
python=${PYTHON:-python3}
if compgen -G '.whl/*.whl' >/dev/null; then
  $python -m pip install -q --no-index --no-deps --no-compile --target "$HOME/site" .whl/*.whl
  export PYTHONPATH="$HOME/site:$PWD${PYTHONPATH:+:$PYTHONPATH}"
else
  export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
fi
what=${1:-all}
failed=0
step() {
  echo "== $*"
  "$@" || { echo "== FAILED ($?): $*"; failed=1; }
}
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
step $python setup.py -q build_ext --inplace
step $python -m megatron_patch.ops
case $what in all | test) step $python -m pytest tests/gpu tests/model/test_attention.py -m gpu -q ;; esac
# Races in shared memory, finer than the tests on the CPU see, and accesses outside of what was allocated.
case $what in all | sanitize)
  for tool in racecheck memcheck; do
    step compute-sanitizer --tool $tool --error-exitcode 1 $python -m pytest tests/gpu/test_operators.py -m gpu -k the_same_bits -q -o timeout=900
  done
  ;;
esac
for operator in loss embedding linear; do
  case $what in all | kernels | "$operator") step $python benchmarks/kernels.py --operators $operator ;; esac
done
case $what in all | training) step $python benchmarks/training.py ;; esac
# The 1.3B shape, both stages, plain and compiled; then where a step's time goes.
case $what in all | layouts)
  step $python benchmarks/layouts.py --ranks 1 --layouts DP1 "DP1 compiled" --patch-size 4
  step $python benchmarks/layouts.py --profile --steps 6 --micro-batches 2 --flags=--compile
  ;;
esac
if [ -n "${OUT:-}" ]; then cp benchmarks/results/*-cuda-*.json "$OUT"/ 2>/dev/null; fi
exit $failed
