# make demo   install, train a tiny model on drawn scenes, evaluate it, report, predict    (HEAD=upernet for the other head)
# make test   install, lint, test                                                          (make test-slow: the long ones too)
# make test PYTHON=python3.12 TORCH=2.10.0   the same with these, in an environment of its own
# make op     build the deformable-attention op ahead of time
# make gpu-check   check this code on the GPU here, in under 15 minutes: a page for an issue, gpu-check.md
# make lock   renew requirements.lock, the versions of all packages that the tests here are run with
PYTHON ?= python3
TORCH ?=
VENV = .venv$(if $(TORCH),-torch$(TORCH)$(addprefix -,$(notdir $(filter-out python3,$(PYTHON)))))
VERSIONS = $(if $(TORCH),torch==$(TORCH),-c requirements.lock)
HEAD ?= mask2former
PROCESSES = 2
THREADS = $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); echo $$(( n > $(PROCESSES) ? n / $(PROCESSES) : 1 )))
BIN = $(VENV)/bin
# UperNet has no queries to explain.
SHEET = $(if $(filter mask2former,$(HEAD)),$(BIN)/python predict.py data/toy/images/val_0000.jpg --explain --out runs/demo-pictures)

.PHONY: demo test test-slow lint op gpu-check lock clean

demo: $(VENV)/installed
	OMP_NUM_THREADS=$(THREADS) $(BIN)/torchrun --nproc_per_node=$(PROCESSES) train.py --data toy --size tiny --head $(HEAD) --device cpu
	$(BIN)/python evaluate.py
	$(BIN)/python evaluate.py --ms
	$(BIN)/python predict.py data/toy/images/val_000*.jpg --out runs/demo-pictures
	$(SHEET)
	$(BIN)/python -m tools.report
	@echo "Open $$(ls -t runs/*/report/index.html | head -n 1) and the pictures in runs/demo-pictures$(if $(SHEET),; val_0000_explain.png shows the queries)"
	@echo "The curves: $(BIN)/tensorboard --logdir runs"

test: $(VENV)/installed-dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

test-slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m "slow or not slow"

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .

op: $(VENV)/installed
	$(BIN)/python msda_cuda/build.py

gpu-check: $(VENV)/installed
	$(BIN)/python -m tools.gpu_check

# An interrupted installation leaves no stamp, so that the next call completes it.
$(VENV)/installed: requirements.txt requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements.txt $(VERSIONS)
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(BIN)/python -m pip install -r requirements-dev.txt $(VERSIONS)
	touch $@

lock:
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install -r requirements.txt
	.venv-lock/bin/python -m pip freeze > .venv-lock/versions
	{ grep '^#' requirements.lock; cat .venv-lock/versions; } > .venv-lock/requirements.lock
	mv .venv-lock/requirements.lock requirements.lock
	rm -rf .venv-lock

clean:
	rm -rf .venv .venv-* runs data/toy
