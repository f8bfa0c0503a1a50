"""One batch being generated: prefill, decode, sample, and what came of it."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from llama_vision.cache import Cache
from llama_vision.chat import Prompt, PromptError
from llama_vision.config import SettingError
from llama_vision.sampling import Sampling
from llama_vision.tokenizer import TextStream
from llama_vision.visual import VisualTokens, find_stretches

if TYPE_CHECKING:
    from llama_vision.generation import LlamaVision


class VisualCounts(NamedTuple):
    """Visual tokens of one sample."""

    encoded: int
    """What the vision encoder computed: always `max_num_tiles` tiles an image."""
    valid: int
    """Those of real tiles."""
    kept: int
    """Those that the cross-attention blocks after the first, and decoding, could read."""


@dataclass(frozen=True)
class Completion:
    """What the model made of one prompt."""

    token_ids: list[int]
    """Generated ids, a final stop token included."""
    logprobs: list[float]
    """Natural log of each id's probability under the model itself (temperature 1), float32."""
    text: str
    """Without special tokens; empty where the checkpoint has no tokenizer."""
    finish_reason: Literal["stop", "length", "interrupted"]
    visual_tokens: VisualCounts
    kept: list[Tensor]
    """For each image a bool tensor [tiles, P]; class token first, then patches row by row."""


