# make demo: from the standard library's source to a trained, tracked language model.  make demo-images: the same
# with Fashion-MNIST and an image classifier.  make test: every check.
# All set up .venv by themselves. TEXT=path trains the demo on your own text.

PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# a set and a run of their own for each TEXT: its name and a checksum of where it is
NAME := $(if $(TEXT),demo-$(shell printf %s-%s "$$(basename '$(TEXT)' | tr -c 'A-Za-z0-9._\n-' _)" \
	"$$(realpath '$(TEXT)' | cksum | cut -d' ' -f1)"),demo)
INPUT := $(or $(TEXT),data/stdlib)

.PHONY: demo demo-images test pytest quick lint docs setup constraints

demo: setup $(if $(TEXT),,data/stdlib)
	@test -f data/$(NAME)/manifest.json || \
		$(BIN)/dnt data prepare $(INPUT) --out data/$(NAME) --vocab-size 4096 --seq-len 256 --val-fraction 0.05
	$(BIN)/dnt train preset=demo run.name=$(NAME) data.path=data/$(NAME)
	$(BIN)/dnt eval runs/$(NAME)
	$(BIN)/dnt generate runs/$(NAME) --prompt "def read_file(path" --tokens 120
	@echo
	@echo "Made: data/$(NAME)/               the shards and their manifest"
	@echo "      runs/$(NAME)/               config.yaml, metrics.jsonl, checkpoints/latest, plots/loss.png"
	@echo "      runs/mlflow.db           the run in MLflow"
	@echo "Next: $(BIN)/dnt ui                                          # the run's page in MLflow"
	@echo "      $(BIN)/dnt generate runs/$(NAME) --prompt 'class '        # more text"
	@echo "      $(BIN)/dnt train preset=demo optim=adamw optim.lr=1.2e-2 run.name=adamw data.path=data/$(NAME)"

# the standard library's own source, without its tests: about 13 MB that every machine has
data/stdlib: | setup
	@rm -rf $@.partial && mkdir -p $@.partial
	@cd "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" && \
		find . -name '*.py' -not -path '*/test/*' -not -path '*/tests/*' -not -path '*/idle_test/*' \
			-not -path '*/site-packages/*' -not -path '*/lib2to3/tests/*' | LC_ALL=C sort | \
		tar cf - -T - | tar xf - -C "$(CURDIR)/$@.partial"
	@mv $@.partial $@

# IDX files as MNIST's: Fashion-MNIST from Debian's package, here or fetched without root; else scikit-learn's digits
FASHION := usr/share/datasets/fashion-mnist
demo-images: setup data/images-idx
	@test -f data/demo-images/manifest.json || $(BIN)/dnt data images data/images-idx \
		--val "$$(ls data/images-idx/t10k-images*)" --out data/demo-images
	$(BIN)/dnt train preset=demo_images
	$(BIN)/dnt eval runs/demo-images
	@mkdir -p data/images-shown && cd data/images-shown && \
		for number in 0 1 2; do tar xf ../demo-images/val-000000.tar 0000000$$number.cls 0000000$$number.png && \
			echo "0000000$$number.png is of class $$(cat 0000000$$number.cls)"; done
	$(BIN)/dnt classify runs/demo-images data/images-shown/*.png
	@echo
	@test -f data/images-idx/train-images-idx3-ubyte || echo "Classes: 0 T-shirt, 1 trousers, 2 pullover, 3 dress, 4 coat, 5 sandal, 6 shirt," \
		"7 sneaker, 8 bag, 9 ankle boot"
	@echo "Made: data/demo-images/        the shards, their manifest and report.html"
	@echo "      runs/demo-images/        config.yaml, metrics.jsonl, checkpoints/latest, plots/loss.png, plots/predictions.png"
	@echo "      runs/mlflow.db           the run in MLflow"
	@echo "Next: $(BIN)/dnt ui                                          # the run's page in MLflow, with the pictures"
	@echo "      $(BIN)/dnt data images FOLDER --out data/mine             # your own images, a folder a class"
	@echo "      $(BIN)/dnt train preset=demo_images model=vit_tiny optim=adamw optim.lr=1e-3 run.name=vit"

data/images-idx: | setup
	@rm -rf $@.partial && mkdir -p $@.partial
	@if test -d /$(FASHION); then cp /$(FASHION)/*ubyte.gz $@.partial; \
	elif (cd $@.partial && apt-get download dataset-fashion-mnist && dpkg -x *.deb . && mv $(FASHION)/*ubyte.gz . && \
		rm -rf usr *.deb) >/dev/null 2>&1; then :; \
	elif rm -rf $@.partial/* && $(BIN)/python -m testbed.digits $@.partial 2>/dev/null; then \
		echo "Fashion-MNIST is not to be had here: the demo takes scikit-learn's 1,797 digits"; \
	else echo "error: no images to train on: install Debian's package dataset-fashion-mnist, or put MNIST's four files into $@"; \
		exit 2; fi
	@mv $@.partial $@

# side by side: while some tests wait for SLURM there is time for the checks
test: setup
	@$(MAKE) --no-print-directory -j 2 lint pytest

pytest: setup
	$(BIN)/python -m pytest -n 3 --no-loadscope-reorder

# in a minute or two: what needs no process of training, no SLURM and no server
quick: setup
	$(BIN)/python -m pytest -n 2 -m "not slow and not ranks and not slurm"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the pages of docs/ as a site in build/site; a link that leads nowhere ends it (not with --quiet, which hides them)
docs: .venv/docs
	$(BIN)/python -m docs.make.configuration
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo "Made: build/site/index.html"

.venv/docs: .venv/ready
	@$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[docs]'
	@touch $@

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found; install one, or make PYTHON=/path/to/python"; exit 2; }
	@echo "setting up .venv with $(PYTHON), a minute or two"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --upgrade pip
	@$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[test]'
	@touch $@

# renew the pins from what is installed, once the tests pass with it
constraints: .venv/docs
	@{ head -1 constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//'; } > constraints.new
	@mv constraints.new constraints.txt
