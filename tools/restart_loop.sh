#!/usr/bin/env bash
# Runs a command of bloomjax again as long as its exit code asks for it.
#
#   tools/restart_loop.sh [OPTIONS] MODEL_DIR COMMAND...
#
# Again on 75 (stopped after a save, or a peer was lost), 134 (aborted: 128+SIGABRT) and 137 (killed: 128+SIGKILL), and
# on 250 and 247, as which a Python that passes on -6 and -9 reports the last two. Any other exit code is that of this
# script: 0 is done, 1 and 2 would only repeat themselves, 253 is what srun makes of a task that had too little memory.
#
# Progress is a higher number than ever before of the newest checkpoint or of the last line of metrics.jsonl in
# MODEL_DIR, or a roll back in its journal, after which that number counts anew. After --max-stalls ends in a row without any, the exit code is that of the last one.
#
# SIGTERM, SIGINT and SIGUSR1 go on to the command as SIGUSR1, after which it saves and ends with 75 (srun and mpirun
# pass that one on; SIGINT they take for themselves). Then nothing is started any more.
#
#   --max-stalls=3     how many ends without progress are one too many
#   --wait=10          seconds before the next start; the default is BLOOMJAX_WAIT_SECONDS if that is set
#   --requeue=COMMAND  run by bash after SIGUSR1 (the end of the time is near), if there was progress since the first start
#   --stop=COMMAND     run by bash in place of the signal to the command
#   --through=PREFIX   runs the script that looks into MODEL_DIR; it is appended as one word
#   --dry-run          print the command and end
#   --show-progress    print the progress in MODEL_DIR (no COMMAND) and end
set -u

say() { echo "restart_loop: $*" >&2; }
refuse() {
  say "$*"
  exit 2
}

dry_run=false show=false max_stalls=3 wait_seconds=${BLOOMJAX_WAIT_SECONDS:-10} requeue='' stop='' through='bash -c'
while [[ ${1-} == --* ]]; do
  case $1 in
    --max-stalls=*) max_stalls=${1#*=} ;;
    --wait=*) wait_seconds=${1#*=} ;;
    --requeue=*) requeue=${1#*=} ;;
    --stop=*) stop=${1#*=} ;;
    --through=*) through=${1#*=} ;;
    --dry-run) dry_run=true ;;
    --show-progress) show=true ;;
    --help)
      sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p;}' "$0"
      exit 0
      ;;
    *) refuse "unknown option $1; --help names all" ;;
  esac
  shift
done
[[ $max_stalls =~ ^[1-9][0-9]*$ ]] || refuse "--max-stalls=$max_stalls must be a positive number"
[[ $wait_seconds =~ ^[0-9]+$ ]] || refuse "--wait=$wait_seconds must be a whole number of seconds"
$show || (($# >= 2)) || refuse "needs MODEL_DIR and a command"
model_dir=${1:?MODEL_DIR}
shift

# A folder with another name than a step is no whole checkpoint.
look="cd $(printf %q "$model_dir") && {
  {
    echo 0
    ls checkpoints | grep -Ex '[0-9]+'
    tail -n 1 metrics.jsonl | sed -n 's/^{\"step\": \([0-9]*\),.*/\1/p'
  } | sort -n | tail -n 1
  cat journal.jsonl | grep -c '\"event\": \"rollback\"'
}"
# Sets `now`, and `rollbacks`, how often the run went back.
progress() {
  local found
  # shellcheck disable=SC2086 # --through is several words
  found=$($through "$look" 2>/dev/null | tr '\n' ' ')
  read -r now rollbacks <<< "${found:-0 0}"
}
now=0 rollbacks=0
if $show; then
  progress
  echo "$now"
  exit 0
fi
if $dry_run; then
  printf '%q ' "$@"
  echo
  exit 0
fi

child='' stopping=false near_end=false interrupted=false
# shellcheck disable=SC2329 # a trap calls it
pass_on() {
  interrupted=true stopping=true
  [[ $1 != USR1 ]] || near_end=true
  [[ -n $child ]] || return
  if [[ -n $stop ]]; then
    bash -c "$stop"
  else
    kill -USR1 "$child" 2>/dev/null
  fi
}
for signal in TERM INT USR1; do
  # shellcheck disable=SC2064 # the name is that of now
  trap "pass_on $signal" "$signal"
done

progress
first=$now best=$now went_back=$rollbacks starts=0 stalls=0
while ! $stopping; do
  starts=$((starts + 1))
  "$@" &
  child=$!
  ! $stopping || kill -USR1 "$child" # the signal came when it had no number yet
  while interrupted=false && wait "$child"; code=$?; $interrupted; do :; done # a signal ends the wait, not the child
  child=''

  progress
  if ((now > best || rollbacks > went_back)); then
    best=$now went_back=$rollbacks stalls=0
  else
    stalls=$((stalls + 1))
  fi
  # The signal came before the run listened to signals: nothing is lost.
  ! $stopping || [[ $code != 138 && $code != 143 ]] || code=75
  case $code in
    75 | 134 | 137 | 247 | 250) ;;
    *)
      ((starts == 1 && code == 0)) || say "start $starts ended with $code at step $now"
      exit "$code"
      ;;
  esac
  if $stopping; then
    break
  elif ((stalls >= max_stalls)); then
    say "start $starts ended with $code; $stalls in a row without progress beyond step $best of $model_dir: giving up"
    exit "$code"
  fi
  say "start $starts ended with $code at step $now; next in $wait_seconds s (without progress: $stalls of $max_stalls)"
  for ((second = 0; second < wait_seconds; second++)); do
    $stopping || sleep 1
  done
done

say "stopped by a signal at step $now; the same command goes on"
if $near_end && [[ -n $requeue ]]; then
  if ((best > first)); then
    bash -c "$requeue"
  else
    say "no progress beyond step $first since the start, so not again: $requeue"
  fi
fi
exit "${code:-75}"
