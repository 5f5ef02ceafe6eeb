#!/usr/bin/env bash
# Runs main.py under Slurm, one process for each GPU:
#
#   sbatch --nodes=2 scripts/slurm.sh --config=configs/pvt.py:small --workdir=/shared/runs/pvt_small
#
# from the project's folder, with its environment activated. The workdir is one that all nodes see. The log is
# vitpyramid-JOB.log in the folder of the command. Two minutes before the time limit, and when it is preempted, the run
# gets SIGTERM, saves and leaves; the job then goes back into the queue and goes on from there. So it does, up to ten
# times, when a process or a node has died.
#SBATCH --job-name=vitpyramid
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=vitpyramid-%j.log

(($#)) || { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }

trap : TERM # is for the processes of srun; this script waits for them
srun --kill-on-bad-exit=0 python main.py --distributed "$@"
code=$?
case $code in
75) scontrol requeue "$SLURM_JOB_ID" ;;                                                  # stopped after saving
76 | 134 | 137) ((${SLURM_RESTART_COUNT:-0} < 10)) && scontrol requeue "$SLURM_JOB_ID" ;; # another process ended
esac
exit "$code"
