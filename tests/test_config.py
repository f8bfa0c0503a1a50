"""The architecture in numbers: the published sizes, and what follows from them."""

import pytest
import torch
from conftest import TINY, golden_json

from llama_vision.checkpoint.config_json import read_config
from llama_vision.checkpoint.names import official_names
from llama_vision.config import ConfigError, official_config, supported_grids
from llama_vision.model.model import LlamaVisionModel

OFFICIAL = {"11b": (906, 10_670_220_835), "90b": (1_494, 88_593_355_323)}


@pytest.fixture(scope="module", params=OFFICIAL)
def official(request):
    """The name of a published model, and its parameters on the meta device by official name."""
    with torch.device("meta"):
        model = LlamaVisionModel(official_config(request.param))
    parameters = dict(model.named_parameters())
    names = official_names(list(parameters))
    return request.param, {theirs: parameters[ours] for theirs, ours in names.items()}


def test_official_counts(official):
    name, parameters = official
    assert (len(parameters), sum(p.numel() for p in parameters.values())) == OFFICIAL[name]


def test_official_names_and_shapes(official):
    name, parameters = official
    published = golden_json(f"official/{name}")
    assert {tensor: list(p.shape) for tensor, p in parameters.items()} == published


def test_an_unknown_official_name_is_told():
    with pytest.raises(ConfigError, match=r"no official model is called '8b'; there are 11b, 90b"):
        official_config("8b")


def test_what_follows_from_the_numbers():
    config = read_config(TINY)
    assert config.text.head_dim == 16
    assert config.text.num_self_attention_layers == 8
    assert config.text.image_token_id == 512
    assert config.vision.patches_per_side == 4
    assert config.vision.tokens_per_tile == 17
    assert config.vision.feature_size == 64 * (1 + 3)
    assert [config.vision.aspect_id(grid) for grid in config.vision.grids] == list(range(1, 9))


def test_grids_count_as_the_reference_does():
    four = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))
    assert supported_grids(4) == four
    assert supported_grids(1) == ((1, 1),)
