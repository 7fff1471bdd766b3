#!/usr/bin/env bash
# Checks everything from a fresh clone: notebooks and modules agree, the examples of every notebook run, the site has
# no broken link, pytest passes.
#
#   ./run_tests.sh            all of it
#   ./run_tests.sh --fast     without the end-to-end runs (pytest marker "slow")
#
# Makes .venv if it is missing or the pins changed. Stops at the first part that fails.
set -euo pipefail
root=$(cd -P "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$root"
source scripts/env.sh

only=()
case ${1-} in
  "") ;;
  --fast) only=(-m "not slow and not simulation and not every and not doors") ;;
  -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 0 ;;
  *) echo "error: unknown argument '$1' (known: --fast, --help)" >&2; exit 2 ;;
esac

[[ -w nbs && -w nli_ft ]] || { echo "error: $root cannot be written, and the tests export its notebooks: copy it to a folder of your own" >&2; exit 2; }
ensure_venv "$root"
export PATH="$root/.venv/bin:$PATH" # papermill and nbdev start kernels and commands by name
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" # no test needs a hub: a test that asks it should fail, not download

echo "== drift: nbs/ cleaned, and nli_ft/ what nbs/ exports"
snapshot() { find nbs nli_ft -name '*.ipynb' -not -path '*/.*' -o -name '*.py' -not -path '*/.*' | LC_ALL=C sort | xargs -d '\n' sha256sum; }
before=$(snapshot)
nbdev_clean
nbdev_export
after=$(snapshot)
if [[ $before != "$after" ]]; then
  { echo "error: these files were not what nbdev_clean and nbdev_export make of nbs/. They are now: look at them and commit:"
    diff <(echo "$before") <(echo "$after") | sed -n 's/^[<>] [0-9a-f]* */  /p' | sort -u; } >&2
  exit 1
fi

# The site needs one core for some minutes, and the last notebooks leave one free. So it is made beside them.
NO_MKDOCS_2_WARNING=1 mkdocs build --quiet >.venv/site.log 2>&1 &
site=$!
trap 'kill "$site" 2>/dev/null || true' EXIT

echo "== notebooks: every example and test in them"
# train.ipynb is a whole training run. The tests execute it by papermill, as a person does.
# Two notebooks at a time, with one thread each: more would only slow each other down.
OMP_NUM_THREADS=1 nbdev_test --n_workers 2 --skip_file_glob train.ipynb

echo "== site: every page is made, and every link leads somewhere"
wait "$site" || { cat .venv/site.log >&2; exit 1; }
cat .venv/site.log

echo "== pytest"
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=120 --durations-min=3 "${only[@]}"
