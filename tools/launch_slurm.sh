#!/usr/bin/env bash
#SBATCH --job-name=bloomjax
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@600
#SBATCH --exclusive
#SBATCH --mem=0
# Trains under Slurm, and starts again what a lost process has ended.
#
#   tools/launch_slurm.sh --model-dir=DIR [OPTIONS] [OPTIONS OF SBATCH] -- TRAIN FLAGS
#   tools/launch_slurm.sh --model-dir=/work/176b --nodes=48 --gpus-per-node=8 --time=20:00:00 -- \
#       --gin_file=176b.gin --gin_file=hardware/h100_384.gin
#
# Outside of an allocation it submits itself; inside of one (salloc, or sbatch from the folder of the repository) it runs.
# There is one task a node, which sees all of its GPUs: one program is compiled a node and `tensor` stays in a process.
# Ten minutes before the end of the time the run saves, and the job is queued again if there was progress since its start.
#
#   --model-dir=DIR      MODEL_DIR of the run; all nodes see it
#   --exclude-file=FILE  nodes to stay away from, one a line, # begins a comment
#   --tasks-per-node=1   more, of which each takes one GPU, where the cluster wants it so
#   --max-stalls=3       ends without progress before it gives up; see tools/restart_loop.sh
#   --dry-run            print what would be submitted, and what the job would run
# Environment: PYTHON=python
set -euo pipefail

refuse() {
  echo "launch_slurm: $*" >&2
  exit 2
}

# Slurm runs a copy of this script, so the job asks the environment where the tools are.
tools=$(cd "$(dirname "$0")" && pwd)
[[ -x $tools/restart_loop.sh ]] || tools=${BLOOMJAX_TOOLS:-${SLURM_SUBMIT_DIR:-$PWD}/tools}
[[ -x $tools/restart_loop.sh ]] || refuse "no restart_loop.sh in $tools; submit from the folder of the repository"

model_dir='' exclude_file='' tasks_per_node=1 max_stalls=3 dry_run=false for_sbatch=()
while (($#)) && [[ $1 != -- ]]; do
  case $1 in
    --model-dir=*) model_dir=${1#*=} ;;
    --exclude-file=*) exclude_file=${1#*=} ;;
    --tasks-per-node=*) tasks_per_node=${1#*=} ;;
    --max-stalls=*) max_stalls=${1#*=} ;;
    --dry-run) dry_run=true ;;
    --help)
      sed -n '/^# Trains/,/^set/{/^set/!s/^# \{0,1\}//p;}' "$0"
      exit 0
      ;;
    *) for_sbatch+=("$1") ;;
  esac
  shift
done
[[ -n $model_dir ]] || refuse "--model-dir is missing"
[[ ${1-} == -- && $# -ge 2 ]] || refuse "-- and the flags of bloomjax.train are missing"
[[ $tasks_per_node =~ ^[1-9][0-9]*$ ]] || refuse "--tasks-per-node=$tasks_per_node must be a positive number"
shift

train=("${PYTHON:-python}" -m bloomjax.train "--gin.MODEL_DIR='$model_dir'" "$@")
# No binding: the threads of the one task are to have all cores.
step=(srun --kill-on-bad-exit=1 "--ntasks-per-node=$tasks_per_node" --cpu-bind=none "$tools/launch_task.sh" "${train[@]}")
run=("$tools/restart_loop.sh" "--max-stalls=$max_stalls")
run+=("--requeue=scontrol requeue ${SLURM_JOB_ID:-\$SLURM_JOB_ID}" "$model_dir" "${step[@]}")

if [[ -n ${SLURM_JOB_ID-} ]]; then
  ((${#for_sbatch[@]} == 0)) || refuse "inside of a job, so ${for_sbatch[*]} comes too late"
  submit=()
else
  excluded=()
  if [[ -n $exclude_file ]]; then
    [[ -r $exclude_file ]] || refuse "--exclude-file=$exclude_file cannot be read"
    nodes=$(sed 's/#.*//' "$exclude_file" | tr -s '[:space:],' '\n' | sed '/^$/d' | paste -sd,)
    [[ -z $nodes ]] || excluded=("--exclude=$nodes")
  fi
  submit=(sbatch "--ntasks-per-node=$tasks_per_node" "${excluded[@]}" "${for_sbatch[@]}" "$tools/launch_slurm.sh")
  submit+=("--model-dir=$model_dir" "--tasks-per-node=$tasks_per_node" "--max-stalls=$max_stalls" -- "$@")
fi

show() {
  printf '%q ' "$@"
  echo
}
if $dry_run; then
  [[ -z ${submit[*]} ]] || show "${submit[@]}"
  show "${run[@]}"
elif [[ -n ${submit[*]} ]]; then
  export BLOOMJAX_TOOLS=$tools
  exec "${submit[@]}"
else
  exec "${run[@]}" # it becomes the batch shell, to which Slurm sends SIGUSR1
fi
