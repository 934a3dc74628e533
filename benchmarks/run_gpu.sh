#!/usr/bin/env bash
# Everything that needs a GPU, by one command, without a network:
#
#     bash benchmarks/run_gpu.sh [build] [test] [tune] [bench] [all]        none: all, in that order
#
# Each stage is a process of its own and ends within LIMIT seconds (default 540); what it has measured by then is kept.
# Every call builds first: seconds where that is done. Results, one line of JSON a row with device, versions and commit,
# and the logs: $OUT, or else benchmarks/results/<device>. A table that was tuned is among them: put it in the place of
# fastpref/kernels/triton/table.py where the next stage starts from a fresh copy. $PYTHON: the interpreter that has torch
# (default python3), with triton, setuptools >= 77, pybind11, ninja and pytest. A peer that is not installed is a row
# that says so. The device's settings are left as they are; its clocks are recorded as found.
# Exit status: 0, or 1 if a stage failed (the others still run), or 2 without a usable device or for bad arguments.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-540}
ALL=(build test tune bench)
stages=()
for stage in "${@:-all}"; do
  case $stage in
    all) stages+=("${ALL[@]}") ;;
    build | test | tune | bench) stages+=("$stage") ;;
    *) echo "run_gpu.sh: stages are ${ALL[*]} and all; got $stage" >&2; exit 2 ;;
  esac
done

[ "${stages[0]}" = build ] || stages=(build "${stages[@]}")

if ! device=$("$PYTHON" - <<'PY'
import sys
try:
    import torch
except ImportError as error:
    sys.exit(f"run_gpu.sh: {sys.executable} has no torch: {error}")
if not torch.cuda.is_available():
    sys.exit(f"run_gpu.sh: no device here: torch {torch.__version__} sees no CUDA device, and every stage needs one")
print("".join(c if c.isalnum() else "_" for c in torch.cuda.get_device_name().lower()))
PY
); then
  exit 2
fi

out=${OUT:-benchmarks/results/$device}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks_throttle_reasons.active,temperature.gpu,power.draw \
  --format=csv > "$out/clocks.csv" 2>&1 || true  # a record, not a requirement

limited() { timeout --kill-after=10 "$left" "$@"; }

build() { limited env FASTPREF_CUDA=ON "$PYTHON" setup.py build_ext --inplace; }

# side by side, if pytest-xdist is there: most of the time goes into compiling; what fills the device runs alone
run_tests() {
  local failed=0 start=$SECONDS workers=()
  "$PYTHON" -c 'import xdist' 2> /dev/null && workers=(-n 4)
  set -- "$PYTHON" -m pytest tests/gpu -v -rs -p no:cacheprovider
  limited "$@" "${workers[@]}" --durations=10 -k "not the_31" || failed=1
  left=$((LIMIT - (SECONDS - start)))
  [ "$left" -gt 10 ] || { echo "test: no time left for the largest"; return 1; }
  limited "$@" -k the_31 || failed=1
  return $failed
}

# writes the table of the Triton kernels, which the next stage then measures; a copy goes to the results
tune() {
  limited "$PYTHON" -m fastpref.benchmarks.tune_triton --seconds $((LIMIT > 200 ? LIMIT - 120 : LIMIT / 2))
  local status=$?
  cp fastpref/kernels/triton/table.py "$out"
  return $status
}

bench() {
  local failed=0 start=$SECONDS script
  for script in gae_gpu head_gpu; do
    left=$((LIMIT - (SECONDS - start)))
    [ "$left" -gt 10 ] || { echo "bench: no time left for $script"; return 1; }
    limited "$PYTHON" -m "fastpref.benchmarks.$script" --json "$out/$script.jsonl" || failed=1
  done
  return $failed
}

failed=()
for stage in "${stages[@]}"; do
  left=$LIMIT start=$SECONDS
  echo "== $stage, at most $LIMIT s, into $out"
  if [ "$stage" = test ]; then run_tests; else "$stage"; fi 2>&1 | tee "$out/$stage.log"
  status=${PIPESTATUS[0]}
  [ "$status" -eq 124 ] && echo "== $stage ran past its $LIMIT s"
  echo "== $stage: exit $status after $((SECONDS - start)) s"
  [ "$status" -eq 0 ] || failed+=("$stage")
done
[ ${#failed[@]} -eq 0 ] || { echo "run_gpu.sh: failed: ${failed[*]}" >&2; exit 1; }
