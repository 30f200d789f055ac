#!/usr/bin/env bash
# Everything that needs a GPU, in one call of less than ten minutes on a machine that cannot download:
# CUDA tests, sanitizers, benchmarks, report. A part that fails or hangs does not stop the next.
#
#   benchmarks/gpu.sh [COMMIT]      SPO_GPU_PARTS="tests sanitize bench" picks parts
#
# Wheels of spo_ext and of its peers are taken from .wheels/; without one of spo_ext it is built here.
# SPO_SITE names a folder to install into that outlives the call, for wheels too large for one call.
# Eight files land in ${OUT:-build/gpu}. The exit status is 0 only if every part passed.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=${OUT:-$root/build/gpu}
export SPO_COMMIT=${1:-$(git -C "$root" rev-parse HEAD 2>/dev/null || echo unknown)}
python=${PYTHON:-python3}
parts=${SPO_GPU_PARTS:-tests sanitize bench}
limit_s=${SPO_GPU_LIMIT_S:-570}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
status=()
export PYTHONUNBUFFERED=1

note() { echo "[$SECONDS s] $*"; }

record() { # name, exit status, second it began
  note "$1: exit status $2"
  status+=("\"$1\": {\"exit_status\": $2, \"seconds\": $((SECONDS - $3))}")
}

# Into a folder of its own: where python3 is itself a virtual environment, one made from it would not
# see its packages. One wheel at a time, so that one for another Python does not stop the rest.
install() {
  local site=${SPO_SITE:-$work/site} wheel
  mkdir -p "$site"
  for wheel in "$root"/.wheels/*.whl; do
    [ -f "$wheel" ] || continue
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
      --disable-pip-version-check --target "$site" "$wheel" || note "not installed: ${wheel##*/}"
  done
  export PYTHONPATH=$site
  if [ ! -d "$site/spo_ext" ]; then
    note "no wheel of spo_ext for this Python: building it"
    SPO_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0a} timeout 400 "$python" -m pip \
      install --quiet --no-index --no-deps --no-build-isolation --target "$site" "$root" || return 1
  fi
  # Away from the source tree, whose spo_ext/ has no compiled module.
  cp -r "$root"/{python_tests,benchmarks,tools,pyproject.toml} "$work/"
  cd "$work" && "$python" -c "import spo_ext; print(spo_ext.build_info())"
}

# Without this, a wheel without CUDA would pass: every test would be skipped.
has_cuda() {
  "$python" -c "import sys, torch, spo_ext
sys.exit(not (torch.cuda.is_available() and spo_ext.build_info()['cuda_toolkit']))"
}

# One process per file, four at a time: a kernel that faults loses its process's context, and with it
# only the rest of its file. Exit status 5: the file has no test for a GPU.
one_test_file() {
  local name log rc left=$((deadline - $(date +%s)))
  name=$(basename "$1" .py) log=$work/$(basename "$1" .py).log
  timeout --signal INT --kill-after 10 $((left > 10 ? left : 10)) "$python" -m pytest -m cuda -rfE --tb=short \
    --durations=5 -p no:cacheprovider "$1" >"$log" 2>&1
  rc=$?
  [ $rc -ne 5 ] || rc=0
  { echo "===== $name: exit status $rc"; tail -c 400000 "$log"; } >"$log.done"
  echo "$name: exit status $rc, $(tail -n 1 "$log")"
  return $rc
}

tests() {
  local rc=0 deadline=$(($(date +%s) + $1))
  export -f one_test_file
  export work python deadline
  grep -lE 'mark\.cuda|"device"|\(device\)' python_tests/test_*.py |
    xargs -P "${SPO_GPU_JOBS:-4}" -I {} bash -c 'one_test_file "$1"' - {} || rc=1
  cat "$work"/test_*.log.done >>"$out/gpu_checks.log"
  return $rc
}

# Only our kernels are checked: those of PyTorch would take minutes. Without its cache, an access past
# the end of a tensor is one past the end of an allocation.
sanitize() {
  local tool rc=0 sanitizer
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
  if [ -z "$sanitizer" ]; then
    note "compute-sanitizer is not on this machine"
    return 77
  fi
  for tool in memcheck racecheck synccheck; do
    {
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout --kill-after 10 "$1" "$sanitizer" --tool "$tool" \
        --error-exitcode 9 --kernel-name kns=spo "$python" benchmarks/small_case.py
      echo "===== $tool: exit status $?"
    } >"$work/$tool.log" 2>&1 &
  done
  wait
  for tool in memcheck racecheck synccheck; do
    tail -c 400000 "$work/$tool.log" | tee -a "$out/gpu_checks.log" |
      grep -E "ERROR SUMMARY|RACECHECK SUMMARY|exit status|small_case"
    grep -q "exit status 0" "$work/$tool.log" || rc=1
  done
  return $rc
}

bench() {
  local rc
  SPO_BENCH_BUDGET_S=$1 timeout --signal INT --kill-after 20 $(($1 + 60)) "$python" -m pytest \
    benchmarks/test_bench_token_logprobs.py benchmarks/test_bench_soft_q.py \
    benchmarks/test_bench_cumulative_loss.py benchmarks/test_bench_logprobs_from_logits.py \
    --benchmark-only --benchmark-columns=min,median,rounds --benchmark-group-by=group \
    --benchmark-json "$out/gpu_bench.json" -p no:cacheprovider --tb=short >"$work/bench.log" 2>&1
  rc=$?
  tail -c 400000 "$work/bench.log" >"$out/gpu_bench.log"
  grep -E " x the product| of a copy|^skipped|^FAILED|^ERROR" "$work/bench.log"
  [ -s "$out/gpu_bench.json" ] || return 1
  "$python" benchmarks/report.py "$out/gpu_bench.json" --plots "$out" >"$out/gpu_report.md" || rc=1
  return $rc
}

run() { # part, seconds it may take
  local began=$SECONDS
  "$1" "$2"
  record "$1" $? "$began"
}

left() { # at most $1 seconds, keeping $2 for what follows
  local s=$((limit_s - SECONDS - $2))
  [ "$s" -lt "$1" ] || s=$1
  [ "$s" -gt 20 ] || s=20
  echo "$s"
}

: >"$out/gpu_checks.log"
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,memory.total --format=csv || true
began=$SECONDS
if install; then
  record install 0 "$began"
  has_cuda || { note "no GPU, or no CUDA kernels in spo_ext"; record cuda 1 "$SECONDS"; }
  for part in $parts; do
    case $part in
      tests) run tests "$(left 180 300)" ;;
      sanitize) run sanitize "$(left 80 240)" ;;
      bench) run bench "$(left 240 90)" ;;
      *) note "no such part: $part"; record "$part" 2 "$SECONDS" ;;
    esac
  done
else
  record install 1 "$began"
fi
{
  printf '{"commit": "%s", "seconds": %s, "gpu": "%s", "parts": {' "$SPO_COMMIT" "$SECONDS" \
    "$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -n 1)"
  (IFS=,; printf '%s' "${status[*]}")
  printf '}}\n'
} >"$out/gpu_status.json"
cat "$out/gpu_status.json"
! grep -qE '"exit_status": [1-9]' "$out/gpu_status.json"
