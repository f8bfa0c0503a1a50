"""The benchmark runs without a GPU and without its peer, and says what it should."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "bench"))

from limits import decode_bytes, encode_operations, prefill_operations
from models import middle_config
from progress import redraw

from llama_vision.config import official_config
from llama_vision.model.model import model_without_weights

ROOT = Path(__file__).parents[1]


def run_benchmark(*arguments, script="benchmark.py", new_tokens=("4",)):
    command = [sys.executable, str(ROOT / "tools" / "bench" / script), str(TINY)]
    command += ["--threads", "1", "--rounds", "2", "--prompt-tokens", "12"]
    command += ["--new-tokens", *new_tokens, *arguments]
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
    assert f"{document['processor']}, " in words.splitlines()[0]
    assert document["processor"].endswith("AMX")


def test_growth_is_plotted(tmp_path):
    pytest.importorskip("matplotlib")
    _, document = run_benchmark("--growth", str(tmp_path / "curve.png"), "--rounds", "1")
    assert (tmp_path / "curve.png").stat().st_size > 0
    assert {row["kind"] for row in document["rows"]} == {"text", "images"}


def test_throughput_is_that_of_two_checkouts_in_turns():
    words, document = run_benchmark(
        *("--prompts", "5", "--slots", "2", "--tiles", "4", "--package", str(ROOT)),
        script="throughput.py",
        new_tokens=("2", "6"),
    )
    assert 10 <= document["tokens"] <= 30
    for name in ("this", "other"):
        assert len(document[name]["seconds"]) == 2
        first = document[name]["first_token"]
        assert len(first) == 5
        assert max(first[:2]) < min(first[2:])  # three wait for a slot
    assert document["ratio"] > 0
    assert document["same_answers"] == 5
    assert "5 of 5 answers are the same" in words


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


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_drawn_on_a_terminal_only(capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    redraw("round 1 of 2")
    redraw()
    drawn = f"\r{'round 1 of 2':<60}\r\r{'':<60}\r"
    assert capsys.readouterr().err == (drawn if terminal else "")
