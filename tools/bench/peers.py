"""Who takes part in a benchmark: this package, and transformers on the same weights."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from limits import now, peak_of, timed
from torch import Tensor

from llama_vision import Engine, LlamaVision, Prompt, Request, TrimmedLlama
from llama_vision.cache.kv import Cache
from llama_vision.checkpoint.config_json import config_to_dict
from llama_vision.checkpoint.names import official_names
from llama_vision.config import Config
from llama_vision.engine.encode import encode_group
from llama_vision.inputs.image import TiledImage
from llama_vision.model.model import LlamaVisionModel

GRIDS = {1: (1, 1), 2: (1, 2), 3: (1, 3), 4: (2, 2)}


@dataclass(frozen=True)
class Run:
    """Equal prompts of random text, each with so many tiles of pictures in front."""

    token_ids: list[int]
    images: tuple[TiledImage, ...]
    batch: int
    tiles: int
    """Of all pictures of a prompt together; a picture has four, the last one what is left."""
    new_tokens: int

    @property
    def prompt_tokens(self) -> int:
        return len(self.token_ids)

    @classmethod
    def random(cls, config: Config, batch: int, tiles: int, tokens: int, new_tokens: int) -> "Run":
        generator = torch.Generator().manual_seed(0)
        limit = config.text.bos_token_id
        ids = torch.randint(limit, (tokens,), generator=generator).tolist()
        ids[0], images = config.text.bos_token_id, []
        side, most = config.vision.image_size, config.vision.max_num_tiles
        for start in range(0, tiles, most):
            grid = GRIDS[min(most, tiles - start)]
            pixels = torch.randn(math.prod(grid), 3, side, side, generator=generator)
            images.append(TiledImage(pixels, grid, config.vision.aspect_id(grid)))
        ids[1 : 1 + len(images)] = [config.text.image_token_id] * len(images)
        return cls(ids, tuple(images), batch, tiles, new_tokens)


def nothing() -> None:
    """Done by default when a token is there."""


class Peer(ABC):
    """One implementation on one run."""

    name: str

    @abstractmethod
    def encode(self) -> object:
        """All pictures of the batch."""

    @abstractmethod
    def generate(self, new_tokens: int, *, on_token: Callable[[], object] = nothing) -> Tensor:
        """Greedily, pictures included: ids [B, new tokens]; `on_token` is called for each."""

    def measure(self) -> tuple[float, float, float]:
        """Seconds of encoding, to the first token, and of one step of decoding after it."""
        return timed(self.encode, self.device), *self.measure_tokens()

    def measure_tokens(self) -> tuple[float, float]:
        """Seconds to the first token, from pictures, and of one step of decoding after it."""
        stamps = [now(self.device)]
        self.generate(1 + self.new_tokens, on_token=lambda: stamps.append(now(self.device)))
        start, first, *_, last = stamps
        return first - start, (last - first) / self.new_tokens

    def peak_bytes(self) -> int:
        """Most bytes beside the weights while a few tokens are made."""
        return peak_of(lambda: self.generate(4), self.device)


class Ours(Peer):
    """This package, trimmed to a part of the visual tokens if that is less than 1.

    One engine answers round after round, as a server's does: what it captures, it captures once.
    """

    def __init__(self, model: LlamaVisionModel, run: Run, keep: float = 1, compiled: bool = False):
        kept = "" if keep == 1 else f", {keep:.0%} kept"
        self.name = "ours" + ", compiled" * compiled + kept
        self.model, self.run, self.keep, self.compiled = LlamaVision(model), run, keep, compiled
        self.new_tokens, self.device = run.new_tokens, model.device
        self.settings = {"temperature": 0, "ignore_stop": True}
        if keep < 1:
            budget = int(keep * run.tiles * model.config.vision.tokens_per_tile)
            self.settings |= {"pruner": TrimmedLlama(1.0), "visual_budget": budget}
        self.engine: Engine | None = None

    @torch.inference_mode()
    def encode(self) -> object:
        for _ in range(self.run.batch * bool(self.run.images)):
            encode_group(self.model.model, self.run.images)

    def generate(self, new_tokens: int, *, on_token: Callable[[], object] = nothing) -> Tensor:
        engine, requests = self.start(new_tokens)
        while any(request.finish_reason is None for request in requests):
            engine.step()
            on_token()
        return torch.tensor([request.token_ids for request in requests])

    def start(self, new_tokens: int) -> tuple[Engine, list[Request]]:
        """Ask the engine, or a new one where it has not enough room."""
        prompts = [Prompt(self.run.token_ids, self.run.images)] * self.run.batch
        settings = {**self.settings, "max_new_tokens": new_tokens}
        rows = self.run.prompt_tokens + new_tokens
        if self.engine is not None and self.engine.cache.text.capacity >= rows:
            return self.engine, [self.engine.submit(prompt, **settings) for prompt in prompts]
        self.engine, requests = self.model.start(
            prompts, compiled=self.compiled, force=True, **settings
        )
        return self.engine, requests

    def peak_bytes(self) -> int:
        self.engine = None  # its cache counts
        return super().peak_bytes()

    def cache_bytes(self) -> dict[str, int]:
        """What the cache was planned to take, and what it takes once the prompt is read."""
        self.engine = None
        engine, _ = self.start(self.new_tokens)
        engine.step()
        engine.close()
        config, sizes = self.model.config, engine.workload.cache_sizes(self.model.config)
        planned = Cache.plan(config.text, dtype=self.model.model.dtype, **sizes)
        return {"planned": planned.total, "taken": engine.cache.nbytes}


class Transformers(Peer):
    """transformers' own model over the very same tensors.

    Args:
        mode: "eager" with its growing cache, "static" with its static one, or "compiled": static
            and with the decoding step compiled.
    """

    def __init__(self, model: LlamaVisionModel, mode: str):
        from transformers import MllamaConfig, MllamaForConditionalGeneration

        self.name = f"transformers, {mode}"
        self.config, self.mode, self.device = model.config, mode, model.device
        data = MllamaConfig(**config_to_dict(model.config))
        with torch.device("meta"):
            self.peer = MllamaForConditionalGeneration(data)
        weights = dict(model.named_parameters())
        official = official_names(list(weights), newer=True)
        state = {theirs: weights[ours] for theirs, ours in official.items()}
        missing, unexpected = self.peer.load_state_dict(state, strict=False, assign=True)
        assert not [*missing, *unexpected], (missing, unexpected)
        fill_buffers(self.peer, data, model)
        self.peer.eval()

    def on(self, run: Run) -> "Transformers":
        """The same with a run's tensors at hand."""
        self.new_tokens, batch, vision = run.new_tokens, run.batch, self.config.vision
        ids = torch.tensor([run.token_ids] * batch, device=self.device)
        self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self.pictures = {}
        if run.images:
            (image,) = run.images
            shape = (batch, 1, vision.max_num_tiles, *image.pixels.shape[1:])
            pixels = torch.zeros(shape)
            pixels[:, 0, : run.tiles] = image.pixels
            real = torch.arange(vision.max_num_tiles, device=self.device) < run.tiles
            sees = (
                torch.tensor(run.token_ids, device=self.device) == self.config.text.image_token_id
            )
            sees = sees.cumsum(0) > 0
            self.pictures = {
                "pixel_values": pixels.to(self.device, self.peer.dtype),
                "aspect_ratio_ids": torch.full((batch, 1), image.aspect_id, device=self.device),
                "aspect_ratio_mask": real.long().expand(batch, 1, -1),
            }
            cross = (sees[:, None, None] & real).long()  # [S, 1, T]
            self.inputs |= {
                **self.pictures,
                "cross_attention_mask": cross.expand(batch, -1, -1, -1),
            }
        return self

    @torch.inference_mode()
    def encode(self) -> object:
        if not self.pictures:
            return None
        inner = self.peer.model
        features = inner.vision_model(**self.pictures).last_hidden_state
        return inner.multi_modal_projector(features)

    @torch.inference_mode()
    def generate(
        self,
        new_tokens: int,
        *,
        on_token: Callable[[], object] = nothing,
        stop_ids: list[int] | None = None,
    ) -> Tensor:
        ids = self.inputs["input_ids"]
        never = torch.zeros(len(ids), dtype=torch.bool, device=self.device)

        def go_on(*_: object, **__: object) -> Tensor:
            on_token()
            return never

        how = {} if self.mode == "eager" else {"cache_implementation": "static"}
        if self.mode != "compiled":
            how["disable_compile"] = True
        out = self.peer.generate(
            **self.inputs,
            max_new_tokens=new_tokens,
            min_new_tokens=0 if stop_ids else new_tokens,
            eos_token_id=stop_ids,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[go_on],
            **how,
        )
        return out[:, ids.shape[1] :]


def load_with_transformers(
    directory: str, device: torch.device, dtype: torch.dtype
) -> torch.nn.Module:
    """Its own way from files to a model."""
    from transformers import MllamaForConditionalGeneration

    return MllamaForConditionalGeneration.from_pretrained(
        directory, dtype=dtype, device_map=device.type if device.type == "cuda" else None
    )


def fill_buffers(peer: torch.nn.Module, data: object, model: LlamaVisionModel) -> None:
    """Give the tensors that are computed and not loaded, made on the meta device, their values."""
    from transformers.models.mllama.modeling_mllama import MllamaRotaryEmbedding

    text = peer.model.language_model
    text.rotary_emb = MllamaRotaryEmbedding(data.text_config).to(model.device)
    left = [name for name, buffer in peer.named_buffers() if buffer.is_meta]
    assert not left, left
