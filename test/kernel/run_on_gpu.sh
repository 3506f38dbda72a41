#!/usr/bin/env bash
# All that needs a GPU here: kernel tests, then the channel's benchmark. usage: run_on_gpu.sh LOG_DIR [STEP ...]
#
# Run from the repository's root with a python3 that has torch with CUDA, apache-tvm-ffi, msgspec and pytest. Every step
# has a time-out and a log of its own; the exit status is that of the worst step. STEPs:
# build kernels steps channel links executor bench executor_bench memcheck
set -uo pipefail
out=${1:?usage: run_on_gpu.sh LOG_DIR [STEP ...]}; shift
export PYTHONPATH="$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$out"
worst=0
step() { # name seconds command...
  local name=$1 limit=$2; shift 2
  [[ " ${wanted[*]} " == *" $name "* ]] || return 0
  local begin=$SECONDS
  timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1
  local status=$?
  echo "== $name: exit $status after $((SECONDS - begin)) s"
  tail -n "${lines:-25}" "$out/$name.log"
  ((status > worst)) && worst=$status
}
wanted=("${@:-}"); [[ -z ${wanted[0]} ]] && wanted=(build kernels steps channel links executor bench executor_bench memcheck)
tests=(python3 -m pytest -q --tb=short -p no:cacheprovider --timeout 60)
lines=3 step build 90 python3 -c 'from sglang_adrenaline import kernels; kernels.module(); print("kernels loaded")'
step kernels 70 "${tests[@]}" test/kernel/test_kernels.py
step steps 70 "${tests[@]}" test/kernel/test_steps.py
lines=60 step channel 180 "${tests[@]}" -s --durations=3 test/kernel/test_ipc_channel.py
lines=40 step links 180 "${tests[@]}" -s --durations=3 test/kernel/test_several_links.py
lines=60 step executor 500 "${tests[@]}" --timeout 240 -s --durations=5 test/kernel/test_gpu_executor.py
lines=60 step executor_bench 240 python3 benchmark/gpu_executor.py --json "$out/gpu_executor.json" \
  --png "$out/gpu_executor.png"
step bench 90 python3 benchmark/gpu_channel.py --json "$out/gpu_channel.json"
lines=4 step memcheck 75 compute-sanitizer --tool memcheck --error-exitcode 9 "${tests[@]}" -k "64-64 or skips or 100-32-128" \
  test/kernel/test_kernels.py
exit "$worst"
