"""The command: bind, load, and answer until a signal comes."""

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from llama_vision.cache.choose_rule import choose_rule
from llama_vision.checkpoint.hub import EMBEDDED_MODEL
from llama_vision.cli.arguments import Parser, UsageError, add_quantization, build_quantization
from llama_vision.cli.loading import load_outline, load_weights
from llama_vision.cli.parsing import number, real, text, whole
from llama_vision.cli.terminal import run_command, tell
from llama_vision.engine.engine import Engine
from llama_vision.engine.settings import Settings
from llama_vision.engine.workload import DEFAULT_SEQ_LEN, slot_capacity
from llama_vision.errors import LlamaVisionError, quote
from llama_vision.inputs.web_pictures import check_hosts, fetch_picture
from llama_vision.memory.units import parse_bytes
from llama_vision.values import Whole, check

KEY = "LLAMA_VISION_API_KEY"
OPTIONS = (
    ("--model", str, str(EMBEDDED_MODEL), "a directory or repository, in the official layout"),
    ("--served-name", text, None, "what clients call it (default: the last part of that)"),
    ("--host", str, "127.0.0.1", "where to listen"),
    ("--port", whole, 8000, "where to listen; 0 for one that is free"),
    ("--api-key", str, None, f"what clients must show; as {KEY} in the environment ps hides it"),
    ("--allow-urls", str, "", "hosts, with commas, from which pictures are fetched"),
    ("--slots", whole, 8, "answers that are made at once"),
    ("--max-seq-len", whole, DEFAULT_SEQ_LEN, "most tokens of prompt and answer together"),
    ("--max-queue", whole, 256, "most answers, and pictures of theirs, that wait"),
    ("--max-body", str, "64MiB", "most bytes of a request"),
    ("--max-images", whole, 8, "most pictures of a request"),
    ("--max-tiles", whole, None, "most tiles of a picture, where a request does not say"),
    (
        "--keep",
        number,
        None,
        "visual tokens to keep (max-min, merged), where a request does not say",
    ),
    ("--k-ratio", real, None, "prune by Trimmed Llama, where a request does not say"),
    ("--image-cache", str, "1GiB", "host memory for pictures that are asked about again"),
    ("--device", str, "auto", "auto, cpu, cuda, cuda:N or mps"),
    ("--dtype", str, "auto", "auto, bfloat16, float16 or float32"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, see `run_command`."""
    given = sys.argv[1:] if arguments is None else arguments
    return run_command("llama-vision-serve", lambda: serve(read_arguments(given)))


def read_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser("llama-vision-serve", description="OpenAI's chat completions, over HTTP.")
    for name, kind, default, about in OPTIONS:
        about = about if default in (None, "") else f"{about} (default: %(default)s)"
        parser.add_argument(name, type=kind, default=default, help=about)
    add_quantization(parser)
    parser.add_argument("--compile", action="store_true", help="compile decoding")
    parser.add_argument("--force", action="store_true", help="go on where memory seems too small")
    parser.set_defaults(devices=None)
    return parser.parse_args(arguments)


def serve(options: argparse.Namespace) -> int:
    """Refuse what cannot be, take the port, load the model, and answer."""
    try:
        from llama_vision.serve.app import Server, make_server
        from llama_vision.serve.bodies import Reader
        from llama_vision.serve.worker import Worker
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        needs = f'the server needs {package}; pip install "llama-vision[server]"'
        raise UsageError(needs) from None
    slots, length, force = options.slots, options.max_seq_len, options.force
    options.quantize = build_quantization(options)
    key = os.environ.get(KEY) if options.api_key is None else options.api_key
    if key == "":
        raise UsageError(f"the key of --api-key or {KEY} is empty; give one, or neither")
    pruner = choose_rule(keep=options.keep, k_ratio=options.k_ratio)
    base = Settings(max_new_tokens=length, max_tiles=options.max_tiles, pruner=pruner)
    images = check("--max-images", options.max_images, Whole())
    limits = check("--max-queue", options.max_queue, Whole()), parse_bytes(options.max_body)
    fetch = partial(fetch_picture, hosts=check_hosts(options.allow_urls.split(",")))
    listener = listen(options.host, options.port)
    model = load_outline(options)
    model.need_tokenizer()
    base.limited("max_tiles", model.config.vision.max_num_tiles)
    capacity = slot_capacity(model.config, slots, length, None)
    if not force:
        model.room.check_slots(slots, length, capacity)
    load_weights(model, options)
    engine = Engine(model, slots=slots, max_seq_len=length, compiled=options.compile, force=force)
    name = options.served_name or Path(options.model).resolve().name
    reader = Reader(model, name, base, length, {"max_images": images, "fetch": fetch})
    server = Server(reader, Worker(engine), key and os.fsencode(key), *limits)
    host, port, *_ = listener.getsockname()
    place = f"[{host}]" if ":" in host else host
    tell(f"{quote(name)} answers at http://{place}:{port}/v1", "llama-vision-serve")
    make_server(server.app()).run(sockets=[listener])
    return 0


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        LlamaVisionError: the port is taken, or the host is none of this machine's.
    """
    check("--port", port, Whole(0, 65535))
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise LlamaVisionError(f"cannot listen at {quote(host)}, port {port}: {why}") from None


if __name__ == "__main__":
    sys.exit(main())
