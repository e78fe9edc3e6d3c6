#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command of less than eight minutes: bench/gpu_check.sh
#
# Installs the package into the environment of $PYTHON (default: python3), which has torch with CUDA, pytest, hypothesis
# and what the build needs (setuptools, pybind11, cmake, ninja, nvcc); asks for no network. Then: the tests on the GPU
# with every engine of the convolution, the kernels under compute-sanitizer, the limits of the bit instructions and the
# benchmarks. Logs and JSON go to $OUT (default: bench_out). A step that fails does not keep the next ones from running;
# the last lines say which did, and the exit status is 1 then.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
readonly PYTHON=${PYTHON:-python3}
OUT=$(realpath -m "${OUT:-bench_out}")
readonly OUT

if ! architecture=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2>/dev/null); then
  echo "bench/gpu_check.sh: torch of $PYTHON finds no GPU here; set PYTHON to one that does" >&2
  exit 1
fi
readonly LIMIT=${LIMIT:-470}  # seconds that all steps share
mkdir -p "$OUT"
SUMMARY=""
FAILED=0

# note NAME RESULT
note() {
  SUMMARY+=$(printf '%-24s %s' "$1" "$2")$'\n'
}

# step NAME SECONDS COMMAND ...: runs it for at most that long, with its output in $OUT/NAME.log as well.
step() {
  local name=$1 limit=$2 start=$SECONDS code
  shift 2
  if ((SECONDS + limit > LIMIT)); then limit=$((LIMIT - SECONDS)); fi
  if ((limit < 5)); then
    note "$name" "FAILED: not begun, $LIMIT s are over"
    FAILED=1
    return
  fi
  printf '\n=== %s ===\n+ %s\n' "$name" "$*"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
  code=${PIPESTATUS[0]}
  case $code in
    0) note "$name" "ok, $((SECONDS - start)) s" ;;
    124 | 137) note "$name" "FAILED: not done in $limit s" ;;
    *) note "$name" "FAILED: exit status $code" ;;
  esac
  [[ $code -eq 0 ]] || FAILED=1
}

# The tests whose names hold "cuda": those that run on the GPU, and those of the module. -P: not the sources' package.
tests() {
  local expression=$1
  shift
  COMMAND=("$PYTHON" -P -m pytest -q -p no:cacheprovider --continue-on-collection-errors
    -k "cuda and not host_cuda and ($expression)" "$@")
}

# Machine code for this GPU alone: a minute instead of several.
[[ $architecture == 90 ]] && architecture=90a
step install 240 env LOWBIT_CUDA=on LOWBIT_CUDA_ARCHS="${LOWBIT_CUDA_ARCHS:-$architecture}" \
  "$PYTHON" -m pip install -q --no-build-isolation --no-deps .
step about 60 "$PYTHON" -P -m lowbit_ext

engines=$("$PYTHON" -P -c 'from lowbit_ext import _native; print(*_native.cuda_kernels(0).engines)') || engines=""
if [[ -z $engines ]]; then
  note engines "FAILED: the module does not say"
  FAILED=1
fi

tests "not compile" tests
step tests 150 "${COMMAND[@]}"
for engine in $engines; do
  tests "test_binary_conv2d" tests/test_binary_conv2d.py
  step "tests-$engine" 60 env LOWBIT_CUDA_ENGINE="$engine" "${COMMAND[@]}"
done

# Every allocation is a real one here: torch's allocator would hide what lies beyond a tensor in its own blocks.
sanitizer=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" 2>/dev/null)
if [[ -n $sanitizer ]]; then
  for tool in memcheck racecheck; do
    for engine in $engines; do
      tests "test_every_operator" tests/test_cuda_calls.py
      step "$tool-$engine" 60 env LOWBIT_CUDA_ENGINE="$engine" PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        "$sanitizer" --tool "$tool" --error-exitcode 99 "${COMMAND[@]}"
    done
  done
else
  note compute-sanitizer "skipped: it is not on PATH, nor in ${CUDA_HOME:-/usr/local/cuda}/bin"
fi

# An engine at a time: one that fails takes its process's GPU context along.
for engine in $engines; do
  [[ $engine == popcount ]] || step "peak-$engine" 30 "$PYTHON" bench/gpu.py --only popcount_peak --engines "$engine" \
    --out "$OUT/$engine"
done
step bench-memory 60 "$PYTHON" bench/gpu.py --only memory codes --out "$OUT"
for engine in $engines; do
  [[ $engine == popcount && $engines == *" "* ]] ||
    step "bench-$engine" 90 "$PYTHON" bench/gpu.py --only binary_conv2d --engines "$engine" --out "$OUT/$engine"
done

printf '\n%s' "$SUMMARY"
[[ $FAILED -eq 0 ]] && echo "GPU check passed" || echo "GPU check FAILED"
exit "$FAILED"
