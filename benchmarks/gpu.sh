#!/usr/bin/env bash
# What needs a GPU, in two calls on a machine that cannot download (gpu_calls.py):
#
#   benchmarks/gpu.sh a [COMMIT]    150 s: is every kernel right, and how fast is the headline?
#   benchmarks/gpu.sh b [COMMIT]    9 minutes: CUDA tests, memcheck, other shapes, peers
#
# Wheels of spo_ext and, for b, of its peers are taken from .wheels/ (`make carry`). If that of
# spo_ext does not load, it is built here, in minutes that come on top. SPO_SITE names a folder to
# install into that outlives the call, for wheels too large for one call. SPO_GPU_SECONDS changes how
# long the call may take, SPO_GPU_OPTIONS is passed on to gpu_calls.py. Results land in
# ${OUT:-build/gpu}, line by line. The exit status is 0 only if all is right.
set -uo pipefail
call=${1:?a or b}
root=$(cd "$(dirname "$0")/.." && pwd)
out=${OUT:-$root/build/gpu}
export SPO_COMMIT=${2:-$(git -C "$root" rev-parse HEAD 2>/dev/null || echo unknown)}
python=${PYTHON:-python3}
export SPO_WORK=$(mktemp -d)
trap 'rm -rf "$SPO_WORK"' EXIT
site=${SPO_SITE:-$SPO_WORK/site}
mkdir -p "$out" "$site"
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

# Into a folder of its own: where python3 is itself a virtual environment, one made from it would not
# see its packages. One wheel at a time, so that one for another Python does not stop the rest.
install() { # beginning of the names of wheels
  local wheel
  for wheel in "$root"/.wheels/"$1"*.whl; do
    [ -f "$wheel" ] || continue
    timeout -s KILL 60 "$python" -m pip install --quiet --no-index --no-deps --no-compile \
      --no-cache-dir --upgrade --disable-pip-version-check --target "$site" "$wheel" ||
      echo "not installed: ${wheel##*/}"
  done
}

[ "$call" = a ] && install spo_ext || install ""
# Away from the source tree, whose spo_ext/ has no compiled module.
tar -C "$root" --exclude=results --exclude=__pycache__ -c python_tests benchmarks tools pyproject.toml |
  tar -C "$SPO_WORK" -x
cd "$SPO_WORK" || exit 1
timeout -s KILL 40 "$python" -c "import spo_ext; print(spo_ext.build_info())"
case $? in 0 | 137) ;; *)
  echo "no wheel of spo_ext that loads here: building it"
  install nvidia_cutlass
  timeout -s KILL 400 "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation \
    --upgrade --target "$site" "$root"
  SECONDS=0 ;;
esac
case $call in a) seconds=${SPO_GPU_SECONDS:-145} ;; *) seconds=${SPO_GPU_SECONDS:-540} ;; esac
# shellcheck disable=SC2086
timeout -s KILL $((seconds + 20)) "$python" benchmarks/gpu_calls.py "$call" "$out" \
  --seconds $((seconds - SECONDS)) ${SPO_GPU_OPTIONS:-}
