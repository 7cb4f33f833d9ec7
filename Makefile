# One command does all set-up: uv (from PyPI) builds .venv from the pinned requirements.lock.
PYTHON ?= python3
PY := .venv/bin/python
RUN := runs/demo
export JAX_PLATFORMS ?= cpu
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: setup test slow demo stamps speech smoke peers lock clean

setup: .venv/.installed

.venv/.installed: requirements.lock
	$(PYTHON) -m venv .uv
	.uv/bin/python -m pip install --quiet "uv>=0.9"
	.uv/bin/uv venv --quiet --clear .venv
	.uv/bin/uv pip install --quiet --compile-bytecode --python .venv/bin/python -r requirements.lock
	touch $@

# One process a core; the tests of a file stay together, for they share what it made.
test: setup
	$(PY) -m pytest -q -n auto --dist loadfile

slow: setup
	$(PY) -m pytest -q -m slow

demo: setup
	$(PY) -m tools.demo --workdir=$(RUN)

# The visual tokenizer on real pictures: packages from Debian, training, page.
stamps: setup
	$(PY) -m tools.tokenizer --config=experiments/stamps.py --workdir=runs/stamps

# The speech tokenizer on recordings of people.
speech: setup
	$(PY) -m tools.tokenizer --config=experiments/speech.py --workdir=runs/speech

smoke: setup
	$(PY) -m dina.train --config=experiments/digits.py:smoke --workdir=runs/smoke

# What tools.bench measures beside us, in an environment of its own: torch has other Pythons and other pins than we have.
peers:
	$(PYTHON) -m venv .peers
	.peers/bin/python -m pip install --quiet torch==2.13.0 "transformers>=5" "vector-quantize-pytorch>=1.20" safetensors

lock: setup
	.uv/bin/uv pip compile pyproject.toml --python .venv/bin/python --extra demo --extra test --upgrade \
	  --no-emit-index-url --no-annotate --no-header --quiet -o requirements.lock

clean:
	rm -rf .venv .uv .peers runs
