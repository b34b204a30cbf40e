# sbatch --parsable slurm/fot-3b/job.sh
#!/bin/bash
#SBATCH --job-name=fot-3b
#SBATCH --account=lab
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=30
#SBATCH --signal=B:TERM@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/fot-3b/slurm-%j.log

# When the time is nearly up, the training processes get SIGTERM: they save and exit with 42.
terminated=0
step=
trap 'code=$?; [ -e slurm/fot-3b/stopped ] || echo "$code" > slurm/fot-3b/ended' EXIT
trap 'terminated=1; interrupted=1; kill -TERM "$step" 2>/dev/null || true' TERM
set -e
:
set +e
code=42
if [ "$terminated" = 0 ]; then
  srun --wait=60 python -m fot.train --config=configs/longllama_3b.py --workdir=gs://bucket/runs/3b &
  step=$!
  [ "$terminated" = 0 ] || kill -TERM "$step"
  interrupted=1
  while [ "$interrupted" = 1 ]; do
    interrupted=0
    wait "$step"
    status=$?
    [ "$status" = 127 ] || code=$status
  done
fi

[ "$code" = 0 ] && exit 0
if [ -e slurm/fot-3b/stopped ]; then
  echo "stopped: not started again" >&2
  exit "$code"
fi
case "$code" in
  42|134|137|143)
    if [ "${SLURM_RESTART_COUNT:-0}" -lt 0 ]; then
      echo "exit code $code: back into the queue" >&2
      trap - EXIT
      scontrol requeue "$SLURM_JOB_ID" && exit 0
    else
      echo "exit code $code: 0 retries are used up" >&2
    fi ;;
esac
exit "$code"
