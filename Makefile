# The commands of this tree; `make help` lists them.
.DEFAULT_GOAL := help
.PHONY: help demo test serve ladder bench bench-serve bench-peers bench-prune bench-pruning bench-squeeze build debug asan tsan fuzz format format-check tidy \
  layering lint-proto packages clean

SCRIPTS := tools/scripts
SOURCES = $(shell git ls-files --cached --others --exclude-standard '*.cc' '*.h' '*.cu' '*.cuh')
# Without a file clang-format reads standard input, for ever on a terminal.
NEED_SOURCES = @[ -n "$(SOURCES)" ] || { echo "format: git lists no sources here" >&2; exit 1; }

help: ## This list
	@echo "MODEL=path uses a model of yours, ARGS='--flag ...' goes to serve, bench, fuzz and tidy."
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22

demo: ## Fetch a model, serve it, take memory away while it streams, drain
	@$(SCRIPTS)/demo.sh

test: ## Build and run every test
	@$(SCRIPTS)/test.sh release

serve: build ## Serve the model until Ctrl-C
	@model=$$($(SCRIPTS)/fetch_model.sh) && exec build/release/bin/espalier-server --model "$$model" $(ARGS)

ladder: build ## Calibrate the model's ladder on texts of this machine, beside it; half an hour
	@model=$$($(SCRIPTS)/fetch_model.sh) && python3 tests/bench/pruning/texts.py build/ladders/texts && \
	  exec build/release/bin/espalier calibrate --model "$$model" --text build/ladders/texts/calibrate/*.txt self $(ARGS)

bench: build ## Prefill and decode speed, and their share of this machine's roofline
	@model=$$($(SCRIPTS)/fetch_model.sh) && exec build/release/bin/espalier bench --model "$$model" $(ARGS)

bench-serve: build ## What serving costs beside computing, 32 streams over gRPC
	@model=$$($(SCRIPTS)/fetch_model.sh) && exec build/release/bin/serve_bench "$$model" $(ARGS)

bench-peers: build ## Beside llama.cpp and OpenVINO GenAI, TURNS=3 in turns; installs them once
	@model=$$($(SCRIPTS)/fetch_model.sh) && exec python3 tests/bench/peers/peers.py --model "$$model" \
	  --turns $(or $(TURNS),3) $(ARGS)

bench-pruning: build ## What pruning costs and saves, beside the published methods; TEXT=prose for one-kind rows
	@model=$$($(SCRIPTS)/fetch_model.sh) && ESPALIER_TEXT="$(or $(TEXT),$$ESPALIER_TEXT)" exec python3 \
	  tests/bench/pruning/pruning.py --model "$$model" $(ARGS)

bench-prune: build ## SwiftPrune of weights, beside Wanda and SparseGPT: seconds, perplexity; TEXT=prose
	@model=$$($(SCRIPTS)/fetch_model.sh) && ESPALIER_TEXT="$(or $(TEXT),$$ESPALIER_TEXT)" exec python3 \
	  tests/bench/prune/prune.py --model "$$model" $(ARGS)

bench-squeeze: build ## Goodput under overload and less memory: fixed rungs, the policies, llama-server (built once)
	@model=$$($(SCRIPTS)/fetch_model.sh) && name=$$(basename "$${model%.gguf}").ladder && exec python3 \
	  tests/bench/squeeze/squeeze.py --model "$$model" --ladder "$(or $(LADDER),deploy/ladders/$$name)" $(ARGS)

build: ## Build release into build/release
	@$(SCRIPTS)/build.sh release

debug: ## Build debug into build/debug
	@$(SCRIPTS)/build.sh debug

asan: ## Every test under AddressSanitizer, LeakSanitizer and UBSan
	@$(SCRIPTS)/test.sh asan

tsan: ## Every test that links no gRPC under ThreadSanitizer
	@$(SCRIPTS)/test.sh tsan

fuzz: ## Every fuzzer for FUZZ_SECONDS=5 each; ARGS='gguf request': those alone
	@$(SCRIPTS)/fuzz.sh $(ARGS)

format: ## Format the C++ sources in place
	@$(SCRIPTS)/install_packages.sh clang
	$(NEED_SOURCES)
	@clang-format-19 -i $(SOURCES)

format-check: ## Fail if a C++ source is not formatted
	@$(SCRIPTS)/install_packages.sh clang
	$(NEED_SOURCES)
	@clang-format-19 --dry-run --Werror $(SOURCES)

tidy: build ## clang-tidy over what differs from HEAD; ARGS=--all: everything
	@$(SCRIPTS)/tidy.sh $(ARGS)

layering: ## Check who includes whom, and what the pure folders know
	@python3 tests/layering_test.py

lint-proto: ## buf lint over proto/
	@python=$$($(SCRIPTS)/python_env.sh) && "$${python%/*}/buf" lint proto && echo "proto: clean"

packages: ## Install the Debian packages that building, testing and linting need
	@$(SCRIPTS)/install_packages.sh build test clang

clean: ## Remove build/
	rm -rf build
