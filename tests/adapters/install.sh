#!/usr/bin/env bash
# Builds the environment of the tests that need the `adapters` library, which needs transformers 4.57.
#   tests/adapters/install.sh [DIR]     (default .venv-adapters in the repository)
# Does nothing where DIR is whole already. pytest then finds it, or another one by CAPTIONER_ADAPTERS_PYTHON.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
dir=${1:-$root/.venv-adapters}
if [ -e "$dir/.complete" ]; then exit 0; fi

python3 -m venv "$dir"
python=$dir/bin/python
"$python" -m pip install --quiet --disable-pip-version-check -c "$root/tests/adapters/constraints.txt" \
  "$root[adapters]" pytest hypothesis
"$python" -m pip uninstall --quiet --yes --disable-pip-version-check captioner # tests import the checkout

"$python" "$root/tests/torchvision_on_cpu.py"
"$python" -W ignore -c 'import torchvision, adapters; print("adapters", adapters.__version__)'
touch "$dir/.complete"
