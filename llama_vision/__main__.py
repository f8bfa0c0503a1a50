"""Ask a Llama-3.2-Vision checkpoint about pictures: `python -m llama_vision --help`."""

import sys

from llama_vision.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
