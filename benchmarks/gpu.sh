#!/usr/bin/env bash
# Builds, tests, checks and measures the CUDA kernels on the GPU of this machine: one command, under 9 minutes, without
# network.
#
#   benchmarks/gpu.sh [DIRECTORY]        # for the results; default: benchmarks/results
#
# Needs python3 (PYTHON= names another) with torch for CUDA, numpy, rich, pybind11, scikit-build-core and pytest; nvcc,
# cmake and ninja; compute-sanitizer, which comes with the CUDA toolkit. pytest-xdist is used if it is there; tests that
# need hypothesis are left out if it is not. Nothing is installed outside a temporary directory.
#
# Writes <device>.json (benchmarks), <device>.log (all output) and <device>.txt (the summary, which is also
# printed last; progress goes to the standard error). Without a build nothing else can run; but for that every step runs,
# whatever became of those before. The status is 0 if all went well.
set -uo pipefail

# The results' directory is meant from where this was called.
results=$(realpath -m "${1:-$(dirname "$0")/results}")
cd "$(dirname "$0")/.." || exit 2
export repository=$PWD
export python=${PYTHON:-python3}
deadline=$((SECONDS + ${GPU_SECONDS:-525}))
for_bench=200 # seconds that the steps before the benchmarks must leave

work=$(mktemp -d) && export work || exit 2
trap 'rm -rf "$work"' EXIT
mkdir -p "$results" "$work/site" "$work/stage" || exit 2
command -v nvcc >/dev/null || PATH="${CUDA_HOME:-/usr/local/cuda}/bin:$PATH"

facts=$("$python" -c '
import sys, torch
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} finds no CUDA device")
print(torch.cuda.get_device_name(), "{}{}".format(*torch.cuda.get_device_capability()), sep="\n")') || exit 2
device=$(sed -n 1p <<<"$facts")
architecture=$(sed -n 2p <<<"$facts") && export architecture
stem=$results/$(tr '[:upper:]' '[:lower:]' <<<"$device" | tr -cs 'a-z0-9\n' '-')
log=$stem.log
summary=$stem.txt

# What is built here comes first on the path; the tests run where the source of the package is not beside them.
export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
cp -r tests docs pyproject.toml README.md "$work/stage" || exit 2

# ---- how steps are run and recorded ----

failed=0

say() { # say NAME OUTCOME SECONDS DETAIL
  printf '%-10s %-8s %4s s  %s\n' "$@" | tee -a "$summary" >&2
}

not_run() { # not_run NAME WHY
  failed=1
  say "$1" "NOT RUN" 0 "$2"
}

# Runs a function or program for at most so many seconds, with its output in the log. The last line of the output that
# matches PATTERN goes into the summary.
step() { # step NAME SECONDS RESERVED PATTERN COMMAND...
  local name=$1 limit=$2 pattern=$4 begin=$SECONDS status outcome=ok output=$work/$1.out
  local left=$((deadline - SECONDS - $3))
  shift 4
  if ((limit > left)); then limit=$left; fi
  if ((limit < 10)); then
    not_run "$name" "no time left"
    return 1
  fi
  printf '\n==> %s, at most %d s: %s\n' "$name" "$limit" "$*" >>"$log"
  # Interrupted, pytest and the benchmarks say what they have so far. Scripts in the background ignore interrupts, so
  # ask for them.
  env --default-signal=INT timeout --signal=INT --kill-after=15 "$limit" bash -c '"$@"' _ "$@" >"$output" 2>&1
  status=$?
  cat "$output" >>"$log"
  case $status in
    0) ;;
    124 | 137) outcome="TIME UP" failed=1 ;;
    *) outcome=FAILED failed=1 ;;
  esac
  say "$name" "$outcome" "$((SECONDS - begin))" "$(grep -aE "$pattern" "$output" | tail -n 1 | cut -c 1-120)"
  return "$status"
}

missing() { # missing MODULE: whether python lacks it
  ! "$python" -c "import sys; from importlib.util import find_spec; sys.exit(find_spec('$1') is None)"
}

# ---- what the steps do; called through `step` ----

# shellcheck disable=SC2317
build() {
  PYPRUNE_CUDA=ON PYPRUNE_CUDA_ARCHITECTURES="$architecture-real" "$python" -m pip install --no-build-isolation \
    --no-deps --no-index --verbose --target "$work/site" --config-settings=build-dir="$work/build" . || return
  cd "$work/stage" && "$python" -c '
import sys, pyprune
print(pyprune.build_info())
assert pyprune.__file__.startswith(sys.argv[1]), f"another pyprune is in the way: {pyprune.__file__}"
assert pyprune.ops.CUDA_KERNELS_LOADED, pyprune.ops.CUDA_PROBLEM' "$work/site"
}

