# Everything that is done with this project, by name. It needs Python 3.11 or newer (with venv and pip) and make.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help serve chat test gates check bench prove lock clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DIFFUSION := $(VENV)/.diffusion
TORCH := $(shell grep -o 'torch==[0-9.]*' pyproject.toml)
ARGS ?=

# What is started again and again is compiled once, whatever the environment says: it is a fifth of the start of a server.
export PYTHONDONTWRITEBYTECODE :=

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

serve: $(STAMP) ## Set up, pull the default model and start the server (ARGS='--port 9000')
	@$(BIN)/forebay models pull
	@exec $(BIN)/forebay serve $(ARGS)

chat: $(STAMP) ## Talk to a running server (ARGS='MODEL')
	@exec $(BIN)/forebay chat $(ARGS)

# What measures how fast something is has the machine for itself. What waits for things that come by the way, or for a time to
# pass, has one other beside it that does the same; all the rest shares the cores.
ALONE := $(addprefix tests/faults/test_,batch_beside_online.py fair_shares.py five_models.py load.py long_recording.py \
	online_beside_batch_server.py online_first.py postgres_restarts.py slow_clients.py soak.py stalled_readers.py two_workers.py) \
	$(addprefix tests/integration/test_,auth.py jobs_api.py)
WAITING := $(addprefix tests/faults/test_,cancel.py continuation.py engine_death.py http.py models.py paused_replicas.py \
	paused_worker.py shortage.py stop.py transcription_crash.py) \
	$(addprefix tests/integration/test_,audio.py image_edits.py image_jobs.py serve.py transcription_jobs.py whisper_engine.py)

test: gates $(DIFFUSION) ## Every gate and every test (ARGS='tests/unit' for some)
ifeq ($(strip $(ARGS)),)
	@echo "== pytest, what is together"
	@$(BIN)/pytest -q -n 2 --dist loadfile $(addprefix --ignore=,$(WAITING) $(ALONE))
	@echo "== pytest, what waits"
	@$(BIN)/pytest -q -n 2 --dist loadfile $(WAITING)
	@echo "== pytest, what is alone"
	@$(BIN)/pytest -q $(ALONE)
else
	@echo "== pytest $(ARGS)"
	@$(BIN)/pytest -q $(ARGS)
endif

check: gates ## Format, lint, types, contracts, dependencies, house rules and unit tests
	@echo "== pytest tests/house tests/unit"
	@$(BIN)/pytest -q tests/house tests/unit

gates: $(STAMP)
	@echo "== ruff format"; $(BIN)/ruff format --check --quiet . || { $(BIN)/ruff format --diff --quiet .; exit 1; }
	@echo "== ruff check"; $(BIN)/ruff check --quiet .
	@echo "== mypy --strict"; $(BIN)/mypy --no-error-summary
	@echo "== import contracts"; $(BIN)/lint-imports --no-cache > $(VENV)/.contracts 2>&1 || { cat $(VENV)/.contracts; exit 1; }
	@echo "== dependencies"; $(BIN)/deptry src > $(VENV)/.deptry 2>&1 || { cat $(VENV)/.deptry; exit 1; }

bench: $(DIFFUSION) ## Measure (ARGS='overhead', 'chat', 'jobs', 'batch', 'prefix', 'embed', 'speech', 'coserve' or 'image --tiny')
	@$(BIN)/forebay bench $(or $(ARGS),overhead)

prove: $(DIFFUSION) ## The long versions of the tests: hundreds of kills, thousands of mutations
	@$(BIN)/pytest -q --prove --timeout 3600 $(ARGS)

lock: $(STAMP) ## Pin every dependency with its hashes in requirements.lock and requirements-diffusion.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --generate-hashes --group dev \
		--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" --output-file requirements.lock
	@{ $(DIFFUSION_WANTS); } | $(BIN)/uv pip compile - --quiet --universal --python-version 3.11 --generate-hashes \
		--constraint requirements.lock --override <(echo "torch; python_version < '0'") \
		--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" --output-file requirements-diffusion.lock

# What the extra `diffusion` asks for, and what torch does. Torch itself is left out: which build fits depends on the machine.
DIFFUSION_WANTS = $(BIN)/python -c 'import tomllib; \
	print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["diffusion"], sep="\n")'; \
	printf '%s\n' filelock fsspec jinja2 networkx 'setuptools>=77.0.3' sympy typing-extensions

clean: ## Remove the environment and every cache; data and models stay
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist build
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment is made again only when the lock or the project file has changed.
$(STAMP): requirements.lock pyproject.toml
	@test -x $(BIN)/python || { \
		for python in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
			if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then \
				found="$$python"; break; \
			fi; \
		done; \
		if [ -z "$$found" ]; then \
			echo "Python 3.11 or newer with venv and pip is needed (on Debian: apt install python3 python3-venv). Install it, or name it: make serve PYTHON=/path/to/python3." >&2; \
			exit 1; \
		fi; \
		echo "== creating $(VENV) with $$("$$found" --version)"; \
		"$$found" -m venv $(VENV); \
	}
	@echo "== installing the pinned dependencies (a minute or two the first time)"
	@set -o pipefail; $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off \
		--require-hashes -r requirements.lock \
		| awk '/^Collecting/ {n++; printf "\r   %d packages", n; fflush()} END {print (n ? "" : "   already there")}'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(STAMP)

# The extra `diffusion`, for what makes pictures: `make serve` does without it. Everything but torch has its hash.
$(DIFFUSION): $(STAMP) requirements-diffusion.lock
	@echo "== installing $(TORCH) and what makes pictures with it (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off \
		--require-hashes --no-deps -r requirements-diffusion.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off $(TORCH)
	@touch $(DIFFUSION)
