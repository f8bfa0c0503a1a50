"""Ask a Llama-3.2-Vision checkpoint about pictures: `python generate.py --help`."""

import sys

try:
    from llama_vision.cli.main import main
except KeyboardInterrupt:  # torch takes a second or two to import
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())
