#!/usr/bin/env bash
#SBATCH --job-name=nli_ft
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1      # one launcher a node, which starts a process per GPU
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR2@180      # three minutes before the end: finish the step, save a checkpoint, start again
#SBATCH --requeue
#SBATCH --open-mode=append       # a job that starts again keeps what it has printed
#
# One training run over the GPUs of one or more nodes, through accelerate. On one GPU it needs no accelerate.
# All nodes must share the project's disk, and .venv must be in it (./run_training.sh --local makes one). Submit it from
# anywhere: relative paths are relative to the folder that you submit from, as everywhere.
#
#   sbatch scripts/slurm.sh --config distributed                                         4 GPUs of one node
#   sbatch --gpus-per-node 1 scripts/slurm.sh --config ablation2                         one GPU
#   sbatch --nodes 2 --partition gpu scripts/slurm.sh --config distributed --seed 2      8 GPUs of two
#   NLI_ACCELERATE=fsdp_qlora sbatch scripts/slurm.sh --config distributed               the base sharded over the GPUs
#
# Arguments after the script's name go to nli_train. Options of sbatch stand before it.
# NLI_ACCELERATE: ddp (the default) or fsdp_qlora, a file of nli_ft/configs/accelerate/.
# NLI_RESTARTS: how often the job starts again when its time is up (20; 0: never). It goes on from its last checkpoint.
# Many runs on one GPU each are `nli_run --engine submitit`.
set -euo pipefail

die() { echo "error: $1" >&2; exit 2; }
[[ -n ${SLURM_JOB_ID-} ]] || die "this is a job script: sbatch scripts/slurm.sh --config NAME"
cd "${SLURM_SUBMIT_DIR:?}"
# sbatch runs a copy of this file. The project is the folder that it was submitted from, or that of the submitted file.
is_project() { grep -qs '^lib_name *= *nli_ft' "$1/settings.ini"; }
root=$PWD
if ! is_project "$root"; then
  submitted=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\(.*slurm\.sh\).*/\1/p') || submitted=''
  root=$(dirname "$(dirname "${submitted:-/none/none}")")
fi
is_project "$root" || die "neither $PWD nor $root is the project's folder: submit its own scripts/slurm.sh, or submit from there"

kind=${NLI_ACCELERATE:-ddp} nodes=$SLURM_NNODES gpus=${SLURM_GPUS_ON_NODE:-0}
[[ $kind == ddp || $kind == fsdp_qlora ]] || die "NLI_ACCELERATE=$kind: expected ddp or fsdp_qlora"
((gpus > 0)) || die "the job has no GPU: add --gpus-per-node"
((nodes == 1)) || kind+=_two_nodes # for any number of nodes, in spite of its name
unset PYTHONHOME PYTHONPATH # a module system's Python would shadow the packages of .venv
export PATH="$root/.venv/bin:$PATH" PYTHONUTF8=1 # files are UTF-8 in every locale
[[ -x $root/.venv/bin/accelerate ]] || die "no accelerate in $root/.venv: ./run_training.sh --local --config minimal_test makes it"

# finish PID: tell the processes of the step to save and end. srun itself, told so, would kill them.
finish() { scancel --signal=TERM "$SLURM_JOB_ID.0" 2>/dev/null || kill -TERM "$1"; }
# train COMMAND...: do it in the background, because bash answers a signal only when it does not wait for a program.
time_is_up=''
train() {
  local step='' status
  trap 'time_is_up=1; [[ -z $step ]] || finish "$step"' USR2
  trap '[[ -n $step ]] && kill -TERM "$step" || exit 143' TERM INT
  "$@" &
  step=$!
  [[ -z $time_is_up ]] || finish "$step" # the signal came before there was a step
  while wait "$step" && status=0 || status=$?; kill -0 "$step" 2>/dev/null; do :; done # a signal ends `wait`, not the step
  if [[ -n $time_is_up && $status != 0 ]] && ((${SLURM_RESTART_COUNT:-0} < ${NLI_RESTARTS:-20})); then
    echo "the time of job $SLURM_JOB_ID is up: it starts again and goes on from its last checkpoint" >&2
    scontrol requeue "$SLURM_JOB_ID" || echo "error: it cannot be started again: sbatch it with --resume_from_checkpoint latest" >&2
  fi
  exit "$status"
}
if ((nodes * gpus == 1)); then # nothing has to be launched
  train srun --nodes 1 --ntasks 1 --kill-on-bad-exit=1 python -m nli_ft.train_sft "$@"
fi

launch=(accelerate launch --config_file "$root/nli_ft/configs/accelerate/$kind.yaml" --num_machines "$nodes" --num_processes "$((nodes * gpus))")
if ((nodes > 1)); then
  hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  MASTER_ADDR=${hosts%%$'\n'*} # not by `head`: it closes the pipe, which may end scontrol and with it this job
  MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # two jobs on one node do not meet
  launch+=(--main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT")
fi

# the rank of a machine is known only where the task runs, so it is read there
train srun --nodes "$nodes" --ntasks "$nodes" --ntasks-per-node 1 --kill-on-bad-exit=1 \
  bash -c 'exec "${@:2:$1}" --machine_rank "$SLURM_PROCID" "${@:2+$1}"' task "${#launch[@]}" "${launch[@]}" -m nli_ft.train_sft "$@"
