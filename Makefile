# make demo: train, evaluate and measure a detector on a fresh machine. make test: run all tests. Both install what they need into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := fcos_dyhead_R18_shapes
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -type f)

.PHONY: install demo test lint format cuda-compile sanitize clean
.DEFAULT_GOAL := install

install: $(VENV)/installed

# Without build isolation, so that the operator is built against the PyTorch that it will run with.
$(VENV)/installed: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "dyhead needs Python >= 3.10, got " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt pip setuptools wheel ninja packaging pybind11 torch
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e '.[train,fonts,test]'
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

cuda-compile: install
	$(BIN)/python setup.py compile_cuda

# The operator's tests under AddressSanitizer and UndefinedBehaviorSanitizer; the emulated CUDA kernels watched for races.
sanitize: install
	tools/sanitize.sh $(abspath $(BIN))/python

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')

clean:
	rm -rf $(VENV) build *.egg-info $(shell find dyhead -name '*.so')
