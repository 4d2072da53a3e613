# make demo: the whole way on the embedded teacher, in a minute; DEMO=--verbose prints all of it.  make test: the test suite.
# make check: all that CI checks beside the tests.  make site: the documentation as HTML.  make tl4: the tests on TransformerLens 4, in an environment of their own.
# make benchmarks: what everything costs, into docs/benchmarks.md.  make fix: what ruff can mend.  make fuzz: random tests with new examples.  make coverage: which lines the tests miss.  make constraints: constraints.txt anew.
PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
TL4_INSTALL := $(BIN)/pip --quiet --disable-pip-version-check --python .venv-tl4/bin/python install --no-compile --constraint .venv-tl4/constraints.txt
# A file's tests mostly stay in one process, where what they share is made once; who is done takes over others' tests.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal
CHECK_FORM := $(BIN)/check-jsonschema --quiet --builtin-schema
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: dev demo test slow fuzz coverage tl4 check fix wheel site benchmarks help-pages constraints clean

dev: .venv/.dev .venv/.docs

demo: .venv/.package
	@rm -rf runs/demo
	@$(BIN)/tl-capacity run demo --out runs/demo $(DEMO)

test: .venv/.test
	$(PYTEST)

slow: .venv/.test
	$(PYTEST) -m slow

fuzz: .venv/.test
	$(PYTEST) -m hypothesis --hypothesis-profile fuzz

coverage: .venv/.test
	$(PYTEST) --cov --cov-report term-missing

tl4: .venv-tl4/.package
	.venv-tl4/bin/python tests/transformer_lens_4.py

check: .venv/.dev site
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	.ci/types
	.ci/imports
	$(BIN)/codespell
	$(CHECK_FORM) vendor.github-workflows .github/workflows/*.yml
	$(CHECK_FORM) vendor.dependabot .github/dependabot.yml
	$(CHECK_FORM) vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/idea.yml
	$(CHECK_FORM) vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(CHECK_FORM) vendor.citation-file-format CITATION.cff
	$(BIN)/python docs/write_help.py --check
	$(BIN)/python docs/write_architecture.py --check
	$(BIN)/python docs/write_fidelity.py --check
	$(BIN)/python docs/write_taps.py --check
	$(BIN)/python docs/check_reading.py

fix: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: .venv/.dev
	.ci/wheel

site: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# One after the other; a result that is newer than the code stays, so that what was broken off goes on.
BENCHMARKS := measure distill keep importance probe report toy observe splice rest start demo
CODE := $(shell find tl_capacity hooks recipes benchmarks -name '*.py')

benchmarks: $(BENCHMARKS:%=build/benchmarks/%.json)

build/benchmarks/%.json: benchmarks/%.py $(CODE) | .venv/.test
	$(BIN)/python $< --out $@ --write

.NOTPARALLEL:
.DELETE_ON_ERROR:

help-pages: .venv/.package
	$(BIN)/python docs/write_help.py

# A version that stands stays, so a package rises when its line is deleted first. torch's line stays: without it pip takes the newest build for GPUs.
constraints: .venv/.dev
	$(BIN)/pip-compile --quiet --output-file constraints.txt pyproject.toml
	sed --in-place --expression '/^#/d; /^$$/d; s/^\(torch==[^+]*\)+.*/\1/; s/^pymdown-extensions==.*/& ; python_full_version >= "3.11.5"/' constraints.txt
	sed --in-place '1i # What the project was tested with; `pip install --constraint constraints.txt` takes exactly these. Written by `make constraints`.' constraints.txt

# torch comes first: asked for exactly, pip finds the CPU build where one is offered.
.venv/.package: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --editable .
	touch $@

.venv/.test: .venv/.package
	$(PIP_INSTALL) --editable '.[test]'
	touch $@

.venv/.dev: .venv/.test
	$(PIP_INSTALL) --editable '.[test,dev]'
	touch $@

.venv/.docs: .venv/.package
	$(PIP_INSTALL) --editable '.[docs]'
	touch $@

# The package's own requirements but for SAELens, which allows no TransformerLens 4; of that the newest, everything else as constrained. Most of what is
# installed is never imported, so nothing is compiled beforehand.
.venv-tl4/.package: .venv/.package
	$(PYTHON) -m venv --without-pip .venv-tl4
	grep --invert-match '^transformer-lens=' constraints.txt > .venv-tl4/constraints.txt
	sed --quiet '/^dependencies = /,/^]/s/^  "\(.*\)",$$/\1/p' pyproject.toml | sed 's/^transformer-lens.*/transformer-lens>=4,<5/; /^sae-lens/d' > .venv-tl4/requirements.txt
	$(TL4_INSTALL) torch
	$(TL4_INSTALL) --requirement .venv-tl4/requirements.txt
	$(TL4_INSTALL) --no-deps --editable .
	touch $@

clean:
	rm -rf .venv .venv-tl4 runs build dist site .coverage* *.egg-info
