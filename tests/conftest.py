"""What the tests share: the golden tensors of Meta's reference, and the tiny checkpoint."""

import importlib.util
import json
import lzma
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from oracle import random_images, random_token_ids
from PIL import Image
from safetensors.torch import load
from stub_hub import StubHub
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.profiler import ProfilerActivity, profile

from llama_vision import LlamaVision, Prompt
from llama_vision.cache.kv import Cache
from llama_vision.cache.pruning import Pruner
from llama_vision.cache.visual_tokens import VisualTokens
from llama_vision.config import official_config
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


def new_cache(model: LlamaVisionModel, batch: int, *, text: int = 64, images: int = 4) -> Cache:
    """A cache with room for `text` rows and `images` images of all tiles."""
    vision = model.config.vision
    return Cache(
        model.config.text,
        batch=batch,
        max_text_tokens=text,
        visual_capacity=images * vision.max_num_tiles * vision.tokens_per_tile,
        dtype=model.dtype,
    )


@torch.inference_mode()
def run_batch(
    model: LlamaVisionModel,
    token_ids: list[list[int]],
    images: list[list[TiledImage]],
    cache: Cache | None = None,
    pruner: Pruner | None = None,
) -> list[Tensor]:
    """One pass over the next rows of each sample: the logits of those rows, without padding."""
    lengths = [len(ids) for ids in token_ids]
    padded = pad_sequence([torch.tensor(ids) for ids in token_ids], batch_first=True)
    visual = model.encode_images(images)
    logits = model(padded, visual, lengths=lengths, cache=cache, pruner=pruner)
    return [row[:length] for row, length in zip(logits, lengths, strict=True)]


@dataclass
class Said:
    """All that one sample of a conversation has been given, and what came out."""

    token_ids: list[int] = field(default_factory=list)
    images: list[TiledImage] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


class Conversation:
    """A batch that goes on over several passes, with the notes that an oracle needs."""

    def __init__(self, model: LlamaVisionModel, batch: int, **sizes: int):
        self.model = model
        self.cache = new_cache(model, batch, **sizes)
        self.samples = [Said() for _ in range(batch)]

    def random_turn(self, draw: random.Random) -> tuple[list[list[int]], list[list[TiledImage]]]:
        """New rows and images for every sample; none of either for some."""
        config = self.model.config
        token_ids, images = [], []
        for said in self.samples:
            count = draw.choice([0, 1, 1, 2])
            new = random_token_ids(config, count, count + draw.randint(0, 5), draw)
            if said.token_ids[-1:] == new[:1] == [config.text.image_token_id]:
                new.insert(0, 0)  # a pass begins a new group of images
            token_ids.append(new)
            images.append(random_images(config, count, draw))
        token_ids[0] = token_ids[0] or [1]
        return token_ids, images

    @torch.inference_mode()
    def go_on(
        self,
        token_ids: list[list[int]],
        images: list[list[TiledImage]] | None = None,
        pruner: Pruner | None = None,
        prefill_chunk: int | None = None,
    ) -> VisualTokens | None:
        """One pass; returns the visual tokens that it used up."""
        images = images or [[] for _ in token_ids]
        lengths = [len(ids) for ids in token_ids]
        padded = pad_sequence([torch.tensor(ids).long() for ids in token_ids], batch_first=True)
        visual = self.model.encode_images(images)
        logits = self.model(
            padded,
            visual,
            lengths=lengths,
            cache=self.cache,
            pruner=pruner,
            prefill_chunk=prefill_chunk,
        )
        kept = visual.kept_of_images() if visual else images
        for said, *new in zip(self.samples, token_ids, images, kept, logits, strict=True):
            rows = len(new[0])
            said.token_ids += new[0]
            said.images += new[1]
            said.kept += new[2]
            said.passes.append(rows)
            said.logits.append(new[3][:rows])
        return visual


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
        return self.pruner(saliency, visual) if self.pruner else visual.valid


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
