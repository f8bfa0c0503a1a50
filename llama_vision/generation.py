"""The face that people use: a loaded checkpoint that answers."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_vision.chat import Prompt, PromptError, chat_prompt
from llama_vision.checkpoint import choose_device, choose_dtype, find_checkpoint, load_model
from llama_vision.config import Config, SettingError
from llama_vision.decoding import Completion, Generation
from llama_vision.image import TiledImage, tile_image
from llama_vision.model import LlamaVisionModel
from llama_vision.sampling import Sampling
from llama_vision.tokenizer import Tokenizer, TokenizerError, load_tokenizer

Messages = Sequence[Mapping[str, Any]]


class LlamaVision:
    """A loaded checkpoint. Make one with `from_pretrained`."""

    def __init__(
        self,
        model: LlamaVisionModel,
        tokenizer: Tokenizer | None = None,
        *,
        sampling: Sampling | None = None,
        stop_ids: Sequence[int] | None = None,
    ):
        self.model = model
        self.config = model.config
        self.tokenizer = tokenizer
        self.sampling = sampling or Sampling()
        self.stop_ids = frozenset(self.config.text.eos_token_ids if stop_ids is None else stop_ids)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, device: str = "auto", dtype: str | torch.dtype = "auto"
    ) -> "LlamaVision":
        """Load a checkpoint in the official layout.

        Args:
            source: a directory, or a repository id (looked for in the local cache first).
            device: "auto" (CUDA, then MPS, then CPU) or a torch device.
            dtype: "auto" (the checkpoint's own), "bfloat16", "float16" or "float32".

        Raises:
            LlamaVisionError: of the kind that fits: where it is not found, not complete, not
                consistent, or the device is not there.
        """
        chosen = choose_device(device)
        directory = find_checkpoint(source)
        config = Config.from_directory(directory)
        tokenizer = load_tokenizer(directory, config.text)
        sampling, stop_ids = _generation_defaults(directory)
        model = load_model(
            directory, config, device=chosen, dtype=choose_dtype(dtype, config.dtype)
        )
        return cls(model, tokenizer, sampling=sampling, stop_ids=stop_ids)

    @torch.inference_mode()
    def logits(self, prompt: Prompt, *, max_tiles: int | None = None) -> Tensor:
        """The prompt's own logits: [S, vocabulary], float32."""
        self.check(prompt)
        token_ids = torch.tensor([list(prompt.token_ids)], device=self.model.device)
        visual = self.model.encode_images([self.tile(prompt, max_tiles)])
        return self.model(token_ids, visual)[0]

    def generate(
        self, prompts: Prompt | Sequence[Prompt], **settings: Any
    ) -> Completion | list[Completion]:
        """Go on from one prompt, or from several in one batch; each as if it were alone.

        Args:
            prompts: a `Prompt` or a list of them.
            settings: see `Generation`.

        Returns:
            A `Completion`, or a list of them in the same order.
        """
        alone = isinstance(prompts, Prompt)
        generation = Generation(self, [prompts] if alone else prompts, **settings)
        for _ in generation:
            pass
        completions = generation.completions()
        return completions[0] if alone else completions

    def stream(self, prompt: Prompt | Messages, **settings: Any) -> Iterator[str]:
        """Yield the answer's text in pieces of whole characters, as they are made.

        Args:
            prompt: a `Prompt`, or messages for `chat_prompt`.
            settings: see `Generation`.
        """
        if not isinstance(prompt, Prompt):
            prompt = self.prompt(prompt)
        yield from Generation(self, [prompt], **settings).text_pieces()

    def prompt(self, messages: Messages) -> Prompt:
        """The prompt that asks for the next turn of a conversation."""
        return chat_prompt(messages, self.need_tokenizer())

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            TokenizerError: the checkpoint came without one.
        """
        if self.tokenizer is None:
            raise TokenizerError(
                "this checkpoint has no tokenizer.model or tokenizer.json, and text needs one; "
                "put the file beside config.json, or pass a Prompt of token ids"
            )
        return self.tokenizer

    def tile(self, prompt: Prompt, max_tiles: int | None = None) -> list[TiledImage]:
        """Cut a prompt's images into tiles, of at most `max_tiles` or what the model allows."""
        vision = self.config.vision
        most = vision.max_num_tiles if max_tiles is None else max_tiles
        if not 1 <= most <= vision.max_num_tiles:
            raise SettingError(
                f"max_tiles is {most}; expected 1 to {vision.max_num_tiles} for this model"
            )
        return [
            tile_image(image, tile_size=vision.image_size, max_tiles=most)
            for image in prompt.images
        ]

    def check(self, prompt: Prompt) -> None:
        """Raise PromptError for what the model cannot read."""
        ids = list(prompt.token_ids)
        image_id = self.config.text.image_token_id
        if not ids:
            raise PromptError("the prompt is empty; expected at least one token id")
        strange = [token for token in ids if not 0 <= token <= image_id]
        if strange:
            raise PromptError(
                f"token id {strange[0]} is out of range; expected 0 to {image_id} (<|image|>)"
            )
        places = ids.count(image_id)
        if places != len(prompt.images):
            raise PromptError(
                f"the prompt has {places} <|image|> ids (id {image_id}) and {len(prompt.images)} "
                "images; expected as many"
            )


def _generation_defaults(directory: Path) -> tuple[Sampling, list[int] | None]:
    """What generation_config.json asks for; without one greedy, and the model's stop ids."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return Sampling(), None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        stop = data.get("eos_token_id")
        sampling = Sampling()
        if data.get("do_sample"):
            sampling = Sampling(
                float(data.get("temperature", 1.0)),
                float(data.get("top_p", 1.0)),
                int(data.get("top_k") or 0),
            )
    except (ValueError, TypeError, AttributeError) as error:
        raise SettingError(f"{path} cannot be read: {error!r}; correct or remove it") from None
    if stop is not None and not isinstance(stop, list):
        stop = [stop]
    return sampling, stop