class Generation:
    """One batch of prompts being continued. Iterate over it; then ask for `completions()`.

    Every step gives the new token id of each sample, None once that sample has finished.

    Args:
        max_new_tokens: most tokens to make for each prompt.
        temperature, top_p, top_k: None for the checkpoint's own; temperature 0 is greedy.
        seed: of the random draws, the same for every sample; None for a new one each time.
        ignore_stop: go on past stop tokens.
        max_seq_len: most tokens of prompt and answer together; None for what the model allows.
        max_tiles: most tiles an image is cut into; None for what the model allows.

    Raises:
        LlamaVisionError: a setting is out of range, or a prompt is too long or inconsistent.
    """

    def __init__(
        self,
        owner: "LlamaVision",
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 256,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        ignore_stop: bool = False,
        max_seq_len: int | None = None,
        max_tiles: int | None = None,
    ):
        self.owner, self.model = owner, owner.model
        self.prompts = list(prompts)
        if not self.prompts:
            raise PromptError("no prompt was given; expected at least one")
        for prompt in self.prompts:
            owner.check(prompt)
        self.limits = self._limits(max_new_tokens, max_seq_len)
        self.sampling = Sampling(
            *(
                default if given is None else given
                for given, default in (
                    (temperature, owner.sampling.temperature),
                    (top_p, owner.sampling.top_p),
                    (top_k, owner.sampling.top_k),
                )
            )
        )
        seed = torch.seed() if seed is None else seed
        self.generators = [torch.Generator().manual_seed(seed) for _ in self.prompts]
        self.stop_ids = frozenset() if ignore_stop else owner.stop_ids
        self.images = [owner.tile(prompt, max_tiles) for prompt in self.prompts]
        self.cache = Cache(
            owner.config.text,
            batch=len(self.prompts),
            max_text_tokens=max(self.limits),
            visual_capacity=max(map(self._visual_need, range(len(self.prompts)))),
            dtype=self.model.dtype,
            device=self.model.device,
        )
        self.token_ids: list[list[int]] = [[] for _ in self.prompts]
        self.logprobs: list[list[float]] = [[] for _ in self.prompts]
        self.finish_reasons: list[str | None] = [None] * len(self.prompts)
        self.seconds = {"vision": 0.0, "prefill": 0.0, "decode": 0.0}

    def __iter__(self) -> Iterator[list[int | None]]:
        """Prefill, then decode until every sample has finished."""
        logits = self._prefill()
        while True:
            with _Stopwatch(self.seconds, "decode", self.model.device):
                new = self._choose(logits)
            yield new
            if all(self.finish_reasons):
                return
            with _Stopwatch(self.seconds, "decode", self.model.device):
                logits = self._decode(new)

    def text_pieces(self) -> Iterator[str]:
        """The text of the only sample, in pieces of whole characters."""
        stream = TextStream(self.owner.need_tokenizer())
        for (token,) in self:
            if token not in self.stop_ids:
                yield stream.add(token)
        yield stream.end()

    def completions(self) -> list[Completion]:
        """What has been made so far, one for each prompt."""
        return [self._completion(sample) for sample in range(len(self.prompts))]

    @torch.inference_mode()
    def _prefill(self) -> Tensor:
        """Encode the images, run the prompts: logits [B, vocabulary] of their last rows."""
        device = self.model.device
        with _Stopwatch(self.seconds, "vision", device):
            visual = self.model.encode_images(self.images)
        with _Stopwatch(self.seconds, "prefill", device):
            return self._run_prompts(visual)

    def _run_prompts(self, visual: VisualTokens | None) -> Tensor:
        lengths = [len(prompt.token_ids) for prompt in self.prompts]
        token_ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
        for sample, prompt in enumerate(self.prompts):
            token_ids[sample, : lengths[sample]] = torch.tensor(list(prompt.token_ids))
        return self.model(
            token_ids.to(self.model.device),
            visual,
            lengths=lengths,
            cache=self.cache,
            last_row_only=True,
        )

    @torch.inference_mode()
    def _decode(self, new: list[int | None]) -> Tensor:
        """One more row for each sample that has not finished: logits [B, vocabulary]."""
        rows = torch.tensor([[token or 0] for token in new], device=self.model.device)
        lengths = [0 if reason else 1 for reason in self.finish_reasons]
        return self.model(rows, lengths=lengths, cache=self.cache, last_row_only=True)

    @torch.inference_mode()
    def _choose(self, logits: Tensor) -> list[int | None]:
        """Draw each sample's next token and note it; None for those that had finished."""
        chosen = self.sampling.choose(logits, self.generators)
        logprobs = logits.log_softmax(dim=-1).gather(-1, chosen[:, None]).squeeze(-1)
        step: list[int | None] = []
        for sample, (token, logprob) in enumerate(
            zip(chosen.tolist(), logprobs.tolist(), strict=True)
        ):
            if self.finish_reasons[sample]:
                step.append(None)
                continue
            step.append(token)
            self.token_ids[sample].append(token)
            self.logprobs[sample].append(logprob)
            length = len(self.prompts[sample].token_ids) + len(self.token_ids[sample])
            if token in self.stop_ids:
                self.finish_reasons[sample] = "stop"
            elif length == self.limits[sample]:
                self.finish_reasons[sample] = "length"
        return step

    def _limits(self, max_new_tokens: int, max_seq_len: int | None) -> list[int]:
        """Most tokens, prompt and answer together, of each sample."""
        if max_new_tokens < 1:
            raise SettingError(f"max_new_tokens is {max_new_tokens}; expected 1 or more")
        allowed = self.owner.config.text.max_position_embeddings
        most = allowed if max_seq_len is None else max_seq_len
        if not 1 <= most <= allowed:
            raise SettingError(f"max_seq_len is {most}; expected 1 to {allowed} for this model")
        longest = max(len(prompt.token_ids) for prompt in self.prompts)
        if longest >= most:
            raise PromptError(
                f"the prompt is {longest} tokens long and --max-seq-len (max_seq_len) is {most}; "
                f"expected at least {longest + 1}, to leave room for an answer"
            )
        return [min(len(prompt.token_ids) + max_new_tokens, most) for prompt in self.prompts]

    def _visual_need(self, sample: int) -> int:
        """Visual tokens that decoding reads: those that the prompt's last row sees."""
        image_id = self.owner.config.text.image_token_id
        stretches = find_stretches(self.prompts[sample].token_ids, image_id)
        seen = self.images[sample][stretches[-1].images] if stretches else []
        return sum(len(image.pixels) for image in seen) * self.owner.config.vision.tokens_per_tile

    def _completion(self, sample: int) -> Completion:
        tokenizer = self.owner.tokenizer
        spoken = [token for token in self.token_ids[sample] if token not in self.stop_ids]
        vision = self.owner.config.vision
        kept = [
            torch.ones(len(image.pixels), vision.tokens_per_tile, dtype=torch.bool)
            for image in self.images[sample]
        ]
        valid = sum(mask.numel() for mask in kept)
        slots = vision.max_num_tiles * vision.tokens_per_tile
        return Completion(
            token_ids=list(self.token_ids[sample]),
            logprobs=list(self.logprobs[sample]),
            text=tokenizer.decode(spoken) if tokenizer else "",
            finish_reason=self.finish_reasons[sample] or "interrupted",
            visual_tokens=VisualCounts(len(kept) * slots, valid, valid),
            kept=kept,
        )


class _Stopwatch:
    """Adds the seconds spent inside to one entry, waiting for the device at both ends."""

    def __init__(self, seconds: dict[str, float], name: str, device: torch.device):
        self.seconds, self.name, self.device = seconds, name, device

    def __enter__(self) -> None:
        self._wait()
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._wait()
        self.seconds[self.name] += time.perf_counter() - self.start

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()
