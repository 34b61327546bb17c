#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU VM slice, from a machine with gcloud, and starts again what a lost process has ended.
#
#   tools/launch_tpu.sh --tpu=NAME --zone=ZONE --model-dir=DIR --dir=DIR [OPTIONS] -- TRAIN FLAGS
#   tools/launch_tpu.sh --tpu=bloom --zone=us-east5-a --model-dir=/mnt/bloom/176b --dir=bloomjax -- \
#       --gin_file=176b.gin --gin_file=hardware/v5p_1024.gin
#
# The hosts find one another by the metadata of the TPU. This script has to stay alive, so run it in tmux on a machine
# that stays on. A broken connection is 255 and not tried again: the hosts may still be training; Ctrl-C saves and stops.
#
#   --tpu=NAME, --zone=ZONE  of the slice; --project=ID if it is not gcloud's default
#   --model-dir=DIR          MODEL_DIR of the run, on a file system that all hosts have mounted
#   --dir=DIR                folder of the repository on every host, with its .venv
#   --max-stalls=3           ends without progress before it gives up; see tools/restart_loop.sh
#   --dry-run                print what would run
# Environment: PYTHON=.venv/bin/python, as seen from --dir
set -euo pipefail

refuse() {
  echo "launch_tpu: $*" >&2
  exit 2
}

tools=$(cd "$(dirname "$0")" && pwd)
tpu='' zone='' project='' model_dir='' dir='' max_stalls=3 dry_run=false
while (($#)) && [[ $1 != -- ]]; do
  case $1 in
    --tpu=*) tpu=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --model-dir=*) model_dir=${1#*=} ;;
    --dir=*) dir=${1#*=} ;;
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
for name in tpu zone model_dir dir; do
  [[ -n ${!name} ]] || refuse "--${name//_/-} is missing"
done
[[ ${1-} == -- && $# -ge 2 ]] || refuse "-- and the flags of bloomjax.train are missing"
shift
[[ $model_dir == /* || $model_dir == *://* ]] || refuse "--model-dir=$model_dir must be a whole path: it is looked at from two folders"

ssh=(gcloud compute tpus tpu-vm ssh "$tpu" "--zone=$zone")
[[ -z $project ]] || ssh+=("--project=$project")
remote="cd $(printf %q "$dir") && exec $(printf '%q ' "${PYTHON:-.venv/bin/python}" -m bloomjax.train)"
remote+=$(printf '%q ' "--gin.MODEL_DIR='$model_dir'" "$@")
# One process is enough: they agree on the step after which they save.
stop="${ssh[*]} --worker=0 --command='pkill -USR1 -f [b]loomjax.train'"
loop=("$tools/restart_loop.sh" "--max-stalls=$max_stalls" "--through=${ssh[*]} --worker=0 --command" "--stop=$stop")
loop+=("$model_dir" "${ssh[@]}" --worker=all "--command=$remote")

if $dry_run; then
  printf '%q ' "${loop[@]}"
  echo
else
  exec "${loop[@]}"
fi
