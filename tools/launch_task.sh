#!/usr/bin/env bash
# One task of launch_slurm.sh: runs a command and ends so that srun's exit code tells whether to start again.
#
#   tools/launch_task.sh COMMAND...
#
# As soon as one task has failed, `srun --kill-on-bad-exit` sends SIGTERM to the others, and SIGKILL after the cluster's
# KillWait. Its own exit code is 128 and the highest signal that ended a task, or else the highest exit code. So
# * what is to be started again, and what was told to end, ends with an exit code;
# * a task that failed for good ends by SIGTERM, which is higher than SIGKILL: then srun's exit code is 143.
# Signals may reach only the task, not its children: SIGUSR1 and SIGTERM go on to the command as SIGUSR1 (save and end).
set -u
[[ ${1-} != --help ]] || exec sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p;}' "$0"

child='' told_to_end=false
# shellcheck disable=SC2329 # a trap calls it
pass_on() {
  interrupted=true told_to_end=true
  [[ -z $child ]] || kill -USR1 "$child" 2>/dev/null
}
trap pass_on USR1 TERM
"$@" &
child=$!
while interrupted=false && wait "$child"; code=$?; $interrupted; do :; done

case $code in
  0 | 75 | 134 | 137 | 247 | 250) exit "$code" ;;
esac
if $told_to_end; then
  exit 75
fi
echo "launch_task: task ${SLURM_PROCID-?} on $(uname -n) ended with $code, so the job ends" >&2
trap - TERM
kill -TERM $$
