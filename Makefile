# make demo   the main job on real input, from chats and thumbs to a swap, with a table of before and after
#             LOG=kafka: the same on Apache Kafka, one broker from $KAFKA_HOME or the cluster that
#             $THUMBWHEEL_LOG__KAFKA__BOOTSTRAP names
# make test   formatting, types, every test
# Both set up what they need in .venv, once. On a GPU: make setup ENGINE=engine TORCH_BACKEND=auto

# make unit   the tests that take no seconds each: about a minute for all of them

PYTHON ?= python3
ENGINE ?= engine-cpu
LOG ?= sqlite
# A folder of wheels that pip knows may hold the CPU build of torch; uv reads the same folder under another name.
# Without one, uv finds that build by itself.
TORCH_BACKEND ?= $(if $(PIP_FIND_LINKS),,cpu)
empty :=
comma := ,
export UV_FIND_LINKS ?= $(subst $(empty) $(empty),$(comma),$(strip $(PIP_FIND_LINKS)))

BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test parts rest unit lint format bench setup clean

demo: setup
	$(BIN)/thumbwheel demo --log $(LOG)

# Two halves at a time: half of its time a test waits for another program. One thread each, or they wait for each other.
test: lint
	@echo "The tests run in two halves, side by side; each is heard of when it is done, after about 20 minutes."
	@OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --jobs=2 --output-sync parts rest

parts: setup
	$(BIN)/pytest -q --durations=10 -m "engine or kafka"

rest: setup
	$(BIN)/pytest -q --durations=10 -m "not engine and not kafka"

unit: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m "not engine and not kafka and not kube and not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python -m bench.gateway_overhead
	$(BIN)/python -m bench.log
	$(BIN)/python -m bench.learner_vs_trl
	$(BIN)/python -m bench.flat
	$(BIN)/python -m bench.algorithms

setup: $(READY)

# The trainers of TRL that a test compares with are of two versions: the older one lies where only that test looks.
$(READY): pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python $(if $(TORCH_BACKEND),--torch-backend $(TORCH_BACKEND)) \
		--editable '.[learner,$(ENGINE),demo,dev]'
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --target .venv/oracles trl==1.12.0
	touch $@

clean:
	rm -rf .venv .cache build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
