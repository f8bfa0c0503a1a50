"""Ask a Llama-3.2-Vision checkpoint about pictures: `python generate.py --help`."""

import sys

from llama_vision.cli import main

if __name__ == "__main__":
    sys.exit(main())
