# Every target builds the environment first if there is none.
BIN := .venv/bin
# stands when the environment holds what pyproject.toml and constraints.txt ask for
READY := .venv/.ready

.PHONY: install demo check test lint format constraints

install: $(READY)

$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || for python in python3.11 python3.12 python3.13 python3 ; do \
	  if $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null ; then \
	    echo "$$python -m venv .venv" ; $$python -m venv .venv && break ; \
	  fi ; \
	done ; test -x $(BIN)/python || { echo 'captioner needs Python 3.11, 3.12 or 3.13' >&2 ; exit 2 ; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,dev]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/captioner demo

test: $(READY)
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadgroup

# what one runs before each commit: under two minutes on two cores
check: lint
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadgroup -m "not slow and not vllm and not adapters"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# pins what the environment holds; the CUDA libraries stay out, so that a CPU build of torch resolves too
constraints: $(READY)
	( head -n 2 constraints.txt ; $(BIN)/python -m pip freeze --exclude-editable \
	  | grep -viE '^(nvidia-|cuda-|triton)' ) > constraints.new && mv constraints.new constraints.txt
