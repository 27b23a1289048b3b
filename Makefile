# Developer commands; `make` alone lists them.
.DEFAULT_GOAL := help
.PHONY: help setup test slow lint types check docs bench coverage pbc

help:
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "%-10s%s\n", $$1, $$2 }' Makefile

setup: ## install the package, all tools and the git hooks
	pip install -e ".[dev]"
	pre-commit install

test: ## run the fast tests (minutes)
	pytest

slow: ## run the slow tests
	pytest -m slow

lint: ## check style and format
	ruff check .
	ruff format --check .

types: ## check the static types of the package
	mypy

check: ## run the pre-commit hooks on all files
	pre-commit run --all-files

docs: ## build the documentation into docs/_build/html
	sphinx-build -W docs docs/_build/html

bench: ## run the benchmarks that need no data, against plain fastai
	python benchmarks/startup.py
	python benchmarks/train_throughput.py --size 256 --batch-size 32 --batches 3 --repeats 2
	python benchmarks/train_throughput.py --size 128 --batch-size 32 --batches 5
	python benchmarks/predict_throughput.py --size 256 --images 96
	python benchmarks/predict_throughput.py --size 128 --images 192
	python benchmarks/interpret.py --size 256 --images 64 --repeats 2
	python benchmarks/memory.py --size 256 --batch-size 16
	python benchmarks/memory.py --size 128 --batch-size 32

coverage: ## list lines and branches that no test reaches, slow tests included
	pytest -m "slow or not slow" --cov

DATA ?= pbc
FIT_PBC = bloodcell fit --data $(DATA) --split random --size 128 --batch-size 32 --epochs 6
pbc: ## train the pretrained weights on the PBC set in DATA (two hours on two cores)
	$(FIT_PBC) --weights none --stain 0.4 --name pbc-1
	$(FIT_PBC) --weights runs/pbc-1/model.safetensors --name pbc
	bloodcell interpret pbc
	bloodcell export pbc --format bundle --out bloodcell_fastai/weights/pbc
