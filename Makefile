# Everything a stranger needs: `make run`, `make test`, `make check`. Each makes the environment
# `.venv` first, once; a second call goes straight to the job.
#
#   PYTHON=python3.12   the interpreter to make .venv with
#   TORCH_INDEX=URL     a package index to take torch from; empty asks the configured one
#   ARGS="..."          passed on: make run ARGS="--set strategy.num-rounds=2"

PYTHON ?=
TORCH_INDEX ?=
ARGS ?=

VENV := .venv
STAMP := $(VENV)/.installed
PINS := constraints.txt

include scripts/settings

.PHONY: run test test-slow bench deploy-demo docs check clean distclean help
.NOTPARALLEL:
.DELETE_ON_ERROR:

run: $(STAMP) ## federated fine-tuning of a real model on film reviews, on Ray
	@$(VENV)/bin/fedpet simulate $(ARGS)

test: $(STAMP) ## the plain tests, and those that start Ray and Flower
	@scripts/test $(ARGS)

test-slow: $(STAMP) ## tests that train for minutes
	@scripts/test --slow $(ARGS)

bench: $(STAMP) ## what is missing of the README's table of methods; two hours from nothing
	@$(VENV)/bin/python -m benchmarks table benchmarks/default.toml $(ARGS)

deploy-demo: $(STAMP) ## real nodes over TLS on this machine end with the simulation's values
	@timeout --kill-after=60 3600 $(VENV)/bin/python -m benchmarks.deploy_demo $(ARGS)

docs: $(STAMP) ## the site, into build/site
	@scripts/site
	@echo "The site is in build/site: open build/site/index.html."

check: $(STAMP) ## format, lint, types, the site
	@scripts/check

$(STAMP): pyproject.toml $(PINS) requirements-bundled.txt requirements-language.txt scripts/install
	@PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" scripts/install $(VENV) $(PINS)
	@touch $@

clean: ## remove what was built and cached; environment and runs stay
	@rm -rf build dist *.fab .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## the environment too
	@rm -rf $(VENV)

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'
