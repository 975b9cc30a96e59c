#!/usr/bin/env bash
# Runs experiments, several at a time, the cores shared out among them; what has finished is not run again.
#
#   bash benchmark/run.sh benchmark/pointmaze.txt [processes, default: all cores]
#
# A line of the file is a name, a script and its flags, after --num-eval-episodes 100 and --num-threads. The run lands in
# runs/NAME, its metrics in benchmark/results/NAME.csv, what it printed in runs/NAME/log.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p benchmark/results
one() {
  name=$1 script=$2; shift 2
  [ -e "benchmark/results/$name.csv" ] && return
  mkdir -p "runs/$name"
  where=(--run-dir "runs/$name")
  [ -e "runs/$name/checkpoint.pt" ] && where=(--resume "runs/$name")  # it was interrupted
  if python "$script.py" --num-eval-episodes 100 --num-threads "$threads" "${where[@]}" "$@" >>"runs/$name/log.txt" 2>&1; then
    cp "runs/$name/metrics.csv" "benchmark/results/$name.csv"
  else
    echo "$name failed: runs/$name/log.txt"; return 1
  fi
}
processes=${2:-$(nproc)}
export threads=$(($(nproc) > processes ? $(nproc) / processes : 1))
export -f one
grep -v '^#' "$1" | xargs -P "$processes" -I{} bash -c 'one {}'
