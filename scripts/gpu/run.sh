#!/usr/bin/env bash
# What needs a GPU host, step by step; run from the repository's root there.
#
#   scripts/gpu/run.sh STEP...
#
# Every step has a time-out and a log of its own, prints the end of it, and does not stop the others; the exit status is
# that of the worst. Logs go to $OUT/logs-FIRST-STEP.tar.gz after each step, results (JSON, PNG, table) to $OUT. Steps:
#   kernels channel transfer executor   test/kernel, by part
#   profile                             python -m sglang_adrenaline.profile of both shapes
#   attend                              test/kernel/test_attend.py, test_kernel_rows.py: the attention kernel
#   shares                              attention and products alone, side by side, and a copy, over SM shares (SMS)
#   cuts                                how prompts are cut for the attention kernel, against all other cuts
#   decode                              decode's own attention: our kernel beside FlashInfer's and FlashAttention 3's
#   local8b                             the same end to end, prompts of many lengths, nothing offloaded
#   stock8b                             the same load on stock PD, with FlashInfer and with FlashAttention 3
#   auto8b                              the same load on ours, nothing offloaded beside ratio auto
#   stalls                              launches beside another thread's copies
#   gqa mha exactness returns           test/gpu: one model variant, both, and the restart of killed servers
#   tp                                  test/gpu with two ranks a server, on two GPUs
#   smoke                               a short comparison: does everything work
#   compare7b compare8b rates7b idle7b ttft8k   the comparisons of docs/gpu-results.md
#   ratios7b ratios8b                   one start of ours, auto beside offload ratios set by the client (RATIOS)
#   halves7b halves8b                   the same on one GPU that MPS makes two of: with MPS=50, or 25 for half of its bandwidth each
#   soak                                mixed load for SECONDS_EACH (500): leaks, drift (a call of its own)
# MPS=PERCENT: processes share a GPU through NVIDIA MPS, each on so many percent of its SMs, instead of taking turns on it.
# Environment: SYSTEMS, RATIO, RATIOS, RATES, SERVER_ARGS, ADRENALINE_ARGS, CONCURRENCY, SECONDS_EACH, LIMIT (seconds for a step), TRACE_AT
# (record kernels so many seconds into saturated workloads).
set -uo pipefail
cd "$(dirname "$0")/../.."
first=${1:?usage: run.sh STEP...; the steps stand in its first lines}
OUT=${OUT:-/tmp/gpu-out}
work=$(mktemp -d /tmp/gpu-run.XXXXXX)
mkdir -p "$OUT"
source scripts/gpu/setup.sh || exit 1
ulimit -n "$(ulimit -Hn)" # a router holds three connections a request
nvidia-smi --query-gpu=index,name,memory.total,memory.used --format=csv,noheader
nvidia-smi topo -m 2>/dev/null | head -5

if [[ -n ${MPS:-} ]]; then
  export CUDA_MPS_PIPE_DIRECTORY=$work/mps CUDA_MPS_LOG_DIRECTORY=$work/mps CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=$MPS
  mkdir "$work/mps"
  nvidia-cuda-mps-control -d || exit 1
  trap 'echo quit | timeout 20 nvidia-cuda-mps-control' EXIT
fi

worst=0
step() { # name seconds command...
  local name=$1 limit=${LIMIT:-$2} begin=$SECONDS status
  shift 2
  timeout -k 10 "$limit" "$@" >"$work/$name.log" 2>&1
  status=$?
  echo "== $name: exit $status after $((SECONDS - begin)) s"
  tail -n "${lines:-25}" "$work/$name.log" | cut -c 1-400
  # A failed test is followed by its servers' logs: what it asserted stands far above the end.
  ((status)) && grep -m 12 -E '^(E  |[^ ]*Error)' "$work/$name.log" | cut -c 1-400
  ((status > worst)) && worst=$status
  find "$work" -name '*.log' -size +8M -exec truncate -s 8M {} +
  tar czf "$OUT/logs-$first.tar.gz" --exclude='*.safetensors' --exclude='tokenizer*' --exclude=key -C "$work" . 2>/dev/null
  for file in "$work"/*/{compare.{json,png,txt},soak.{json,png},timeline-*.png}; do
    [[ -f $file ]] && cp "$file" "$OUT/$(basename "$(dirname "$file")").${file##*/}"
  done
}

