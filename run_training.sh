#!/usr/bin/env bash
# One training run: nbs/train.ipynb through papermill, into a new folder under runs/.
#
#   ./run_training.sh --local --config cpu_demo          in .venv, once it is made: 3 minutes, longer with AVX2 only
#   ./run_training.sh --config ablation2 --gpu 0         in Docker, on one GPU
#   ./run_training.sh --config distributed --gpus 0,1    in Docker, both GPUs through accelerate
#
#   --config NAME|PATH   a file of nli_ft/configs/ by name, or your own by path (default: default).
#                        Older instructions write train/configs/NAME.py: that means the config of that name
#   --gpu N              use this GPU
#   --gpus N,M           use these. More than one turns distributed_training on
#   --all-gpus           use all of them, distributed
#   --local              no Docker: use the project's .venv. It is made if it is missing or the pins changed (Python >= 3.11)
#   --dry-run            check the config, print the exact command and stop. This needs no Docker engine
#   --help               this text
#   --KEY VALUE          all other options go to nli_run unchanged: any config key (--learning_rate 1e-4), --seeds 1,2,3
#
# Relative paths are relative to your current folder. Docker mounts the project, your model caches, and the files and
# folders named in KEY VALUE at their own paths. So name data outside the project there, not in a config file.
# NLI_DOCKER_BASE=IMAGE builds on another image than the Dockerfile's. It needs Python and the PyTorch of requirements.txt.
# HF_TOKEN and WANDB_API_KEY reach the container by name only. Their values are in no command line and no output.
# Exit codes: 0 done, 1 failed while running, 2 bad arguments, config or data (nothing started).
set -euo pipefail
root=$(cd -P "$(dirname "${BASH_SOURCE[0]}")" && pwd)
here=$(pwd -P)
source "$root/scripts/env.sh"

die() { echo "error: $1" >&2; (($# == 1)) || printf '%s\n' "${@:2}" >&2; exit 2; }
say() { # the command as one could type it: quoted only where needed
  local word words=()
  for word; do
    [[ $word =~ ^[[:alnum:]_@%+=:,./-]+$ ]] || word=${word@Q}
    words+=("$word")
  done
  echo "${words[*]}"
}

given=("$@")
config=default local_run='' dry_run='' gpu_flag='' gpus='' gpu_words=() overrides=() paths=()

choose_gpus() { # choose_gpus FLAG VALUE
  [[ -z $gpu_flag ]] || die "$gpu_flag and $1 both say which GPUs to use: give one"
  gpu_flag=$1 gpus=$2 gpu_words=("$1")
  [[ $1 == --all-gpus ]] || gpu_words+=("$2")
}

while (($#)); do
  arg=$1 written=$1 value='' has_value=''
  shift
  # "--key value" and "--key=value" are the same. Only in the second form may a value start with --
  if [[ $arg == --*=* ]]; then value=${arg#*=} arg=${arg%%=*} has_value=inline
  elif (($#)) && [[ $1 != --* ]]; then value=$1 has_value=next; fi
  case $arg in
    --local | --dry-run | --all-gpus | --help | -h)
      [[ $has_value != inline ]] || die "$arg takes no value" ;;
    --config | --gpu | --gpus)
      [[ -n $value ]] || die "$arg needs a value"
      [[ $has_value == inline ]] || shift ;;
    --?*) [[ $has_value == next ]] && shift ;;
    *) die "unexpected argument '$arg': options are --key value (see --help)" ;;
  esac
  case $arg in
    --local) local_run=1 ;;
    --dry-run) dry_run=1 ;;
    --help | -h) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    --config) config=$value ;;
    --gpu)
      [[ $value =~ ^[0-9]+$ ]] || die "--gpu takes one number, not '$value' (for several: --gpus 0,1)"
      choose_gpus --gpu "$value" ;;
    --gpus)
      [[ $value =~ ^[0-9]+(,[0-9]+)*$ ]] || die "--gpus takes numbers with commas between, not '$value'"
      [[ -z $(tr , '\n' <<<"$value" | sort | uniq -d) ]] || die "--gpus $value names a GPU twice"
      choose_gpus --gpus "$value" ;;
    --all-gpus) choose_gpus --all-gpus all ;;
    *)
      overrides+=("$written")
      [[ $has_value != next ]] || overrides+=("$value")
      case $arg in
        --eval_data | --test_data) # one path, or several as name=path,name=path
          if [[ $value =~ ^[A-Za-z0-9][A-Za-z0-9_.-]*= ]]; then
            IFS=, read -ra files <<<"$value"
            for file in "${files[@]}"; do paths+=("${arg#--}=${file#*=}"); done
          else paths+=("${arg#--}=$value"); fi ;;
        --train_data | --model_id | --resume_from_checkpoint | --start_from | --parent | --output_dir | --runs_dir)
          paths+=("${arg#--}=$value") ;;
      esac ;;
  esac
