"""Benchmarks with fewer visual tokens: what does each rule of pruning cost, and save?

    python tools/evaluate.py --data MMBench_DEV_EN.tsv --out results/mmbench \\
        --model meta-llama/Llama-3.2-11B-Vision-Instruct --batch 8
    python tools/evaluate.py --data OCRBench.tsv --metric contains --out results/ocrbench …
    python tools/evaluate.py --data MMBench_DEV_EN.tsv --out results/paper --paper 0.25 …

Questions come from VLMEvalKit's tables (.tsv: index, question, answer, image in base64 or
image_path, and where they are there hint, A to D and category) or from .jsonl with the same names.
For each rule and share of visual tokens: score with a 95 % interval, the paired change from all
tokens with McNemar's exact test, tokens kept, bytes of the visual cache and seconds a question.

Every batch is written to DIR/answers.jsonl at once: a run that was killed goes on where it was with
the same command, and its comparison.json, .csv, .md and .png (paper.… for --paper) differ in the
seconds alone. Rows that cannot be asked are counted and named, and end nothing. Greedy, pictures
before the text.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from evaluation.command import main

if __name__ == "__main__":
    sys.exit(main())
