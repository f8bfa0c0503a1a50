"""Who takes part in a benchmark: this package, and transformers on the same weights."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from limits import peak_of
from torch import Tensor

from llama_vision.chat import Prompt
from llama_vision.checkpoint import official_names
from llama_vision.config import Config
from llama_vision.decoding import Generation
from llama_vision.image import TiledImage
from llama_vision.memory import PREFILL_CHUNK, Workload
from llama_vision.model import LlamaVisionModel
from llama_vision.pruning import TrimmedLlama
from llama_vision.sampling import Sampling

GRIDS = {1: (1, 1), 2: (1, 2), 3: (1, 3), 4: (2, 2)}
Timer = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Run:
    """Equal prompts of random text, each with one picture in front, or none."""

    token_ids: list[int]
    image: TiledImage | None
    batch: int
    tiles: int
    new_tokens: int

    @property
    def prompt_tokens(self) -> int:
        return len(self.token_ids)

    @classmethod
    def random(cls, config: Config, batch: int, tiles: int, tokens: int, new_tokens: int) -> "Run":
        generator = torch.Generator().manual_seed(0)
        limit = config.text.bos_token_id
        ids = torch.randint(limit, (tokens,), generator=generator).tolist()
        ids[0], image = config.text.bos_token_id, None
        if tiles:
            ids[1] = config.text.image_token_id
            side, grid = config.vision.image_size, GRIDS[tiles]
            pixels = torch.randn(tiles, 3, side, side, generator=generator)
            image = TiledImage(pixels, grid, config.vision.aspect_id(grid))
        return cls(ids, image, batch, tiles, new_tokens)


class Peer(ABC):
    """One implementation on one run."""

    @abstractmethod
    def encode(self) -> object:
        """All pictures of the batch."""

    @abstractmethod
    def generate(self, new_tokens: int) -> Tensor:
        """Greedily, pictures included: ids [B, new tokens]."""

    def measure(self, timer: Timer) -> tuple[float, float, float]:
        """Seconds of encoding, to the first token, and of one step of decoding after it."""
        encoding = timer(self.encode)
        first = timer(lambda: self.generate(1))
        both = timer(lambda: self.generate(1 + self.new_tokens))
        return encoding, first, max(both - first, 1e-9) / self.new_tokens

    def peak_bytes(self) -> int:
        """Most bytes beside the weights while a few tokens are made."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            held = torch.cuda.memory_allocated(self.device)
            self.generate(4)
            return torch.cuda.max_memory_allocated(self.device) - held
        return peak_of(lambda: self.generate(4))


class Ours(Peer):
    """This package, trimmed to a part of the visual tokens if that is less than 1."""

    def __init__(self, model: LlamaVisionModel, run: Run, keep: float, compiled: bool = False):
        self.model, self.run, self.compiled = model, run, compiled
        self.new_tokens, self.device = run.new_tokens, model.device
        self.pruner = TrimmedLlama(1.0) if keep < 1 else None
        visual = run.tiles * model.config.vision.tokens_per_tile
        self.budget = (int(keep * visual),) * run.batch if keep < 1 else None
        self.images = [[run.image] if run.image else [] for _ in range(run.batch)]

    @torch.inference_mode()
    def encode(self) -> object:
        return self.model.encode_images(self.images)

    def generate(self, new_tokens: int) -> Tensor:
        ids, batch = self.run.token_ids, self.run.batch
        most = len(ids) + new_tokens
        grids = tuple(tuple(image.grid for image in sample) for sample in self.images)
        generation = Generation(
            self.model,
            None,
            [Prompt(ids, [None] * len(self.images[0]))] * batch,
            self.images,
            Workload(
                (tuple(ids),) * batch,
                grids,
                most,
                PREFILL_CHUNK,
                pruned=self.pruner is not None,
                budget=self.budget,
            ),
            limits=[most] * batch,
            sampling=Sampling(),
            seed=0,
            stop_ids=frozenset(),
            pruner=self.pruner,
            track_memory=False,
            compiled=self.compiled,
        )
        for _ in generation:
            pass
        return torch.tensor(generation.token_ids)


class Transformers(Peer):
    """transformers' own model over the very same tensors.

    Args:
        mode: "eager" with its growing cache, "static" with its static one, or "compiled": static
            and with the decoding step compiled.
    """

    def __init__(self, model: LlamaVisionModel, mode: str):
        from transformers import MllamaConfig, MllamaForConditionalGeneration

        self.config, self.mode, self.device = model.config, mode, model.device
        data = MllamaConfig(**model.config.to_dict())
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
        if run.image is not None:
            shape = (batch, 1, vision.max_num_tiles, *run.image.pixels.shape[1:])
            pixels = torch.zeros(shape)
            pixels[:, 0, : run.tiles] = run.image.pixels
            real = torch.arange(vision.max_num_tiles, device=self.device) < run.tiles
            sees = (
                torch.tensor(run.token_ids, device=self.device) == self.config.text.image_token_id
            )
            sees = sees.cumsum(0) > 0
            self.pictures = {
                "pixel_values": pixels.to(self.device, self.peer.dtype),
                "aspect_ratio_ids": torch.full((batch, 1), run.image.aspect_id, device=self.device),
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
    def generate(self, new_tokens: int, stop_ids: list[int] | None = None) -> Tensor:
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
            **how,
        )
        return out[:, self.inputs["input_ids"].shape[1] :]


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
