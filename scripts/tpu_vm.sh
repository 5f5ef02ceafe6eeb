#!/usr/bin/env bash
# Runs main.py on all workers of a Cloud TPU VM slice.
#
#   scripts/tpu_vm.sh NAME ZONE install          copies what is committed here to every worker and installs it
#   scripts/tpu_vm.sh NAME ZONE start FLAGS...   starts main.py with these flags on every worker, in the background
#   scripts/tpu_vm.sh NAME ZONE log              follows what worker 0 prints; ~/vitpyramid/run.log on each has its own
#   scripts/tpu_vm.sh NAME ZONE stop             asks the run to save and leave; "start" with the same flags goes on
#
# A preempted slice is gone with its disks: the workdir must lie in a bucket. Create the slice again, then install and
# start with the same flags. Several slices (NODE-0, NODE-1, ... of one queued resource): each command for each of them.
set -euo pipefail

usage() {
  sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
}

on_all() {
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

(($# >= 3)) || usage
name=$1 zone=$2 what=$3
shift 3

case $what in
install)
  archive=$(mktemp --suffix=.tar.gz)
  trap 'rm -f "$archive"' EXIT
  git -C "$(dirname "${BASH_SOURCE[0]}")/.." archive --output="$archive" HEAD
  gcloud compute tpus tpu-vm scp "$archive" "$name:vitpyramid.tar.gz" --zone="$zone" --worker=all
  # The images' own Python may be older than 3.11, and may come without venv.
  # shellcheck disable=SC2016  # expanded there
  on_all 'set -e
    mkdir -p vitpyramid && tar -xzf vitpyramid.tar.gz -C vitpyramid && cd vitpyramid
    python=$(ls /usr/bin/python3.1[1-9] 2>/dev/null | tail -n 1)
    python=${python:-/usr/bin/python3.11}
    "$python" -m ensurepip --version > /dev/null 2>&1 ||
      { sudo apt-get -q update && sudo apt-get -q -y install "$(basename "$python")" "$(basename "$python")-venv"; }
    "$python" -m venv .venv && .venv/bin/pip install -q -e ".[tpu,gcs]"'
  ;;
start)
  (($#)) || usage
  on_all "cd vitpyramid
    if kill -0 \"\$(cat run.pid 2>/dev/null)\" 2>/dev/null; then echo 'a run is going on here: stop it first' >&2; exit 1; fi
    nohup .venv/bin/python main.py --distributed$(printf ' %q' "$@") >> run.log 2>&1 < /dev/null &
    echo \$! > run.pid"
  ;;
log)
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=0 --command="tail -n 100 -F vitpyramid/run.log"
  ;;
stop)
  # shellcheck disable=SC2016  # expanded there
  on_all 'kill -TERM "$(cat vitpyramid/run.pid)"'
  ;;
*) usage ;;
esac
