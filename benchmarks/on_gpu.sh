#!/usr/bin/env bash
# Everything that only a GPU can show, in one call: build, correctness, kernels against their peers, training, real text.
#   bash benchmarks/on_gpu.sh first                    fits 430 s
#   bash benchmarks/on_gpu.sh second                   what did not pass in the last call of first, then a study; fits 220 s
#   bash benchmarks/on_gpu.sh loss operators           steps by name; --list names them, --help says more
# It needs the package's dependencies: after `make venv`, say PYTHON=.venv/bin/python. Without a network, wheels of what is missing may lie
# in .whl. Results go to runs/on_gpu, and packed to runs, or to $OUT where that is set.
set -uo pipefail
export ON_GPU_FROM=$PWD
cd "$(dirname "$0")/.."
export ON_GPU_BEGAN=${ON_GPU_BEGAN:-$(date +%s)} TOKENIZERS_PARALLELISM=false DS_BUILD_OPS=0
python=${PYTHON:-python3}
if compgen -G '.whl/*.whl' >/dev/null; then
  site=${SITE:-$HOME/site}
  $python -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" .whl/*.whl || {
    echo "the wheels in .whl cannot be installed: pip's lines above say why" >&2
    exit 1
  }
  export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}"
else
  export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
fi
exec $python benchmarks/on_gpu.py "$@"
