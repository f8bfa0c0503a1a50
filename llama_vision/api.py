"""The face that people use: a loaded checkpoint that answers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_vision.cache.kv import Cache
from llama_vision.cache.pruning import Pruner
from llama_vision.chat.chat import Chat
from llama_vision.checkpoint.generation_json import read_generation_config
from llama_vision.checkpoint.loading import load_model
from llama_vision.checkpoint.outline import Outline, read_outline
from llama_vision.engine.choose import not_finite
from llama_vision.engine.engine import Engine
from llama_vision.engine.image_cache import ImageCache
from llama_vision.engine.prefill import prefill
from llama_vision.engine.request import Completion, Request
from llama_vision.engine.sampling import Sampling
from llama_vision.engine.settings import Settings
from llama_vision.engine.workload import Workload
from llama_vision.engine.workload_of import workload_of
from llama_vision.errors import SettingError
from llama_vision.inputs.chat import Prompt, chat_prompt
from llama_vision.inputs.guard import llama_guard_prompt
from llama_vision.inputs.image import TiledImage, tile_image
from llama_vision.inputs.prompts import Messages, is_alone, read_prompts
from llama_vision.inputs.tokenizer import Tokenizer, load_tokenizer, needed
from llama_vision.memory.fit import Room, check_before_download, check_weights_fit
from llama_vision.memory.ledger import Ledger
from llama_vision.memory.plan import MemoryPlan, plan_run
from llama_vision.memory.units import human_bytes
from llama_vision.model.model import LlamaVisionModel, model_without_weights
from llama_vision.quantization import Quantization
from llama_vision.values import Flag, check, check_flags


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
        self.device = model.device
        self.outline: Outline | None = None
        """Of the checkpoint that it is from."""
        self.config = model.config
        self.tokenizer = tokenizer
        self.image_cache: ImageCache | None = None
        """Set one to keep the features of pictures for later prompts about them."""
        self.sampling = sampling or Sampling()
        self.stop_ids = frozenset(self.config.text.eos_token_ids if stop_ids is None else stop_ids)
        if tokenizer is not None:  # a turn ends there, whatever the checkpoint's files leave out
            self.stop_ids |= {tokenizer.special_ids[name] for name in ("<|eot_id|>", "<|eom_id|>")}
        self.unsupported_settings: tuple[str, ...] = ()
        """What generation_config.json asks for beside that, by name: it is left out."""

    def __repr__(self) -> str:
        name = "" if self.outline is None else f" {self.outline.name}"
        size = human_bytes(sum(parameter.nbytes for parameter in self.model.parameters()))
        facts = f"{size}, {str(self.model.dtype).removeprefix('torch.')}, {self.device}"
        forms = self.config.quantization
        return f"<LlamaVision{name}: {facts}{f', {forms}' if forms else ''}>"

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        quantize: str | Quantization | None = None,
        adapter: str | Path | None = None,
        force: bool = False,
    ) -> "LlamaVision":
        """Load a checkpoint in the official layout.

        Args:
            source: a directory, or a repository id (looked for in the local cache first).
            device: "auto" (CUDA, then MPS, then CPU) or a torch device.
            dtype: "auto" (the checkpoint's own), "bfloat16", "float16" or "float32".
            quantize: keep the decoder's matrices as "int8" or "int4", or in detail, see
                `quantization.choose_quantization`; "none" makes floats of a quantised copy; None
                takes the weights as they are stored.
            adapter: a LoRA to merge, as peft saves it: a directory or a repository id.
            force: load the weights even where they seem not to fit.

        Raises:
            LlamaVisionError: of the kind that fits: where it is not found, not complete, not
                consistent, or the device is not there or too small.
        """
        if not check("force", force, Flag()):
            check_before_download(source, dtype, device, quantize)
        how = {"device": device, "dtype": dtype, "quantize": quantize, "adapter": adapter}
        checkpoint = cls.without_weights(source, **how)
        checkpoint.load_weights(force=force)
        return checkpoint

    @classmethod
    def without_weights(cls, source: str | Path, **how: Any) -> "LlamaVision":
        """All but its weights: it makes prompts and plans, not answers.

        Args:
            how: device, dtype, quantize and adapter as for `from_pretrained`; and `devices`, among
                how many it is divided, of which this process has the part of its rank.
        """
        outline = read_outline(source, **how)
        directory, config = outline.directory, outline.config
        tokenizer = load_tokenizer(directory, config.text)
        defaults = read_generation_config(directory)
        try:
            sampling = Sampling(**{f.name: getattr(defaults, f.name) for f in fields(Sampling)})
        except SettingError as error:
            raise SettingError(f"{directory}/generation_config.json: {error}") from None
        model = model_without_weights(config).to(outline.dtype)
        made = cls(model, tokenizer, sampling=sampling, stop_ids=defaults.stop_ids)
        made.outline, made.device = outline, outline.device
        made.unsupported_settings = defaults.unsupported
        return made

    def load_weights(self, *, force: bool = False) -> None:
        """Fill a model made `without_weights`; for `force` and the errors see `from_pretrained`."""
        dtype = self.model.dtype
        if not force:
            check_weights_fit(self.config, dtype, self.device)
        how = {"device": self.device, "dtype": dtype, "adapter": self.outline.adapter}
        self.model = load_model(self.outline.directory, self.config, **how)

    def logits(
        self,
        prompt: Prompt | Messages,
        *,
        pruner: Pruner | None = None,
        visual_budget: float | int | None = None,
        max_tiles: int | None = None,
    ) -> Tensor:
        """The prompt's own logits, which are finite: [S, vocabulary], float32; see `Settings`."""
        self._need_weights()
        (prompt,) = read_prompts([prompt], self.prompt)
        load = self.workload(
            [prompt],
            pruner=pruner,
            visual_budget=visual_budget,
            max_tiles=max_tiles,
            max_new_tokens=1,
        )
        sizes = load.cache_sizes(self.config)
        cache = Cache(self.config.text, dtype=self.model.dtype, device=self.device, **sizes)
        logits = prefill(
            self.model,
            cache,
            0,
            prompt.token_ids,
            self.tile(prompt, max_tiles),
            pruner=pruner,
            visual_budgets=[visual_budget],
            every_row=True,
        ).logits
        if not logits.isfinite().all():
            raise not_finite(self.model)
        return logits

    def generate(
        self, prompts: Prompt | Messages | Sequence[Prompt | Messages], **settings: Any
    ) -> Completion | list[Completion]:
        """Answer one prompt, or several together; each as if it were alone.

        Args:
            prompts: a `Prompt`, messages for `prompt`, or a list of such.
            settings: see `start`.

        Returns:
            A `Completion`, or for a list of prompts a list in the same order.
        """
        alone = is_alone(prompts)
        engine, requests = self.start([prompts] if alone else prompts, **settings)
        completions = engine.run(*requests)
        return completions[0] if alone else completions

    def stream(self, prompt: Prompt | Messages, **settings: Any) -> Iterator[str]:
        """Yield the answer's text in pieces of whole characters, as they are made.

        Args:
            prompt: a `Prompt`, or messages for `prompt`.
            settings: see `start`.
        """
        self.need_tokenizer()
        engine, (request,) = self.start([prompt], **settings)
        yield from engine.stream(request)

    def chat(self, **how: Any) -> Chat:
        """A conversation that keeps its place in a cache; `how`: see `Chat`."""
        self._need_weights()
        return Chat(self, **how)

    def start(
        self,
        prompts: Sequence[Prompt | Messages],
        *,
        seed: int | Sequence[int] | None = None,
        slots: int | None = None,
        compiled: bool = False,
        graphs: bool = True,
        track_memory: bool = False,
        force: bool = False,
        **settings: Any,
    ) -> tuple[Engine, list[Request]]:
        """Check the settings, allocate the cache, and hand the prompts to an engine of their size.

        Args:
            seed: one for each prompt, or one from which they count; see `Settings.of_samples`.
            slots: how many are answered at once; None for all of them, or as many as fit.
            compiled, graphs: see `Engine`.
            track_memory: note the peaks of memory in the engine's `ledger`, which takes some time.
            force: run even where memory seems not to suffice.
            settings: of every prompt, see `Settings`.

        Raises: LlamaVisionError for what is out of range, inconsistent, or does not fit.
        """
        self._need_weights()
        check_flags(track_memory=track_memory, force=force)
        prompts = read_prompts(prompts, self.prompt)
        of_each = Settings().but(**settings).of_samples(len(prompts), seed)
        load = self.workload(prompts, slots=slots, **settings)
        load = load if force else self.room.fitted(load, slots)
        engine = Engine(self, workload=load, compiled=compiled, graphs=graphs, force=True)
        if track_memory:
            engine.ledger = Ledger(self.device, *self.model.parameters(), *engine.cache.tensors)
        most = load.max_text_tokens
        pairs = zip(prompts, of_each, strict=True)
        return engine, [engine.submit(prompt, own, max_seq_len=most) for prompt, own in pairs]

    def plan(self, prompts: Sequence[Prompt | Messages], **settings: Any) -> MemoryPlan:
        """The memory that `start` with these settings would take; nothing is allocated."""
        workload = self.workload(prompts, **settings)
        return plan_run(self.config, workload, dtype=self.model.dtype, device=self.device)

    def workload(
        self,
        prompts: Sequence[Prompt | Messages],
        *,
        slots: int | None = None,
        seed: int | Sequence[int] | None = None,
        **settings: Any,
    ) -> Workload:
        """The sizes of the run that `start` would make of the same; no picture is cut up."""
        prompts = read_prompts(prompts, self.prompt)
        asked = Settings().but(**settings)
        asked.of_samples(len(prompts), seed)
        alike = self.model.vision.padding_tiles_alike
        return workload_of(prompts, asked, self.config, slots=slots, padding_tiles_alike=alike)

    @property
    def room(self) -> Room:
        """What the device has free, for workloads on this model."""
        loaded = self.model.device.type != "meta"
        return Room(self.config, self.model.dtype, self.device, loaded=loaded)

    def _need_weights(self) -> None:
        if self.model.device.type == "meta":
            raise SettingError("this model has no weights and can only plan; use from_pretrained")

    def prompt(self, messages: Messages) -> Prompt:
        """The prompt that asks for the next turn of a conversation."""
        return chat_prompt(messages, self.need_tokenizer())

    def llama_guard_prompt(
        self, messages: Messages, categories: Mapping[str, str] | None = None
    ) -> Prompt:
        """The prompt that asks Llama Guard 3 Vision about the last message; see `inputs.guard`."""
        return llama_guard_prompt(messages, self.need_tokenizer(), categories)

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer; raises TokenizerError where the checkpoint came without one."""
        return needed(self.tokenizer)

    def tile(self, prompt: Prompt, max_tiles: int | None = None) -> list[TiledImage]:
        """Cut a prompt's images into tiles, of at most `max_tiles` or what the model allows."""
        vision = self.config.vision
        most = Settings(max_tiles=max_tiles).limited("max_tiles", vision.max_num_tiles)
        return [
            tile_image(image, tile_size=vision.image_size, max_tiles=most)
            for image in prompt.images
        ]
