# Everything a developer or CI runs. `make help` lists it.
SHELL := bash
.DELETE_ON_ERROR:

export PLAT_TOOLS ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/plat/tools

.PHONY: help
help: ## List the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## Install the packages and build the Kubernetes tools that the tests and the demo need
	@e2e/setup.sh

.PHONY: images
images: ## Build the images into target/images/*.tar (OCI archives; no Docker needed)
	@e2e/images/build.sh

.PHONY: demo
demo: setup images ## Start a three-node cluster in namespaces with Plat installed, and show it
	@e2e/demo.sh up

.PHONY: demo-down
demo-down: ## Remove the demo cluster
	@e2e/demo.sh down

.PHONY: test
test: ## Format, lints, and all tests, from pure ones to real clusters
	@e2e/test.sh

.PHONY: bench
bench: setup images ## Measure against peers and floors; figures go to target/bench/*.json
	@e2e/bench.sh

.PHONY: generate
generate: ## Write the generated files: CRDs, CRD reference, chart README
	@e2e/generate.sh

.PHONY: clean
clean: ## Remove what was built here (the tools' cache stays)
	@rm -rf target e2e/run
