"""What the tests share: the golden tensors of Meta's reference, and the tiny checkpoint."""

import importlib.util
import json
import lzma
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import random_images, random_token_ids
from PIL import Image
from safetensors.torch import load
from stub_hub import StubHub
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from llama_vision import Completion, LlamaVision, Prompt
from llama_vision.cache.kv import Cache
from llama_vision.cache.pruning import Pruner
from llama_vision.cache.visual_tokens import VisualTokens
from llama_vision.config import official_config
from llama_vision.engine.decode import Decoder
from llama_vision.engine.prefill import prefill
from llama_vision.inputs.image import TiledImage, tile_image
from llama_vision.inputs.tokenizer import Tokenizer, load_tokenizer
from llama_vision.model.model import LlamaVisionModel

torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other

GOLDEN = Path(__file__).parent / "golden"
TINY = GOLDEN / "tiny"
LLAMA_3 = official_config("11b").text
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="needs a C++ compiler"
)
CASES = (
    "image_first",
    "bos_image",
    "text_before",
    "two_images",
    "consecutive",
    "batch",
    "batch_ragged",
    "text_only",
)


@cache
def golden_tensors(name: str) -> dict[str, Tensor]:
    """Tensors of one packed file, such as `cases/batch` or `modules`."""
    return load(lzma.decompress((GOLDEN / f"{name}.safetensors.xz").read_bytes()))


@cache
def golden_json(name: str) -> dict:
    """One of `manifest`, `images`, `tokenizer`, `official/11b`, `official/90b`."""
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def case_prompts(case: str) -> list[Prompt]:
    """The prompts of one golden case."""
    tensors = golden_tensors(f"cases/{case}")
    return [
        Prompt(ids[:length].tolist(), [Image.open(GOLDEN / path) for path in sample["images"]])
        for ids, length, sample in zip(
            tensors["tokens"],
            tensors["lengths"],
            golden_json("manifest")["cases"][case]["samples"],
            strict=True,
        )
    ]


def case_images(case: str) -> list[list[TiledImage]]:
    """The tiled images of one golden case, for each sample."""
    return [
        [tile_image(image, tile_size=56, max_tiles=4) for image in prompt.images]
        for prompt in case_prompts(case)
    ]


def llama_3_file() -> Path:
    """The real tokenizer.model, from the `llama-models` package of the test requirements."""
    package = importlib.util.find_spec("llama_models")
    assert package, "llama-models is not installed; pip install --no-deps llama-models==0.3.0"
    return Path(package.submodule_search_locations[0]) / "llama3" / "tokenizer.model"


def case_inputs(case: str) -> list[tuple[list[int], list[TiledImage]]]:
    """Token ids and tiled images of each prompt of a golden case."""
    ids = [list(prompt.token_ids) for prompt in case_prompts(case)]
    return list(zip(ids, case_images(case), strict=True))


def new_cache(
    model: LlamaVisionModel, slots: int = 1, *, text: int = 64, visual: int | None = 512
) -> Cache:
    """A cache with room for `text` rows and `visual` tokens in each slot."""
    return Cache(
        model.config.text,
        slots=slots,
        max_text_tokens=text,
        visual_capacity=visual,
        dtype=model.dtype,
    )


def cache_tensors(cache: Cache) -> list[Tensor]:
    """All keys and values of both stores."""
    stores = (cache.text, cache.visual)
    return [tensor for store in stores for tensor in (*store.keys, *store.values)]


class Conversation:
    """A slot that is filled turn after turn, with the notes that an oracle needs.

    Args:
        cache: None for one of its own, of `sizes` for `new_cache`.
    """

    def __init__(
        self, model: LlamaVisionModel, cache: Cache | None = None, slot: int = 0, **sizes: Any
    ):
        self.model, self.slot = model, slot
        self.cache = new_cache(model, **sizes) if cache is None else cache
        self.token_ids: list[int] = []
        self.images: list[TiledImage] = []
        self.kept: list[Tensor] = []
        self.passes: list[int] = []
        self.logits: list[Tensor] = []

    @property
    def held(self) -> list[int]:
        """Visual tokens that each cross-attention layer holds."""
        return [lengths[self.slot] for lengths in self.cache.visual.lengths]

    def go_on(self, token_ids: list[int], images: Sequence[TiledImage] = (), **how: Any) -> Tensor:
        """Prefill the next rows, see `prefill`; their logits [S, vocabulary]."""
        how = {"every_row": True, **how}
        logits, kept, _ = prefill(self.model, self.cache, self.slot, token_ids, images, **how)
        self.note(token_ids, logits, images, kept)
        return logits

    def note(
        self,
        token_ids: Sequence[int],
        logits: Tensor,
        images: Sequence[TiledImage] = (),
        kept: Sequence[Tensor] = (),
    ) -> None:
        """Note what went in and what came out."""
        self.token_ids += token_ids
        self.images += images
        self.kept += kept
        self.passes.append(len(token_ids))
        self.logits.append(logits)

    def random_turn(self, draw: random.Random) -> tuple[list[int], list[TiledImage]]:
        """Next rows, with none to three images in groups."""
        config = self.model.config
        count = draw.choice([0, 1, 1, 2, 3])
        new = random_token_ids(config, count, count + draw.randint(1, 6), draw)
        if self.token_ids[-1:] == new[:1] == [config.text.image_token_id]:
            new.insert(0, 0)  # a pass begins a new group of images
        return new, random_images(config, count, draw)