done

# The configs were once in train/configs/. If a file is there today, it is used.
if [[ $config =~ ^(\./)?train/configs/([A-Za-z0-9_]+)\.py$ && ! -e $config && -e $root/nli_ft/configs/${BASH_REMATCH[2]}.py ]]; then
  echo "note: $config means the config ${BASH_REMATCH[2]} (nli_ft/configs/${BASH_REMATCH[2]}.py)" >&2
  config=${BASH_REMATCH[2]}
fi

command=(nli_run --config "$config" "${overrides[@]}")
[[ $gpus == all || $gpus == *,* ]] && command+=(--distributed_training true)

# check_config: before a dry run prints a command, nli_run of .venv says whether it accepts these arguments.
check_config() {
  local message status=0
  if [[ ! -x $root/.venv/bin/nli_run ]]; then
    echo "# the config is not checked: there is no .venv yet" >&2
    return
  fi
  message=$(env -u PYTHONHOME -u PYTHONPATH PYTHONUTF8=1 "$root/.venv/bin/nli_run" "${command[@]:1}" --dry_run 2>&1 >/dev/null) || status=$?
  case $status in
    0) ;;
    2) [[ -z $message ]] || echo "$message" >&2
      exit 2 ;;
    *) echo "# the config is not checked: nli_run in .venv does not start" >&2 ;;
  esac
}
[[ -z $dry_run ]] || check_config

# ---- on this machine ----
if [[ -n $local_run ]]; then
  command[0]=$root/.venv/bin/nli_run
  assignments=()
  [[ -n $gpus && $gpus != all ]] && assignments=("CUDA_VISIBLE_DEVICES=$gpus")
  if [[ -n $dry_run ]]; then
    venv_is_current "$root" || echo "# .venv is missing or older than the pins: it would be set up first" >&2
    say "${assignments[@]}" "${command[@]}"
    exit 0
  fi
  ensure_venv "$root"
  [[ -z ${assignments[*]-} ]] || export "${assignments[@]}"
  exec "${command[@]}"
fi

# ---- in Docker ----
if ! command -v docker >/dev/null; then problem="Docker is not installed"
elif ! docker info >/dev/null 2>&1; then problem="Docker is installed, but its engine does not answer (docker info)"
else problem=; fi
[[ -z $problem || -n $dry_run ]] || die "$problem. Either" \
  "  - run without Docker, in a .venv of this project:  $(say "$0" --local "${given[@]}")" \
  "  - or get the engine: https://docs.docker.com/engine/install/ (for GPUs also the NVIDIA Container Toolkit), start it," \
  "    and let your user reach it: sudo systemctl start docker; sudo usermod -aG docker \$USER"

base=${NLI_DOCKER_BASE-}
image=nli_ft:$({ cat "$root"/{Dockerfile,requirements.txt,requirements-model.txt,setup.py}; printf %s "$base"; } | sha256sum | cut -c1-12)
build=(docker build --tag "$image" ${base:+--build-arg "BASE=$base"} "$root")

# A run that is stopped still saves its checkpoint and closes its record, which takes longer than Docker's 10 seconds.
docker_args=(run --rm --init --stop-timeout 120 --shm-size 8g --user "$(id -u):$(id -g)" --workdir "$here")
[[ -t 0 && -t 1 ]] && docker_args+=(--interactive --tty)

