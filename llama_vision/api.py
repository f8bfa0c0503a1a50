"""The face that people use: a loaded checkpoint that answers."""

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_vision.cache.pruning import Pruner, PruningError
from llama_vision.checkpoint.loading import choose_device, choose_dtype, find_checkpoint, load_model
from llama_vision.config import Config, SettingError
from llama_vision.engine.decode import check_compiler
from llama_vision.engine.engine import Completion, Generation
from llama_vision.engine.sampling import Sampling
from llama_vision.inputs.chat import Prompt, PromptError, chat_prompt
from llama_vision.inputs.image import TiledImage, choose_grid, tile_image
from llama_vision.inputs.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from llama_vision.memory.fit import check_before_download, check_run_fits, check_weights_fit
from llama_vision.memory.plan import (
    PREFILL_CHUNK,
    MemoryPlan,
    Workload,
    budget_in_tokens,
    plan_run,
    visual_counts,
    visual_needs,
)
from llama_vision.model.model import LlamaVisionModel, model_without_weights

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
        self.device = model.device
        self.directory: Path | None = None
        self.config = model.config
        self.tokenizer = tokenizer
        self.sampling = sampling or Sampling()
        self.stop_ids = frozenset(self.config.text.eos_token_ids if stop_ids is None else stop_ids)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        force: bool = False,
    ) -> "LlamaVision":
        """Load a checkpoint in the official layout.

        Args:
            source: a directory, or a repository id (looked for in the local cache first).
            device: "auto" (CUDA, then MPS, then CPU) or a torch device.
            dtype: "auto" (the checkpoint's own), "bfloat16", "float16" or "float32".
            force: load the weights even where they seem not to fit.

        Raises:
            LlamaVisionError: of the kind that fits: where it is not found, not complete, not
                consistent, or the device is not there or too small.
        """
        if not force:
            check_before_download(source, dtype, device)
        checkpoint = cls.without_weights(source, device=device, dtype=dtype)
        checkpoint.load_weights(force=force)
        return checkpoint

    @classmethod
    def without_weights(
        cls, source: str | Path, *, device: str = "auto", dtype: str | torch.dtype = "auto"
    ) -> "LlamaVision":
        """All of a checkpoint but its weights: it can make prompts and plans, and not answer.

        For the arguments see `from_pretrained`.
        """
        chosen = choose_device(device)
        directory = find_checkpoint(source)
        config = Config.from_directory(directory)
        tokenizer = load_tokenizer(directory, config.text)
        sampling, stop_ids = _generation_defaults(directory)
        model = model_without_weights(config).to(choose_dtype(dtype, config.dtype))
        outline = cls(model, tokenizer, sampling=sampling, stop_ids=stop_ids)
        outline.directory, outline.device = directory, chosen
        return outline

    def load_weights(self, *, force: bool = False) -> None:
        """Fill a model made `without_weights`; for `force` and the errors see `from_pretrained`."""
        dtype = self.model.dtype
        if not force:
            check_weights_fit(self.config, dtype, self.device)
        self.model = load_model(self.directory, self.config, device=self.device, dtype=dtype)

    @torch.inference_mode()
    def logits(
        self,
        prompt: Prompt,
        *,
        pruner: Pruner | None = None,
        visual_budget: float | int | None = None,
        max_tiles: int | None = None,
    ) -> Tensor:
        """The prompt's own logits: [S, vocabulary], float32. For the settings see `start`."""
        self.check(prompt)
        self._need_weights()
        images = [self.tile(prompt, max_tiles)]
        budget = self._budget([prompt.token_ids], grids_of(images), visual_budget, pruner)
        visual = self.model.encode_images(images)
        if visual is not None:
            visual.budget = budget
        return self.model(torch.tensor([list(prompt.token_ids)]), visual, pruner=pruner)[0]

    def generate(
        self, prompts: Prompt | Sequence[Prompt], **settings: Any
    ) -> Completion | list[Completion]:
        """Go on from one prompt, or from several in one batch; each as if it were alone.

        Args:
            prompts: a `Prompt` or a list of them.
            settings: see `start`.

        Returns:
            A `Completion`, or a list of them in the same order.
        """
        alone = isinstance(prompts, Prompt)
        generation = self.start([prompts] if alone else prompts, **settings)
        for _ in generation:
            pass
        completions = generation.completions()
        return completions[0] if alone else completions

    def stream(self, prompt: Prompt | Messages, **settings: Any) -> Iterator[str]:
        """Yield the answer's text in pieces of whole characters, as they are made.

        Args:
            prompt: a `Prompt`, or messages for `chat_prompt`.
            settings: see `start`.
        """
        self.need_tokenizer()
        if not isinstance(prompt, Prompt):
            prompt = self.prompt(prompt)
        yield from self.start([prompt], **settings).text_pieces()

    def start(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 256,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        pruner: Pruner | None = None,
        visual_budget: float | int | None = None,
        ignore_stop: bool = False,
        max_seq_len: int | None = None,
        max_tiles: int | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        compiled: bool = False,
        track_memory: bool = False,
        force: bool = False,
    ) -> Generation:
        """Check the settings, allocate the cache, and return the run, to be iterated over.

        Args:
            max_new_tokens: most tokens to make for each prompt.
            temperature, top_p, top_k: None for the checkpoint's own; temperature 0 is greedy.
            seed: of the random draws, the same for every sample; None for a new one each time.
            pruner: chooses which visual tokens to keep, see `cache.pruning`; None keeps all.
            visual_budget: most visual tokens of each sample to keep, as a count or (a float) as a
                fraction of them; the cache is allocated for exactly that.
            ignore_stop: go on past stop tokens.
            max_seq_len: most tokens of prompt and answer together; None for what the model allows.
            max_tiles: most tiles an image is cut into; None for what the model allows.
            prefill_chunk: most prompt tokens, of all samples together, that go through a block at
                once. It changes no answer, only what memory long prompts need.
            compiled: compile the steps of decoding, for which the first run waits; on CUDA they are
                captured as graphs too.
            track_memory: note the peaks of memory in the run's `ledger`; on the CPU that costs
                some time.
            force: run even where memory seems not to suffice.

        Raises:
            LlamaVisionError: a setting is out of range, a prompt is too long or inconsistent, or
                the run would not fit into memory.
        """
        self._need_weights()
        prompts = self._check_all(prompts)
        limits = self._limits(prompts, max_new_tokens, max_seq_len)
        images = [self.tile(prompt, max_tiles) for prompt in prompts]
        workload = self._workload(
            prompts, grids_of(images), max(limits), pruner, visual_budget, prefill_chunk
        )
        if not force:
            self.check_fits(workload)
        if compiled:
            check_compiler(self.device.type)
        given = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        given = {name: value for name, value in given.items() if value is not None}
        return Generation(
            self.model,
            self.tokenizer,
            prompts,
            images,
            workload,
            limits=limits,
            sampling=replace(self.sampling, **given),
            seed=secrets.randbits(63) if seed is None else seed,
            stop_ids=frozenset() if ignore_stop else self.stop_ids,
            pruner=pruner,
            track_memory=track_memory,
            compiled=compiled,
        )

    def plan(self, prompts: Sequence[Prompt], **settings: Any) -> MemoryPlan:
        """The memory that `start` with these settings would take; nothing is allocated.

        For the settings see `workload`.
        """
        workload = self.workload(prompts, **settings)
        return plan_run(self.config, workload, dtype=self.model.dtype, device=self.device)

    def workload(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 256,
        pruner: Pruner | None = None,
        visual_budget: float | int | None = None,
        max_seq_len: int | None = None,
        max_tiles: int | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> Workload:
        """The sizes of the run that `start` would make of the same; no picture is cut up."""
        prompts = self._check_all(prompts)
        side, most = self.config.vision.image_size, self._most_tiles(max_tiles)
        return self._workload(
            prompts,
            [[choose_grid(image.size, side, most) for image in p.images] for p in prompts],
            max(self._limits(prompts, max_new_tokens, max_seq_len)),
            pruner,
            visual_budget,
            prefill_chunk,
        )

    def _workload(
        self,
        prompts: Sequence[Prompt],
        grids: Sequence[Sequence[tuple[int, int]]],
        max_text_tokens: int,
        pruner: Pruner | None,
        visual_budget: float | int | None,
        prefill_chunk: int,
    ) -> Workload:
        if prefill_chunk < 1:
            raise SettingError(f"prefill_chunk is {prefill_chunk}; expected 1 or more")
        token_ids = tuple(tuple(prompt.token_ids) for prompt in prompts)
        budget = self._budget(token_ids, grids, visual_budget, pruner)
        return Workload(
            token_ids,
            tuple(map(tuple, grids)),
            max_text_tokens,
            prefill_chunk,
            pruned=pruner is not None,
            budget=None if budget is None else tuple(budget),
            trim_first_layer=getattr(pruner, "trim_first_layer", True),
            absent_tiles_alike=self.model.vision.absent_tiles_alike,
        )

    def check_fits(self, workload: Workload) -> None:
        """Raise MemoryLimitError for a run, or for weights, that the device has no room for."""
        dtype, loaded = self.model.dtype, self.model.device.type != "meta"
        if not loaded:
            check_weights_fit(self.config, dtype, self.device)
        check_run_fits(self.config, workload, dtype=dtype, device=self.device, loaded=loaded)

    def _need_weights(self) -> None:
        if self.model.device.type == "meta":
            raise SettingError("this model has no weights and can only plan; use from_pretrained")

    def _check_all(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        if not prompts:
            raise PromptError("no prompt was given; expected at least one")
        for prompt in prompts:
            self.check(prompt)
        return list(prompts)

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
        vision, most = self.config.vision, self._most_tiles(max_tiles)
        return [
            tile_image(image, tile_size=vision.image_size, max_tiles=most)
            for image in prompt.images
        ]

    def _most_tiles(self, max_tiles: int | None) -> int:
        allowed = self.config.vision.max_num_tiles
        most = allowed if max_tiles is None else max_tiles
        if not 1 <= most <= allowed:
            raise SettingError(f"max_tiles is {most}; expected 1 to {allowed} for this model")
        return most

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

    def _limits(
        self, prompts: Sequence[Prompt], max_new_tokens: int, max_seq_len: int | None
    ) -> list[int]:
        """Most tokens, prompt and answer together, of each sample."""
        check_max_new_tokens(max_new_tokens)
        allowed = self.config.text.max_position_embeddings
        most = allowed if max_seq_len is None else max_seq_len
        if not 1 <= most <= allowed:
            raise SettingError(f"max_seq_len is {most}; expected 1 to {allowed} for this model")
        longest = max(len(prompt.token_ids) for prompt in prompts)
        if longest >= most:
            raise PromptError(
                f"the prompt is {longest} tokens long and --max-seq-len (max_seq_len) is {most}; "
                f"expected at least {longest + 1}, to leave room for an answer"
            )
        return [min(len(prompt.token_ids) + max_new_tokens, most) for prompt in prompts]

    def _budget(
        self,
        prompts: Sequence[Sequence[int]],
        grids: Sequence[Sequence[tuple[int, int]]],
        budget: float | int | None,
        pruner: Pruner | None,
    ) -> list[int] | None:
        """A visual budget in tokens of each sample; a fraction is of the tokens of its real tiles.

        Raises:
            PruningError: it is out of range, or less than is needed and no pruner would choose.
        """
        if budget is None:
            return None
        allowed = budget_in_tokens(budget, visual_counts(grids, self.config))
        needs = visual_needs(prompts, grids, self.config)
        for need, most in zip(needs, allowed, strict=True):
            if need > most and pruner is None:
                raise PruningError(
                    f"the images need {need} visual tokens and the visual budget is {most}; "
                    f"raise --visual-budget (visual_budget) to {need}, or choose a pruner, "
                    "such as --k-ratio 0.5 (pruner=TrimmedLlama(0.5))"
                )
        return allowed


def grids_of(images: Sequence[Sequence[TiledImage]]) -> list[list[tuple[int, int]]]:
    """Rows and columns of tiles of each image of each prompt."""
    return [[image.grid for image in sample] for sample in images]


def check_max_new_tokens(count: int) -> None:
    """Raise SettingError for a count below 1."""
    if count < 1:
        raise SettingError(f"max_new_tokens is {count}; expected 1 or more")


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
