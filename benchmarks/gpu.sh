#!/usr/bin/env bash
# Every measurement that needs a GPU, on one card with 80 GB, in at most 29 minutes.
#
#     benchmarks/gpu.sh [FOLDER]          # default: runs/gpu
#
# Install first: pip install -e .[cuda,test]. Each step writes FOLDER/NAME.log and has a time limit;
# a step that fails does not stop the others. The last line names those that failed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/gpu}
mkdir -p "$out"
export JAX_PLATFORMS=cuda JAX_COMPILATION_CACHE_DIR=$out/cache
python=.venv/bin/python
[ -x "$python" ] || python=python3
failed=()

step() {  # NAME MINUTES COMMAND...
  local name=$1 minutes=$2
  shift 2
  echo "$name: $*"
  if timeout "${minutes}m" "$@" >"$out/$name.log" 2>&1; then
    tail -n 1 "$out/$name.log"
  else
    echo "$name: failed, see $out/$name.log"
    failed+=("$name")
  fi
}

nvidia-smi >"$out/card.txt"
# Kernels against XLA, values and gradients.
step tests 4 "$python" -m pytest -m gpu tests/models/test_attention.py
# What the compiler planned for this card against what a step takes: memory within 10 %.
step plan 3 "$python" -m fastslm_jax.plan --config=configs/stage2_longform.py --rows_per_chip=1 \
  --config.mesh.fsdp=1 --config.model.remat=attention,query,key,value,out --traffic
step step 6 "$python" benchmarks/step.py --size=full --torch --minutes=15 --trace="$out/trace"
# The decoder's attention: Triton with segment ids, cuDNN with a mask of [tokens, tokens], XLA; then
# cuDNN without segments, and a whole step with the mask.
step attention 2 "$python" benchmarks/attention.py
step causal 2 "$python" benchmarks/attention.py --segments=0
step cudnn 3 "$python" benchmarks/step.py --size=full --minutes=15 --attention=cudnn
step decode 4 "$python" benchmarks/decode.py --batches=1,16,64
step longform 5 "$python" benchmarks/longform.py --checkpoint=assets/demo_model --minutes=5,60
echo "results in $out; failed: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]
