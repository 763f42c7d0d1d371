# make book      train the small model, run every chapter, build the site
# make test      run the default test suite
# make lint      look for mistakes and for code that is not formatted
# make notebooks write the notebook beside each chapter
# make serve-book  show the built site in a browser
# make clean     remove what make made, .venv included
# Each makes what it needs first; repeating one is cheap.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
SITE := _build/html

.PHONY: book test lint notebooks serve-book clean help

help:
	@sed -n 's/^# //p' Makefile

$(READY): requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mptbook needs Python 3.11 or newer, not " + sys.version.split()[0])'
	@echo "installing into .venv (about a minute, more where torch has to be downloaded)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $(READY)

book: $(READY)
	$(BIN)/mptbook corpora
	@echo "training the small model, unless it is in the cache (eight to forty minutes, by processor)"
	$(BIN)/python -m mptbook.train.recipe
	$(BIN)/python book/_ext/notebooks.py --check
	@echo "running the chapters whose code or package changed, and building the site"
	$(BIN)/jupyter-book build . -W -n --keep-going
	@echo "the book: $(SITE)/index.html (make serve-book shows it in a browser)"

test: $(READY)
	$(BIN)/mptbook corpora
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

notebooks: $(READY)
	$(BIN)/python book/_ext/notebooks.py

serve-book: $(SITE)/index.html
	@echo "the book is at http://127.0.0.1:8000 (Ctrl-C ends it)"
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory $(SITE) 8000

$(SITE)/index.html:
	$(MAKE) book

clean:
	rm -rf .venv _build runs *.egg-info .pytest_cache .ruff_cache .hypothesis
