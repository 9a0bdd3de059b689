#!/usr/bin/env bash
# setup.sh venv    makes .venv and installs holdfast with what its tests need
# setup.sh slurm   installs Slurm for the lab, when it is absent, this is Debian or Ubuntu, and we are root
#   HOLDFAST_PYTHON=...            the Python to make .venv with
#   HOLDFAST_PINS=yes|no           take the versions of constraints.txt or fail; never take them. Left out: on Linux with Python 3.11
#                                  they are taken where they can be had, elsewhere the newest that pyproject.toml allows
#   HOLDFAST_INSTALL_SLURM=no      never install a system package
set -euo pipefail
cd "$(dirname "$0")/.."

say() { echo "holdfast: $*" >&2; }

may_install() {
  [ "${HOLDFAST_INSTALL_SLURM:-yes}" != no ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null
}

apt_install() {
  say "installing system packages: $* (HOLDFAST_INSTALL_SLURM=no forbids it)"
  local log
  log=$(mktemp)
  if ! { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"; } >"$log" 2>&1; then
    tail -n 5 "$log" >&2
    say "apt-get failed; its log is $log"
    return 1
  fi
  rm -f "$log"
}

find_python() {
  local candidate
  for candidate in ${HOLDFAST_PYTHON:-} python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  say "needs Python 3.11 or newer; name one with HOLDFAST_PYTHON=/path/to/python3"
  return 1
}

# What the tests run with is known for one Python and one system; other versions of a package may be all there is elsewhere.
wants_pins() {
  case ${HOLDFAST_PINS:-} in
    yes) return 0 ;;
    no) return 1 ;;
    '') [ "$(uname -s)" = Linux ] && .venv/bin/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' ;;
    *) say "HOLDFAST_PINS=$HOLDFAST_PINS: yes or no"; exit 2 ;;
  esac
}

has_torch() { .venv/bin/python -c 'import torch' 2>/dev/null; }

# With options for pip.
install() {
  local torch=()
  if has_torch; then
    say "torch $(.venv/bin/python -c 'import torch; print(torch.__version__)') is there and stays; constraints.txt has $(grep '^torch==' constraints.txt)"
  elif command -v nvidia-smi >/dev/null; then
    say "torch will be the one for the GPUs of this machine (some GB)"
    torch=('torch>=2.11')
  else
    # On any Python the version that the CPU tests are run with. PIP_EXTRA_INDEX_URL may point pip at CPU-only wheels.
    say "torch will be the one for a machine without GPU"
    torch=("$(grep '^torch==' constraints.txt)")
  fi
  .venv/bin/pip install -q "$@" "${torch[@]}" -e '.[test,report,digits]'
}

venv() {
  local python
  python=$(find_python)
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    if may_install; then apt_install python3-venv; else
      say "$python has no venv module; install your system's python3-venv package"
      return 1
    fi
  fi
  [ -x .venv/bin/python ] || { say "making .venv with $("$python" --version)"; "$python" -m venv .venv; }
  if wants_pins; then
    # A torch that somebody put there fits the machine's driver, so it stays.
    if has_torch; then grep -v '^torch==' constraints.txt >.venv/pins.txt; else cp constraints.txt .venv/pins.txt; fi
    say "installing holdfast and its tests' tools into .venv, in the versions of constraints.txt"
    if ! install --constraint .venv/pins.txt; then
      [ "${HOLDFAST_PINS:-}" != yes ] || { say "HOLDFAST_PINS=yes, and these versions cannot be had here: see above"; return 1; }
      say "the versions of constraints.txt cannot be had here (see above): taking the newest ones that pyproject.toml allows"
      install
    fi
  else
    say "installing holdfast and its tests' tools into .venv, in the newest versions that pyproject.toml allows"
    install
  fi
  .venv/bin/pip check >/dev/null || { .venv/bin/pip check >&2 || true; say "these packages do not go together; rm -rf .venv && make setup starts anew"; }
  touch .venv/.ready
}

slurm() {
  local missing=() program
  export PATH="$PATH:/usr/sbin:/sbin"
  for program in slurmctld slurmd munged sbatch srun; do
    command -v "$program" >/dev/null || missing+=("$program")
  done
  [ ${#missing[@]} = 0 ] && return 0
  if may_install; then
    apt_install slurm-wlm munge
  else
    say "Slurm is not on this machine (${missing[*]}) and may not be installed: what needs it is left out and named"
    return 1
  fi
}

case ${1:-} in
  venv) venv ;;
  slurm) slurm ;;
  *) say "usage: $0 venv|slurm"; exit 2 ;;
esac
