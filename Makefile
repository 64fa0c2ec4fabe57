# Thin names over make.py, which does the same where there is no make: python make.py lab
# Another Python: make lab PYTHON=python3.12; another port: make lab PORT=9999; anything else: make test ARGS="-k windows"
PYTHON ?= python3
COMMANDS = test test-all test-browser notebooks lint benchmarks environment constraints clean

help:
	@$(PYTHON) make.py
lab:
	@$(PYTHON) make.py lab $(if $(PORT),--port $(PORT)) $(ARGS)
$(COMMANDS):
	@$(PYTHON) make.py $@ $(ARGS)
.PHONY: help lab $(COMMANDS)
