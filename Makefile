# make quickstart and make test each do everything on a machine with Python, a C++ compiler and Debian.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
SEED ?= 0
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# Tests that reach C++ code; under sanitizers the rest is only slow.
SANITIZED := $(addprefix python_tests/,test_token_logprobs.py test_logprobs_from_logits.py \
	test_soft_q.py test_loss.py test_linear_loss.py test_trace_one_token.py)

# Real head states, where there are some beside the repository; else tests and benchmarks make their own.
export SPO_HEAD_STATES ?= $(abspath $(wildcard ../shared/data/lm_head_states.safetensors))

.PHONY: quickstart test lint format bench build package sanitize sandbox clean

quickstart: build sandbox
	$(BIN)/spo quickstart --seed $(SEED)

test: build sandbox lint
	$(BIN)/pytest --benchmark-skip

# torch by exact version and first: an open range may bring gigabytes of CUDA libraries.
$(VENV)/.ready: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(PIP) setuptools wheel ninja numpy pytest hypothesis pytest-benchmark safetensors ruff mypy \
		clang-format transformers matplotlib tqdm
	touch $@

build: $(VENV)/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .

# The judge of model-written programs needs bubblewrap; without root, only say so.
sandbox:
	@command -v bwrap >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -qq && \
		apt-get install -y -qq bubblewrap >/dev/null; } || \
		echo "bubblewrap is missing: apt-get install bubblewrap"

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: build
	$(BIN)/pytest benchmarks --benchmark-only --benchmark-columns=min,median,rounds \
		--benchmark-group-by=group --benchmark-sort=name

# The source distribution builds and imports by itself.
package: $(VENV)/.ready
	rm -rf dist build/package
	$(BIN)/python setup.py --quiet sdist
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --target build/package dist/*.tar.gz
	cd build/package && ../../$(BIN)/python -c "import spo_ext; print(spo_ext.build_info())"

# AddressSanitizer and UndefinedBehaviorSanitizer over the C++ paths. Python itself leaks by design.
sanitize: $(VENV)/.ready
	SPO_SANITIZE=1 $(BIN)/pip install --quiet --no-build-isolation --no-deps --upgrade \
		--target build/sanitize .
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/sanitize \
		$(BIN)/pytest --capture=no $(SANITIZED)

clean:
	rm -rf $(VENV) build dist *.egg-info spo_ext/*.so