def decode(decoder: Decoder, tokens: dict[Conversation, int]) -> None:
    """One step for some conversations of one cache."""
    logits = decoder.step({said.slot: token for said, token in tokens.items()})
    for said, token in tokens.items():
        said.note([token], logits[said.slot][None].clone())


@dataclass(frozen=True)
class Keep:
    """A pruner whose answer is known beforehand."""

    mask: Tensor
    trim_first_layer: bool = True

    def __call__(self, saliency: Tensor, visual: VisualTokens) -> Tensor:
        return self.mask


class Spy:
    """A pruner that keeps what another one does, or all, and notes what it was given."""

    def __init__(self, pruner: Pruner | None = None):
        self.pruner = pruner
        self.votes = getattr(pruner, "votes", "all")
        self.trim_first_layer = getattr(pruner, "trim_first_layer", True)
        self.saliencies: list[Tensor] = []
        self.visuals: list[VisualTokens] = []

    def __call__(self, saliency: Tensor, visual: VisualTokens) -> Tensor:
        self.saliencies.append(saliency)
        self.visuals.append(replace(visual))
        return self.pruner(saliency, visual) if self.pruner else torch.ones_like(visual.is_class)


def random_pruner(draw: random.Random, **attributes: Any) -> Pruner:
    """A pruner that keeps few or many tokens by chance, one at least, and has some attributes."""
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    share = draw.choice([0.02, 0.1, 0.5, 0.9])

    def prune(saliency: Tensor, visual: VisualTokens) -> Tensor:
        mask = torch.rand(len(visual.image), generator=generator) < share
        mask[draw.randrange(len(mask))] = True
        return mask

    vars(prune).update(attributes)
    return prune


def live_bytes(run: Callable[[], object]) -> list[int]:
    """CPU memory in use, beyond that at the start, after each allocation and release in `run`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return list(accumulate((size for _, size in changes), initial=0))


def assert_close(name: str, got: Tensor, want: Tensor, most: float) -> None:
    """Fail with the name and the place of the largest difference if it is above `most`."""
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, expected {list(want.shape)}"
    difference = (got.double() - want.double()).abs()
    worst = difference.max().item() if difference.numel() else 0.0
    place = torch.unravel_index(difference.argmax(), difference.shape) if worst else ()
    assert worst <= most, f"{name}: off by {worst:.2e} at {[int(i) for i in place]}, allowed {most}"


def assert_same(got: Completion, want: Completion) -> None:
    """Two completions of the same, with other neighbours or of other turns."""
    assert (got.token_ids, got.text) == (want.token_ids, want.text)
    assert got.finish_reason == want.finish_reason
    assert got.visual_tokens == want.visual_tokens
    assert_close("logprobs", torch.tensor(got.logprobs), torch.tensor(want.logprobs), 1e-4)
    assert len(got.kept) == len(want.kept)
    assert all(map(torch.equal, got.kept, want.kept))


@pytest.fixture(scope="session")
def tiny() -> LlamaVision:
    """The tiny reference checkpoint, float32 on the CPU."""
    return LlamaVision.from_pretrained(TINY, device="cpu")


@pytest.fixture(scope="session")
def llama_3() -> Tokenizer:
    """The real tokenizer of Llama 3."""
    return load_tokenizer(llama_3_file().parent, LLAMA_3)


@pytest.fixture
def repository(tmp_path) -> Path:
    """What the stub hub serves: the tiny checkpoint, and much that loading does not need."""
    directory = Path(shutil.copytree(TINY, tmp_path / "repository"))
    (directory / "original").mkdir()
    for name in ("original/consolidated.00.pth", "original/params.json", "README.md", "x.bin"):
        (directory / name).write_bytes(b"not needed")
    return directory


@pytest.fixture
def hub(repository, tmp_path, monkeypatch):
    """A hub on loopback that serves it, with an empty local cache."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with StubHub(repository) as stub:
        stub.use(monkeypatch, tmp_path / "cache")
        yield stub
