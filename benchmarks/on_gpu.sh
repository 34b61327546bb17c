#!/usr/bin/env bash
# Everything there is to measure on one GPU, in order of importance:
#
#   benchmarks/on_gpu.sh OUTPUT_FOLDER [GROUP|PART ...]
#   benchmarks/on_gpu.sh --list
#
# Parts run one after the other, each in processes of its own and under its own time limit; one that fails or hangs is
# noted, and the next begins. OUTPUT_FOLDER gets log.txt (all that was printed), results.jsonl (the report of each part,
# a line each) and summary.txt (part, exit code, seconds); a second call with other parts adds to them. The exit code is
# the number of parts that failed.
#
# PYTHON (python3) needs JAX for CUDA, flax, optax, and one pure-Python wheel that such images lack: gin-config==0.5.0.
# The peers need torch for CUDA, transformers, sentencepiece and tokenizers as well. Nothing is downloaded.
# BATCH (8): rows of 2,048 tokens in a step. FLAGS_7B1: what 7b1 needs to fit.
set -u
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
batch=${BATCH:-8}
read -ra flags_7b1 <<< "${FLAGS_7B1:---set adamw.first_moment_dtype=bfloat16 --set BloomConfig.gradient_dtype=bfloat16 \
  --set BloomConfig.scan_layers=True}"
kernels=(flash_gpu flash_hopper cudnn xla_blocked xla)

usage() { sed -n 's/^#   //p' "$here/on_gpu.sh" >&2; }

# plan: runs `part NAME SECONDS SCRIPT ARGUMENT...` for each part; NAME begins with its group.
plan() {
  for kernel in "${kernels[@]}"; do
    part "kernels_$kernel" 150 bench_attention.py --check_only --kernels "$kernel"
  done
  part step_560m 400 bench_step.py --size 560m --batch "$batch"
  part step_7b1 600 bench_step.py --size 7b1 --batch "$batch" "${flags_7b1[@]}"
  part step_1b7 400 bench_step.py --size 1b7 --batch "$batch"
  for kernel in flash_gpu flash_hopper cudnn; do
    part "attention_$kernel" 240 bench_attention.py --kernels "$kernel" --size 560m 7b1 --head_dims 64 128 --cases plain
  done
  part attention_wide 240 bench_attention.py --kernels flash_gpu flash_hopper --size 560m --head_dims 64 --cases plain \
    --lengths 8192 32768 --score_std 4
  part loss 400 bench_loss.py
  part peers_560m 560 bench_peers.py --size 560m --batch "$batch" --timeout 150 --programs bloomjax:bfloat16 \
    transformers:bfloat16 transformers+compile:bfloat16 transformers:autocast-bfloat16
  part peers_7b1 590 bench_peers.py --size 7b1 --batch "$batch" --timeout 280 --torch_microbatch 2 --programs \
    bloomjax:bfloat16 transformers:bfloat16 "${flags_7b1[@]}"
  for kernel in flash_hopper cudnn; do
    part "stepkernel_$kernel" 300 bench_step.py --size 560m --batch "$batch" --kernel "$kernel" --variants "as configured"
  done
  for size in 1b7 7b1; do
    flags=()
    [[ $size != 7b1 ]] || flags=("${flags_7b1[@]}")
    part "stepfloat8_$size" 400 bench_step.py --size "$size" --batch "$batch" --float8 --variants "as configured" "${flags[@]}"
  done
  part ceiling 200 matmul_ceiling.py --size 560m 1b1 1b7 3b 7b1
  part peersmore_560m 590 bench_peers.py --size 560m --batch "$batch" --timeout 150 --programs bloomjax:float32 \
    transformers:float32 transformers+compile:float32 transformers+compile:autocast-bfloat16
  part peersmore_7b1 590 bench_peers.py --size 7b1 --batch "$batch" --timeout 280 --torch_microbatch 2 --programs \
    transformers+compile:bfloat16 "${flags_7b1[@]}"
}

is_wanted() {
  ((${#wanted[@]} == 0)) && return 0
  for each in "${wanted[@]}"; do
    [[ $1 == "$each" || $1 == "$each"_* ]] && return 0
  done
  return 1
}

# part NAME SECONDS SCRIPT ARGUMENT...
part() {
  local name=$1 limit=$2 script=$3 code=0 began=$SECONDS report
  shift 3
  is_wanted "$name" || return 0
  num_parts=$((num_parts + 1))
  if [[ $list ]]; then
    echo "$name: at most $limit s: $script $*"
    return 0
  fi
  report=$(mktemp)
  echo "=== $name, $(date -u +%FT%TZ): $script $*" | tee -a "$out/log.txt"
  if [[ -f $here/$script ]]; then
    timeout --kill-after=10 "$limit" "$python" -u "$here/$script" --device gpu "$@" --output "$report" 2>&1 |
      tee -a "$out/log.txt"
    code=${PIPESTATUS[0]}
  else
    echo "there is no $script" | tee -a "$out/log.txt"
    code=127
  fi
  if [[ -s $report ]]; then
    "$python" -c 'import json, sys; print(json.dumps({"part": sys.argv[1]} | json.load(open(sys.argv[2]))))' \
      "$name" "$report" >> "$out/results.jsonl"
  fi
  rm -f "$report"
  case $code in
    0) echo "$name: $((SECONDS - began)) s" ;;
    124 | 137) echo "$name: FAILED, stopped after $limit s" ;;
    *) echo "$name: FAILED with $code after $((SECONDS - began)) s" ;;
  esac | tee -a "$out/log.txt" "$out/summary.txt"
  ((code == 0)) || num_failed=$((num_failed + 1))
}

num_parts=0
num_failed=0
list=
if (($# == 0)); then
  usage
  exit 2
fi
if [[ $1 == --list ]]; then
  list=yes
fi
out=$1
shift
wanted=("$@")
if [[ $list ]]; then
  plan
  exit 0
fi
if ! mkdir -p "$out"; then
  exit 2
fi
{
  echo "=== $(date -u +%FT%TZ), $(uname -srm)"
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,power.draw --format=csv 2>&1
} | tee -a "$out/log.txt"
# Programs that several parts share are compiled once.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-/tmp/bloomjax_xla}
plan
if ((num_parts == 0)); then
  echo "no part is called ${wanted[*]}; see $0 --list" >&2
  exit 2
fi
echo "$num_parts parts, $num_failed failed"
cat "$out/summary.txt"
exit "$num_failed"
