#!/usr/bin/env bash
# Runs all tests and benchmarks that need a GPU: build, correctness, kernels against their peers, training, real text.
#   bash benchmarks/on_gpu.sh first                    within 430 s
#   bash benchmarks/on_gpu.sh second                   steps that did not pass in the last call of first, then a study; within 220 s
#   bash benchmarks/on_gpu.sh loss operators           steps by name; --list prints the names, --help all options
# It needs the dependencies of the package: after `make venv`, set PYTHON=.venv/bin/python. Without a network, put wheels of missing packages
# into .whl. Results go to runs/on_gpu; the archive goes to runs, or to $OUT if it is set.
set -uo pipefail
export ON_GPU_FROM=$PWD
cd "$(dirname "$0")/.." || exit
export ON_GPU_BEGAN=${ON_GPU_BEGAN:-$(date +%s)} TOKENIZERS_PARALLELISM=false DS_BUILD_OPS=0
python=${PYTHON:-python3}
if compgen -G '.whl/*.whl' >/dev/null; then
  site=${SITE:-$HOME/site}
  "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" .whl/*.whl || {
    echo "cannot install the wheels in .whl; see pip's messages above" >&2
    exit 1
  }
  export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}"
else
  export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
fi
exec "$python" benchmarks/on_gpu.py "$@"
