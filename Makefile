# make train   learn a policy, compare it with the rules: minutes on 2 cores. make train ARGS="--help" lists arguments
# make results train three seeds of both policies for long, measure them on test markets and packaged scenarios; hours
# make test    every check that CI runs
# make docs    the site of the documentation, as site/index.html
# make reference docs/reference/ anew, after a change of what it is made of
# make paper   the experiments of WWW.Serve, as runs/paper/report.html; minutes on 2 cores
# make clean   back to a fresh clone; results in runs/ and wandb/ stay

PYTHON ?= python3
PYTEST_ARGS ?= -n auto --dist loadfile

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := test
.DELETE_ON_ERROR:
.PHONY: train results test docs reference paper clean

train: $(INSTALLED)
	$(BIN)/python train/mappo.py $(ARGS)

LONG := --validation-markets 32 --test-markets 48 --test-seeds 128
COMPETITIVE := --markets 384 --checkpoint-every 100 --agent-steps 40000000 --imitate-steps 4000000
COOPERATIVE := --team-weight 1 --imitate-steps 3000000 --imitation 0.05 --settings-rate 10 --share 0.3 --minibatches 24 \
  --gamma 0.999 --entropy 0.001 --agent-steps 20000000
results: $(INSTALLED)
	for seed in 1 2 3; do \
	  $(BIN)/python train/mappo.py $(LONG) $(COMPETITIVE) --seed $$seed --out runs/competitive$$seed $(ARGS) || exit 1; \
	  $(BIN)/python train/mappo.py $(LONG) $(COOPERATIVE) --seed $$seed --out runs/cooperative$$seed $(ARGS) || exit 1; \
	done
	$(BIN)/python -m eval.regret --policy runs/*ive?/policy --json runs/regret.json

reference: $(INSTALLED)
	$(BIN)/python docs/generate.py

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

paper: $(INSTALLED)
	$(BIN)/python -m eval.paper $(ARGS)

BROWSER := /usr/bin/chromium /usr/bin/chromedriver
PROMETHEUS := /usr/bin/prometheus /usr/bin/promtool
SYSTEMD := /usr/bin/systemd-analyze
test: $(INSTALLED) $(BROWSER) $(PROMETHEUS) $(SYSTEMD)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy & checked=$$!; $(BIN)/wwwserve compile --emulator && wait $$checked
	$(BIN)/pytest $(PYTEST_ARGS)

$(BROWSER) &: # in which the console is tested
	@test "$$(id -u)" = 0 || { echo 'Chromium is needed for tests: sudo apt-get install chromium chromium-driver' >&2; exit 1; }
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver

$(PROMETHEUS) &: # by which metrics, alerts and the board are tested; its service is masked, so that it never starts
	@test "$$(id -u)" = 0 || { echo 'Prometheus is needed for tests: sudo apt-get install prometheus' >&2; exit 1; }
	ln -sfn /dev/null /etc/systemd/system/prometheus.service
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends prometheus

$(SYSTEMD): # which reads the unit in docs/deploy
	@test "$$(id -u)" = 0 || { echo 'systemd-analyze is needed for tests: sudo apt-get install systemd' >&2; exit 1; }
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends systemd

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q -e '.[train,dev,trace]'
	mkdir -p $(VENV)/checkout && ln -sfn ../.. $(VENV)/checkout/wwwserve # where mypy finds the packages by their name
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find agents envs serving train eval tests -name __pycache__ -type d -prune -exec rm -rf {} +
