#!/usr/bin/env bash
# Runs experiments, several at a time, the cores shared out among them; what has finished is not run again.
#
#   bash benchmark/run.sh FILE [processes, default: all cores] [--seeds 0-4] [--sweep cql_weight=0.01,0.1]
#
# A line of FILE is a name, a script and its flags, after --num-eval-episodes 100 and --num-threads. With --seeds (0-4, or
# 0,3,7-9) a line is run once per seed, as NAME-SEED; with --sweep once per value of that flag, as NAME-cql_weight_0.01
# (act_draw=True,False: with and without it); with both as NAME-cql_weight_0.01-SEED. {seed} in a line is the seed, as in
# --policy-checkpoint runs/clone-{seed}/checkpoint.pt.
#
# A run lands in runs/NAME, what it prints in runs/NAME/log.txt and, once it has finished, its metrics in
# benchmark/results/NAME.csv. Where that file is there the run counts as finished, whatever its flags were, and is not run
# again. The same command again runs what has not finished: a run that was stopped (exit status 143 after SIGTERM, 130
# after Ctrl-C) goes on where it was. Exits with 0 when all have finished.
set -euo pipefail

fail() { echo "error: $*" >&2; exit 2; }

cores=$(env -u OMP_NUM_THREADS nproc)
file='' processes=$cores seeds=('') flag='' values=('')
while [ $# -gt 0 ]; do
  case $1 in
    --seeds)
      list='' ranges=${2-}
      for part in ${ranges//,/ }; do list+="$(seq -s ' ' "${part%-*}" "${part#*-}") "; done
      read -ra seeds <<<"$list"
      [ ${#seeds[@]} -gt 0 ] || fail "--seeds: expected seeds, as 0-4"
      shift ;;
    --sweep)
      [[ ${2-} == ?*=?* ]] || fail "--sweep: expected a flag and its values, as cql_weight=0.01,0.1"
      [ -z "$flag" ] || fail "--sweep $2: expected one flag"
      flag=${2%%=*}; IFS=, read -ra values <<<"${2#*=}"; shift ;;
    -*) fail "$1: expected --seeds or --sweep" ;;
    *) if [ -z "$file" ]; then file=$(realpath -- "$1"); else processes=$1; fi ;;
  esac
  shift
done
[ -f "$file" ] || fail "'$file' is not a file of experiments"
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "$processes processes: expected a number"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

expand() {  # the lines of the file, one for each value and seed
  { grep -Ev '^(#|[[:space:]]*$)' "$file" || true; } | while read -r name script flags; do
    [[ -z ${seeds[0]} || "$flags " != *--seed[\ =]* ]] || fail "$name has a --seed; expected none with --seeds"
    for value in "${values[@]}"; do
      for seed in "${seeds[@]}"; do
        case $value in
          '') given='' ;;
          True) given=--${flag//_/-} ;;
          False) given=--no-${flag//_/-} ;;
          *) given="--${flag//_/-} $value" ;;
        esac
        echo "$name${value:+-${flag}_${value//[\/ ]/-}}${seed:+-$seed} $script ${flags//\{seed\}/$seed} $given ${seed:+--seed $seed}"
      done
    done
  done
}

one() {
  local name=$1 script=$2 status=0
  shift 2
  if [ -e "benchmark/results/$name.csv" ]; then
    echo "$name is not run again: benchmark/results/$name.csv is there"
    return 0
  fi
  mkdir -p "runs/$name"
  python "$script.py" --num-eval-episodes 100 --num-threads "$threads" --run-dir "runs/$name" "$@" \
    >>"runs/$name/log.txt" 2>&1 || status=$?
  case $status in
    0) cp "runs/$name/metrics.csv" "benchmark/results/$name.csv" ;;
    130 | 143) echo "$name was stopped; the same command goes on"; return 1 ;;
    *) echo "$name failed: runs/$name/log.txt"; return 1 ;;
  esac
}

mkdir -p benchmark/results
export threads=$((cores > processes ? cores / processes : 1))
export -f one
lines=$(expand)
[ -n "$lines" ] || fail "$file has no experiments"
twice=$(cut -d ' ' -f 1 <<<"$lines" | sort | uniq -d)
[ -z "$twice" ] || fail "$file: two experiments of the name ${twice//$'\n'/, }"
# shellcheck disable=SC2016  # each bash expands its line, which may have quotes and variables
tr '\n' '\0' <<<"$lines" | xargs -0 -n 1 -P "$processes" bash -c 'eval "one $0"'
