# Thin names over make.py, which does the same where there is no make: python make.py lab
# Another Python: make lab PYTHON=python3.12; another port: make lab PORT=9999; anything else: make test ARGS="-k windows"
# The repository's address: make address URL=https://github.com/owner/name; URL=none takes it away
PYTHON ?= python3
COMMANDS = test test-all test-browser test-peers notebooks lint benchmarks environment constraints work clean

help:
	@$(PYTHON) make.py
lab:
	@$(PYTHON) make.py lab $(if $(PORT),--port $(PORT)) $(ARGS)
address:
	@$(PYTHON) make.py address $(if $(URL),"$$URL") $(ARGS)
$(COMMANDS):
	@$(PYTHON) make.py $@ $(ARGS)
.PHONY: help lab address $(COMMANDS)
