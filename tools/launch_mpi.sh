#!/usr/bin/env bash
# Trains under mpirun of Open MPI, and starts again what a lost process has ended.
#
#   tools/launch_mpi.sh --model-dir=DIR [OPTIONS] -- TRAIN FLAGS
#   tools/launch_mpi.sh --model-dir=/work/7b1 --hosts=node1,node2 -- --gin_file=7b1.gin --gin_file=hardware/h100_8.gin
#
# There is one process a host, which sees all of its GPUs. Process 0 runs on the first host.
#
#   --model-dir=DIR         MODEL_DIR of the run; all hosts see it
#   --hosts=localhost       names, with commas
#   --port=8476             a free port of the first host, at which the processes meet
#   --processes-per-host=1  more only on CPUs: each would take all GPUs
#   --mpirun=OPTIONS        further options of mpirun, for example '--mca btl_tcp_if_include eth0'
#   --max-stalls=3          ends without progress before it gives up; see tools/restart_loop.sh
#   --dry-run               print what would run
# Environment: PYTHON=python. PATH, LD_LIBRARY_PATH, PYTHONPATH, VIRTUAL_ENV, and what begins with JAX_, XLA_, NCCL_
# or LIBTPU_ goes to all hosts.
set -euo pipefail

refuse() {
  echo "launch_mpi: $*" >&2
  exit 2
}

tools=$(cd "$(dirname "$0")" && pwd)
model_dir='' hosts=localhost port=8476 per_host=1 more='' max_stalls=3 dry_run=false
while (($#)) && [[ $1 != -- ]]; do
  case $1 in
    --model-dir=*) model_dir=${1#*=} ;;
    --hosts=*) hosts=${1#*=} ;;
    --port=*) port=${1#*=} ;;
    --processes-per-host=*) per_host=${1#*=} ;;
    --mpirun=*) more=${1#*=} ;;
    --max-stalls=*) max_stalls=${1#*=} ;;
    --dry-run) dry_run=true ;;
    --help)
      sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p;}' "$0"
      exit 0
      ;;
    *) refuse "unknown option $1; the flags of bloomjax.train come after --" ;;
  esac
  shift
done
[[ -n $model_dir ]] || refuse "--model-dir is missing"
[[ ${1-} == -- && $# -ge 2 ]] || refuse "-- and the flags of bloomjax.train are missing"
[[ $per_host =~ ^[1-9][0-9]*$ ]] || refuse "--processes-per-host=$per_host must be a positive number"
shift

IFS=, read -ra names <<<"$hosts"
slots=$(printf "%s:$per_host," "${names[@]}")
# By itself mpirun binds a process to one core.
run=(mpirun -np $((${#names[@]} * per_host)) --host "${slots%,}" --map-by "ppr:$per_host:node" --bind-to none)
# Open MPI 5 does not say where process 0 is.
run+=(-x "BLOOMJAX_COORDINATOR=${names[0]}:$port")
while read -r name; do
  run+=(-x "$name")
done < <(compgen -e | grep -E '^(PATH|LD_LIBRARY_PATH|PYTHONPATH|VIRTUAL_ENV|(JAX|XLA|NCCL|LIBTPU)_.*)$')
# shellcheck disable=SC2206 # several words
run+=($more "${PYTHON:-python}" -m bloomjax.train "--gin.MODEL_DIR='$model_dir'" "$@")
loop=("$tools/restart_loop.sh" "--max-stalls=$max_stalls" "$model_dir" "${run[@]}")

if $dry_run; then
  printf '%q ' "${loop[@]}"
  echo
else
  exec "${loop[@]}"
fi
