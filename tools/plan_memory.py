"""Will it fit? Memory of a run, or the largest run for a memory, from config.json alone.

    python tools/plan_memory.py 11b --images 8 --visual-budget 0.5
    python tools/plan_memory.py 90b --dtype bfloat16 --batch 32 --fit 80GiB
    python tools/plan_memory.py meta-llama/Llama-3.2-11B-Vision-Instruct --json

The same as `generate.py --plan` and `--fit`, for batches and images that are not at hand.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama_vision.checkpoint.devices import choose_dtype, parse_device
from llama_vision.checkpoint.hub import load_config
from llama_vision.cli.arguments import Parser
from llama_vision.cli.parsing import number, whole
from llama_vision.cli.reports import print_plan
from llama_vision.cli.terminal import run_command
from llama_vision.engine.workload import DEFAULT_SEQ_LEN, PREFILL_CHUNK, workload_alike


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("plan_memory", lambda: run(read_arguments(arguments)))


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="a directory, a repository id, 11b or 90b")
    add("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
    add("--device", default="cuda", help="cuda, mps or cpu; it need not be there")
    add("--batch", type=whole, default=1, metavar="N", help="prompts at once")
    add("--images", type=whole, default=1, metavar="N", help="of each prompt")
    add("--tiles", type=whole, metavar="N", help="of each image (default: the most)")
    add("--max-seq-len", type=whole, default=DEFAULT_SEQ_LEN, metavar="N", help="prompt and answer")
    add("--prompt-tokens", type=whole, metavar="N", help="(default: all but one of --max-seq-len)")
    add("--visual-budget", type=number, metavar="R|N", help="most visual tokens to keep")
    add("--prefill-chunk", type=whole, default=PREFILL_CHUNK, metavar="N")
    add("--fit", nargs="?", const="free", metavar="SIZE", help="the largest run for so much memory")
    add("--json", action="store_true", help="print one JSON object on the last line")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    config = load_config(options.model)
    workload = workload_alike(
        config,
        batch=options.batch,
        images=options.images,
        tiles=options.tiles,
        max_seq_len=options.max_seq_len,
        prompt_tokens=options.prompt_tokens,
        visual_budget=options.visual_budget,
        prefill_chunk=options.prefill_chunk,
    )
    return print_plan(
        options.model,
        config,
        workload,
        choose_dtype(options.dtype, config.dtype),
        parse_device(options.device),
        fit=options.fit,
        as_json=options.json,
    )


if __name__ == "__main__":
    sys.exit(main())
