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

# Beside a CPU build of torch torchvision announces two compiled operators that are not there, and fails to
# import. The processors of the Qwen-VL family import it but use neither.
"$python" - <<'END'
import pathlib
import sysconfig

path = pathlib.Path(sysconfig.get_path("purelib")) / "torchvision" / "_meta_registrations.py"
gone = {f'@torch.library.register_fake("torchvision::{name}")' for name in ("nms", "qnms")}
kept = [line for line in path.read_text().splitlines() if line.strip() not in gone]
path.write_text("\n".join(kept) + "\n")
END
"$python" -W ignore -c 'import torchvision, adapters; print("adapters", adapters.__version__)'
touch "$dir/.complete"
