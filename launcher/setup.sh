#!/usr/bin/env bash
# setup.sh venv    makes .venv and installs holdfast with what its tests need
# setup.sh slurm   installs Slurm for the lab, when it is absent, this is Debian or Ubuntu, and we are root
#   HOLDFAST_PYTHON=...            the Python to make .venv with
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
  if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    if command -v nvidia-smi >/dev/null; then
      say "installing torch for the GPUs of this machine (some GB)"
      .venv/bin/pip install -q 'torch>=2.11'
    else
      # Pinned: the version that the CPU tests are run with. PIP_EXTRA_INDEX_URL may point pip at CPU-only wheels.
      say "installing torch for a machine without GPU"
      .venv/bin/pip install -q 'torch==2.13.0'
    fi
  fi
  say "installing holdfast and its tests' tools into .venv"
  .venv/bin/pip install -q -e '.[test,report,digits]'
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
