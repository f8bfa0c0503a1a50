"""The benchmark runs without a GPU and without its peer, and says what it should."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from limits import decode_bytes, encode_operations, prefill_operations
from models import middle_config

from llama_vision.config import official_config
from llama_vision.model.model import model_without_weights

SCRIPT = Path(__file__).parents[1] / "tools" / "benchmark.py"


def run_benchmark(*arguments):
    command = [sys.executable, str(SCRIPT), str(TINY), "--threads", "1"]
    command += ["--rounds", "2", "--new-tokens", "4", "--prompt-tokens", "12", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


def test_a_dry_run_measures_every_metric():
    words, document = run_benchmark(
        *("--peers", "--batches", "1", "2", "--tiles", "4", "--keep", "0.5", "--loading")
    )
    assert "batch 2, 4 tiles" in words
    assert [row["batch"] for row in document["rows"]] == [1, 2]
    for row in document["rows"]:
        assert list(row["seconds"]) == ["ours", "ours, 50% kept"]
        for name, seconds in row["seconds"].items():
            for metric in ("image encoding", "first token", "decode"):
                assert len(seconds[metric]) == 2
                assert all(value > 0 for value in seconds[metric])
                assert row["limits"][name][metric] > 0
            assert row["peaks"][name] > 0
        for cache in row["caches"].values():
            assert cache["planned"] == cache["taken"]
        full, half = (cache["taken"] for cache in row["caches"].values())
        visual = row["batch"] * 4 * 17 * 2 * 2 * 32 * 4  # of 2 layers, keys and values, 2 · 16 wide
        assert full - half == visual / 2
    assert len(document["loading"]["ours"]) == 2
    assert document["versions"]["torch"] == torch.__version__


def test_growth_is_plotted(tmp_path):
    pytest.importorskip("matplotlib")
    _, document = run_benchmark("--growth", str(tmp_path / "curve.png"))
    assert (tmp_path / "curve.png").stat().st_size > 0
    assert {row["kind"] for row in document["rows"]} == {"text", "images"}


# The limits


def test_a_decode_step_of_the_11b_reads_its_decoder_and_its_caches():
    config, dtype = official_config("11b"), torch.bfloat16
    decoder = 17_448_972_320 + 1_050_673_152
    caches = 1000 * 128 * 2**10 + 6404 * 32 * 2**10
    assert decode_bytes(config, 1, 1000, 6404, dtype) == decoder + caches
    one, two = (decode_bytes(config, batch, 1000, 6404, dtype) for batch in (1, 2))
    assert two - one == caches
    # Without an image 8 of the 40 blocks, and their gates, are not read.
    assert decode_bytes(config, 1, 1000, 0, dtype) < 0.82 * decoder + 1000 * 128 * 2**10


@pytest.mark.parametrize("config", [official_config("11b"), middle_config()], ids=["11b", "340m"])
def test_operations_are_about_two_for_each_weight_and_token(config):
    vision = config.vision
    width, hidden = vision.hidden_size, vision.intermediate_size
    blocks = vision.num_hidden_layers + vision.num_global_layers
    weights = blocks * (4 * width**2 + 2 * width * hidden)
    tokens = 4 * (vision.tokens_per_tile + 7)
    assert 1 < encode_operations(config, 4, False) / (2 * weights * tokens) < 2
    longer = prefill_operations(config, 200, 4) - prefill_operations(config, 100, 4)
    assert longer / 100 == pytest.approx(2 * text_weights(config.text), rel=0.25)


def text_weights(text):
    width, kv_width = text.hidden_size, text.num_key_value_heads * text.head_dim
    block = 2 * width**2 + 3 * width * text.intermediate_size
    return text.num_hidden_layers * block + text.num_self_attention_layers * 2 * width * kv_width


def test_the_middle_model_has_about_340_million_parameters():
    parameters = sum(p.numel() for p in model_without_weights(middle_config()).parameters())
    assert 320e6 < parameters < 380e6