# shellcheck disable=SC2317
run_tests() { # run_tests ARGUMENTS OF PYTEST...
  cd "$work/stage" && REQUIRE_CUDA=1 "$python" -m pytest -p no:cacheprovider --tb=short -o faulthandler_timeout=90 "$@"
}

# shellcheck disable=SC2317
sanitize() { # sanitize TOOL
  # Without torch's cache each tensor is an allocation of its own: no access beyond it goes unseen.
  cd "$work/stage" && REQUIRE_CUDA=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" \
    --target-processes application-only --error-exitcode 9 --print-limit 20 "$python" -m pytest -p no:cacheprovider \
    --tb=short tests/ops/test_cuda.py -k same_bits_as_on_the_cpu
}

# shellcheck disable=SC2317
bench_kernels() {
  cmake -S csrc -B "$work/kernels" -G Ninja -DPYPRUNE_CUDA_BENCH=ON "-DPYPRUNE_CUDA_ARCHITECTURES=$architecture-real" &&
    cmake --build "$work/kernels" --target kernels_bench_cuda && "$work/kernels/kernels_bench_cuda"
}

export -f build run_tests sanitize bench_kernels

# ---- the steps ----

: >"$summary"
say device "" 0 "$device, compute capability $architecture"
{
  date -u
  "$python" -c 'import sys, torch; print("python", sys.version, "torch", torch.__version__, "CUDA", torch.version.cuda)'
  nvidia-smi
  nvcc --version
} >"$log" 2>&1

options=()
if missing hypothesis; then
  while read -r file; do
    options+=("--ignore=$file")
    say tests "left out" 0 "$file: hypothesis is missing"
  done < <(cd "$work/stage" && grep -rlE '^(import|from) hypothesis\b' tests)
fi
if missing rich; then
  # A dependency of pyprune and of the benchmarks, of which pip carries a copy.
  cp -r "$("$python" -c 'import pip._vendor.rich as rich; print(*rich.__path__)')" "$work/site/rich"
  say rich "" 0 "is missing; pip's copy of it stands in"
fi
if ! missing xdist; then
  export OMP_NUM_THREADS=2
  options+=(--numprocesses="$((($(nproc) + 1) / 2))")
fi

if step build 240 "$for_bench" 'error|Error|assert|cuda_build' build; then
  gpu_only=tests/ops/test_cuda.py
  result='(passed|failed|error|skipped|deselected|no tests ran).* in [0-9.]+s'
  step graphs 60 "$for_bench" "$result" run_tests "$gpu_only" -k cuda_graph
  step gpu-only 60 "$for_bench" "$result" run_tests "$gpu_only" -k "not cuda_graph"
  # The operators first, in case time runs out.
  step tests 170 "$for_bench" "$result" run_tests tests/ops tests --deselect "$gpu_only" "${options[@]}"
  unset OMP_NUM_THREADS
  if command -v compute-sanitizer >/dev/null; then
    step memcheck 60 "$for_bench" 'ERROR SUMMARY|rror:' sanitize memcheck
    step racecheck 60 "$for_bench" 'RACECHECK SUMMARY|ERROR SUMMARY|rror:' sanitize racecheck
  else
    not_run memcheck "compute-sanitizer was not found"
    not_run racecheck "compute-sanitizer was not found"
  fi
  step kernels 110 120 'CUDA error|error:|dropped|threshold, all tensors +[bf]' bench_kernels
  seconds=$((deadline - SECONDS - 30))
  step bench 280 0 'PROBLEM|rror' "$python" benchmarks/bench_gpu.py \
    --seconds "$((seconds < 240 ? seconds : 240))" --json "$stem.json"
  { echo && sed -n '/x floor of pyprune/,$p' "$work/bench.out"; } >>"$summary"
else
  for name in graphs gpu-only tests memcheck racecheck kernels bench; do not_run "$name" "there is no build"; done
  { echo && grep -aE -A 8 -m 3 'error:|Error' "$work/build.out"; } >>"$summary"
fi
printf '\n==> Summary, also in %s; all output is in %s\n' "$summary" "$log"
cat "$summary"
exit "$failed"