tests=(python3 -m pytest -q --tb=short -p no:cacheprovider --timeout 120 -rA)
kernel_tests=(python3 -m pytest -q --tb=short -p no:cacheprovider --timeout 90 -s)
seven=benchmark/models/llama2-7b
eight=benchmark/models/llama3.1-8b
pd=pd:local
python3 -c 'import importlib.util as u, sys; sys.exit(u.find_spec("nixl") is None)' && pd=pd:nixl
ratio=${RATIO:-0.7}
read -r -a systems <<<"${SYSTEMS:-$pd dp2 adrenaline:$ratio}"

# On one GPU both servers share it, as in local8b and stock8b; there prefill is idle most of the time.
shared="--max-running-requests 160 --cuda-graph-max-bs-decode 160 --mem-fraction-static 0.8 --max-total-tokens 260000"

# A part of an H200 for each server: a pool of decode that keeps its batch small, as on two GPUs.
half="--mem-fraction-static 0.8 --max-total-tokens 65536 --cuda-graph-max-bs-decode 256"

gpu_tests() { # name seconds selection
  lines=60 step "$1" "$2" "${tests[@]}" --maxfail 4 --durations 5 --basetemp "$work/$1-tmp" test/gpu -k "$3"
}
compare() { # name seconds model workload...
  local name=$1 limit=$2 model=$3 workloads=()
  shift 3
  for workload in "$@"; do workloads+=(--workload "$workload"); done
  lines=60 step "$name" "$limit" python3 benchmark/compare.py --model-path "$model" --out "$work/$name" \
    --systems "${systems[@]}" --budget $((${LIMIT:-$limit} - 20)) "--server-args=${SERVER_ARGS:-}" \
    "--adrenaline-args=${ADRENALINE_ARGS:-}" ${TRACE_AT:+--trace-at "$TRACE_AT"} "${workloads[@]}"
  local traces=("$work/$name"/traces/*/round-*/*/*.json.gz)
  if [[ -f ${traces[0]} ]]; then
    lines=120 step "$name-kernels" 90 python3 benchmark/kernel_trace.py "${traces[@]}"
  fi
}
open=${CONCURRENCY:-640}
span=${SECONDS_EACH:-45}

for name in "$@"; do
  case $name in
    kernels) step kernels 120 "${kernel_tests[@]}" test/kernel/test_kernels.py test/kernel/test_steps.py ;;
    channel) lines=40 step channel 180 "${kernel_tests[@]}" test/kernel/test_ipc_channel.py ;;
    links) lines=40 step links 180 "${kernel_tests[@]}" test/kernel/test_several_links.py ;;
    transfer) lines=40 step transfer 180 "${kernel_tests[@]}" test/kernel/test_cuda_ipc_transfer.py ;;
    executor) lines=60 step executor 240 "${kernel_tests[@]}" test/kernel/test_gpu_executor.py ;;
    attend) lines=40 step attend 180 "${kernel_tests[@]}" test/kernel/test_attend.py test/kernel/test_kernel_rows.py ;;
    shares)
      for heads in 32 8; do
        for kernel in ours flashinfer; do
          step "shares-$heads-$kernel" 120 python3 benchmark/gpu_executor.py --kv-heads "$heads" --kernel "$kernel" --sms ${SMS:-16 32 64}
        done
        step "shares-$heads-shared" 120 python3 benchmark/gpu_executor.py --kv-heads "$heads" --shared 384 --sms ${SMS:-16 32 64}
      done ;;
    cuts) lines=110 step cuts 120 python3 benchmark/lane_cuts.py ;;
    decode) lines=60 step decode 120 python3 benchmark/decode_attention.py ;;
    profile)
      for model in "$seven" "$eight"; do
        out="$OUT/profile-$(basename "$model").json"
        lines=60 step "profile-$(basename "$model")" 150 python3 -m sglang_adrenaline.profile \
          --model-path "$model" --out "$out" --device cuda --slo-tpot-ms 25
      done
      step profile-test 120 "${kernel_tests[@]}" test/kernel/test_gpu_profile.py ;;
    stalls) step stalls 60 python3 benchmark/launch_stalls.py ;;
    tp) lines=60 step tp 580 "${tests[@]}" --basetemp "$work/tp-tmp" test/gpu/test_gpu_tensor_parallel.py ;;
    several) lines=60 step several 580 "${tests[@]}" --basetemp "$work/several-tmp" test/gpu/test_gpu_several_prefills.py ;;
    gqa) gpu_tests gqa 400 "gqa and not returns" ;;
    mha) gpu_tests mha 400 "mha and not returns" ;;
    exactness) gpu_tests exactness 550 "not returns and not tensor_parallel and not several" ;;
    returns) gpu_tests returns 550 "(kill or returns) and not tensor_parallel and not several" ;;
    smoke)
      systems=(adrenaline:$ratio)
      compare smoke 240 "$seven" "burst in=512 out=64 requests=32" "single in=2048 out=32 requests=2" ;;
    compare7b)
      compare compare7b 580 "$seven" "saturated in=512 out=512 concurrency=$open seconds=$span stream=8" \
        "single in=8192 out=128 requests=3" ;;
    stock8b)
      systems=(pd:local)
      for kernel in flashinfer fa3; do
        SERVER_ARGS="$shared --attention-backend $kernel" \
          compare "stock8b-$kernel" 220 "$eight" "burst in=1024 out=512 requests=120 spread=1 stream=8"
      done ;;
    local8b)
      systems=(adrenaline:0:local)
      for kernel in flashinfer own; do
        ADRENALINE_ARGS="--adrenaline-decode-attention $kernel" SERVER_ARGS="$shared" \
          compare "local8b-$kernel" 220 "$eight" "burst in=1024 out=512 requests=120 spread=1 stream=8"
      done ;;
    auto8b)
      systems=(adrenaline:0:local adrenaline:auto:local)
      SERVER_ARGS="$shared" compare auto8b 480 "$eight" "burst in=1024 out=512 requests=120 spread=1 stream=8" ;;
    ttft8k) compare ttft8k 400 "$seven" "rate in=8192 out=8 rate=1 requests=20" ;;
    compare8b)
      compare compare8b 580 "$eight" "saturated in=4096 out=512 concurrency=$open seconds=$span stream=8" \
        "single in=8192 out=128 requests=3" ;;
    rates7b)
      workloads=()
      for rate in ${RATES:-14 18 22}; do workloads+=("rate in=512 out=512 rate=$rate requests=$((14 * rate))"); done
      compare rates7b 580 "$seven" "${workloads[@]}" ;;
    idle7b)
      systems=("$pd" adrenaline:0 adrenaline:1)
      compare idle7b 580 "$seven" "single in=8192 out=256 requests=4" \
        "saturated in=512 out=512 concurrency=$open seconds=$span stream=8" ;;
    ratios7b | ratios8b | halves7b | halves8b)
      case $name in
        *7b) model=$seven load="in=512 out=512" ;;
        *) model=$eight load="in=4096 out=512" ;;
      esac
      [[ $name == halves* ]] && part=$half || part=
      [[ -n ${SYSTEMS:-} ]] || systems=(adrenaline:auto)
      workloads=()
      for r in ${RATIOS:-auto 0 0.3 0.5 0.7 0.9 auto}; do
        [[ $r == auto ]] && r="name=auto-$((${#workloads[@]} + 1))" || r="ratio=$r name=ratio-$r"
        workloads+=("saturated $load concurrency=$open seconds=$span stream=8 $r")
      done
      SERVER_ARGS="$part ${SERVER_ARGS:-}" compare "$name" 580 "$model" "${workloads[@]}" ;;
    soak)
      lines=60 step soak 595 python3 benchmark/soak.py --out "$work/soak" --seconds "${SECONDS_EACH:-500}" \
        "--adrenaline-args=${ADRENALINE_ARGS:-}" ;;
    *) echo "unknown step: $name" >&2; worst=2 ;;
  esac
done
exit "$worst"