declare -A mounted=() # Docker refuses the same target twice, and training and evaluation data may be one file
bind() { # bind SOURCE TARGET [readonly]
  [[ $1$2 != *[,\"]* ]] || die "Docker cannot mount a path with a comma or a quote in it: $1"
  [[ -z ${mounted[$2]-} ]] || return 0
  mounted[$2]=1
  docker_args+=(--mount "type=bind,source=$1,target=$2${3:+,$3}")
}
outside() { [[ $1 != "$root" && $1 != "$root"/* ]]; }

# Everything is mounted at its own path, so that a path means the same inside and outside.
bind "$root" "$root"
[[ -n ${HOME-} || ( -n ${HF_HOME-} && -n ${NLI_FT_CACHE-} ) ]] || die "HOME is not set: set it, or both HF_HOME and NLI_FT_CACHE, to folders for model caches"
hub=$(realpath -m "${HF_HOME:-${HOME-}/.cache/huggingface}")
converted=$(realpath -m "${NLI_FT_CACHE:-${HOME-}/.cache/nli_ft}") # the embedded model, converted once
[[ -n $dry_run ]] || mkdir -p "$hub" "$converted" 2>/dev/null || # Docker would make them, but as root
  die "the folders for model caches, $hub and $converted, cannot be made: set HF_HOME and NLI_FT_CACHE to folders of your own"
bind "$hub" /home/nli/.cache/huggingface
bind "$converted" /home/nli/.cache/nli_ft
for link in "$root"/{data,models,runs} "$root"/data/* "$root"/data/finetune/*; do # these may be links to a larger disk
  [[ -L $link && -e $link ]] || continue
  real=$(realpath "$link")
  if outside "$real"; then bind "$real" "$real"; fi
done
for item in "config=$config" "${paths[@]}"; do
  [[ -n ${item#*=} ]] || continue # nli_run refuses an empty path, naming the key
  key=${item%%=*} path=$(realpath -ms "${item#*=}")
  if [[ $key == output_dir || $key == runs_dir ]]; then # the run writes to them, and they may not exist yet
    outside "$path" || continue
    [[ -n $dry_run ]] || mkdir -p "$path" 2>/dev/null || die "$key = ${item#*=}: cannot be made. Choose another $key"
    bind "$(realpath -m "$path")" "$path"
  elif [[ -e $path ]]; then
    real=$(realpath "$path")
    if outside "$path"; then bind "$real" "$path" readonly
    elif outside "$real"; then bind "$real" "$real" readonly; fi # a link inside the project
  elif [[ -z $dry_run && ( $key == *_data || ( $key == config && ${item#*=} == */* ) ) ]]; then # said now, and not after the build
    die "$key = ${item#*=}: there is no such file (looked in $here). Paths are relative to your current folder"
  fi
done

gpu_args=()
case $gpus in
  "") if [[ $(nvidia-smi -L 2>/dev/null) == *GPU* ]]; then gpu_args=(--gpus all); fi ;; # without a GPU the CPU configs still run
  all) gpu_args=(--gpus all) ;;
  *,*) gpu_args=(--gpus "\"device=$gpus\"") ;; # Docker splits this at commas unless it is quoted
  *) gpu_args=(--gpus "device=$gpus") ;;
esac
docker_args+=("${gpu_args[@]}")

docker_args+=(--env "NLI_COMMAND=$(say "$0" "${gpu_words[@]}")") # what messages tell the user to type
docker_args+=(--env PYTHONPATH="$root") # the image holds the commands, and the mounted project holds their code
passed=(HF_TOKEN HF_HUB_OFFLINE HF_ENDPOINT OMP_NUM_THREADS MLFLOW_TRACKING_URI
  WANDB_API_KEY WANDB_MODE WANDB_BASE_URL WANDB_ENTITY WANDB_PROJECT
  HTTP_PROXY HTTPS_PROXY NO_PROXY http_proxy https_proxy no_proxy)
for name in "${passed[@]}"; do docker_args+=(--env "$name"); done # names only: Docker leaves out what is not set
[[ -z ${HOME-} || ! -f $HOME/.netrc ]] || bind "$HOME/.netrc" /home/nli/.netrc readonly # `wandb login` writes its key there

built=1
docker image inspect "$image" >/dev/null 2>&1 || built=''
if [[ -n $dry_run ]]; then
  [[ -z $problem ]] || echo "# $problem: the command needs it" >&2
  [[ -n $built ]] || say "${build[@]}"
  say docker "${docker_args[@]}" "$image" "${command[@]}"
  exit 0
fi
if [[ -z $built ]]; then
  echo "Building the image $image (once for these pins; some minutes) ..." >&2
  "${build[@]}" >&2 || { echo "error: docker build failed" >&2; exit 1; }
fi
if [[ -n ${gpu_args[*]-} ]] && ! docker run --rm "${gpu_args[@]}" "$image" true; then
  die "Docker cannot give a container ${gpu_args[*]}. Is the NVIDIA Container Toolkit installed, and do these GPUs exist (nvidia-smi -L)?" \
    "  - https://docs.nvidia.com/datacenter/cloud-native/container-toolkit/latest/install-guide.html" \
    "  - or run without Docker, in a .venv of this project:  $(say "$0" --local "${given[@]}")"
fi
exec docker "${docker_args[@]}" "$image" "${command[@]}"
