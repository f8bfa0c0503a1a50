"""The engine: prompts go in one at a time, and answers come out of all slots together.

A slot is one conversation's place in the cache. A `step` prefills the next request that waits into
a slot that is free, or else makes one more token for every slot; a slot whose answer has ended
takes the next request. A single answer, a batch, a stream and a conversation are the same engine.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llama_vision.cache.kv import Cache
from llama_vision.engine.capture import check_compiler
from llama_vision.engine.choose import LogitsError, choose_tokens
from llama_vision.engine.decode import Decoder
from llama_vision.engine.prefill import prefill
from llama_vision.engine.request import MODEL, Checkpoint, Completion, Request
from llama_vision.engine.settings import SETTINGS, Settings
from llama_vision.engine.shared_images import SharedImages
from llama_vision.engine.slots import EngineError, Slots
from llama_vision.engine.stopwatch import Counts, Stopwatch
from llama_vision.engine.workload import DEFAULT_SEQ_LEN, Workload, slot_capacity
from llama_vision.inputs.chat import PROMPT, Prompt, PromptError, check_prompt
from llama_vision.inputs.tokenizer import needed
from llama_vision.model import kernels
from llama_vision.values import Flag, check, check_flags


class Engine:
    """Answers requests on a loaded checkpoint.

    Args:
        model: a `LlamaVision`.
        slots: conversations that are held at once.
        max_seq_len: most tokens of each, prompts and answers together.
        visual_budget: most visual tokens of a group of images to keep, for which the cache is
            allocated: a count, or a fraction of the group's, in the cache of one image of all
            tiles; None to enlarge the cache to what is needed.
        workload: what it is made for, where that is known: its sizes go before the three above.
        compiled: compile decoding, for which the first steps wait.
        graphs: on CUDA, capture decoding as graphs.
        force: allocate even where memory seems not to suffice.

    Raises:
        LlamaVisionError: a number is out of range, or so many slots do not fit.
    """

    def __init__(
        self,
        model: Checkpoint,
        *,
        slots: int = 1,
        max_seq_len: int = DEFAULT_SEQ_LEN,
        visual_budget: float | int | None = None,
        workload: Workload | None = None,
        compiled: bool = False,
        graphs: bool = True,
        force: bool = False,
    ):
        check("model", model, MODEL, error=EngineError)
        check_flags(compiled=compiled, graphs=graphs, force=force)
        capacity = None
        if workload is None:
            capacity = slot_capacity(model.config, slots, max_seq_len, visual_budget)
            sizes = {"slots": slots, "max_text_tokens": max_seq_len, "visual_capacity": capacity}
            if not force:
                model.room.check_slots(slots, max_seq_len, capacity)
        else:
            sizes = workload.cache_sizes(model.config)
            sizes["visual_capacity"] = None if workload.open_ended else sizes["visual_capacity"]
        if compiled:
            check_compiler(model.model.device.type)
        if model.model.dtype == torch.float32:
            kernels.fastest()  # now, not in a run that is measured
        self.checkpoint, self.config, self.closed = model, model.config, False
        place = {"dtype": model.model.dtype, "device": model.model.device}
        self.cache = Cache(model.config.text, **sizes, **place)
        self.decoder = Decoder(model.model, self.cache, compiled=compiled, graphs=graphs)
        self.visual_budgets = (visual_budget, capacity)
        self.waiting: deque[Request] = deque()
        self.slots = Slots(self.cache, self.waiting, None if force else model)
        self.workload, self.counts = workload, Counts()
        self.images = SharedImages(model, self.waiting, self.counts)
        self.seconds = {"vision": 0.0, "prefill": 0.0, "decode": 0.0}
        self.ledger: Any = None  # a `memory.ledger.Ledger` that is to note the peaks of memory

    def __repr__(self) -> str:
        used, waiting = len(self.slots.held), len(self.waiting)
        words = f"{used} of {self.cache.slots} slots in use, {waiting} waiting"
        return f"<Engine: {'closed, ' * self.closed}{words}>"

    def submit(
        self,
        prompt: Prompt,
        settings: Settings | None = None,
        *,
        after: Request | None = None,
        hold: bool = False,
        **given: Any,
    ) -> Request:
        """Ask for an answer; it is made by `step`.

        Args:
            settings: of this request; `given` ones, by name, take their place.
            after: a request whose answer has ended and whose slot was held: the prompt goes on
                from there, and only its own rows are run.
            hold: keep the slot when the answer has ended, until `release`.

        Raises:
            LlamaVisionError: the engine is closed, or a setting or the prompt does not fit it.
        """
        if self.closed:
            raise EngineError("the engine is closed and takes no more requests; make a new one")
        settings = Settings() if settings is None else check("settings", settings, SETTINGS)
        request = Request(
            check("prompt", prompt, PROMPT, error=PromptError),
            settings.but(**given),
            self.checkpoint,
            rows_before=self.slots.rows_before(after),
            capacity=self.cache.text.capacity,
            after=after,
            hold=check("hold", hold, Flag()),
        )
        request.check_budgets(self.cache.visual, self.visual_budgets)
        self.slots.check_growth(request)
        self.waiting.append(request)
        return request

    def step(self) -> list[Request]:
        """Prefill the next request that can be; where none can, one more token for every slot.

        Returns:
            The requests that have one more token now.

        Raises:
            LlamaVisionError: a prompt could not be run, for what its pruner answered, or no slot is
                ever free for those that wait. Of the others nothing is lost; the slot of a prompt
                that fails is given back, and with it the conversation that it went on from.
        """
        entering = next(filter(self.slots.can_take, self.waiting), None)
        if entering is not None:
            self._enter(entering)
            return [entering]
        running = self.slots.running
        if running:
            with self._phase("decode"):
                logits = self.decoder.step({r.slot: r.token_ids[-1] for r in running})
                if len(logits) > len(running):
                    logits = logits[[r.slot for r in running]]
            self._note_tokens(running, logits)
        elif self.waiting:
            raise EngineError(
                f"all {self.cache.slots} slots are held by conversations and "
                f"{len(self.waiting)} requests wait; release one of them, or give the engine more"
            )
        return running

    def run(self, *requests: Request) -> list[Completion]:
        """Step until these have finished; their completions."""
        while any(request.finish_reason is None for request in requests):
            self.step()
        return [self.completion(request) for request in requests]

    def stream(self, request: Request) -> Iterator[str]:
        """Step until a request has finished, and yield its text in pieces of whole characters."""
        needed(self.checkpoint.tokenizer)
        shown = 0
        while True:
            text = request.answer.settled
            yield text[shown:]
            if request.finish_reason is not None:
                return
            shown = len(text)
            self.step()

    def completion(self, request: Request) -> Completion:
        """What has been made of a request so far."""
        return request.completion()

    def cancel(self, request: Request) -> None:
        """End a request where it is; its slot is free for the next one."""
        if request in self.waiting:
            self.waiting.remove(request)
            self.images.settle()
        if request.finish_reason is None:
            request.finish("interrupted")
            if not request.hold:
                self.slots.give_back(request)

    def release(self, request: Request) -> None:
        """Give back the slot of a conversation that was held; what waits to go on from it ends."""
        for other in [other for other in self.waiting if other.after is request]:
            self.cancel(other)
        self.cancel(request)
        self.slots.give_back(request)

    def undo(self, request: Request) -> Request | None:
        """Take back the latest request of a conversation that is held, as if it had never been.

        Returns:
            The one that it went on from, held again; None where it was the first: the slot is free.

        Raises:
            EngineError: it is not held, or has not finished.
            CacheError: its images took the place of others, which earlier rows saw: nothing has
                changed; submit the conversation again.
        """
        return self.slots.undo(request)

    def replace_answer(self, request: Request, token_ids: Sequence[int]) -> None:
        """Let a conversation that is held go on as if its last answer had been another one.

        Args:
            token_ids: that answer; what it begins with like the one that was made stays cached.

        Raises:
            EngineError, PromptError: the request is not held or has not finished; no such ids.
        """
        answer = Prompt(token_ids)
        if answer.token_ids:
            check_prompt(answer, self.config.text.image_token_id)
        self.slots.replace_answer(request, list(answer.token_ids))

    def close(self) -> None:
        """End all requests where they are, and take no more."""
        for request in (*self.waiting, *self.slots.held.values()):
            self.release(request)
        self.closed = True

    def _enter(self, request: Request) -> None:
        """Give a request its slot and prefill it; if that fails, nobody else is concerned."""
        self.waiting.remove(request)
        try:
            self.slots.take(request)
            self._prefill(request)
        except BaseException:
            request.finish("interrupted")
            self.slots.give_back(request)
            raise
        finally:
            self.images.settle()

    @torch.inference_mode()
    def _prefill(self, request: Request) -> None:
        """Cut the pictures into tiles, run the prompt, and choose the first token."""
        settings = request.settings
        budgets = (settings.visual_budget, *self.visual_budgets)
        logits, request.kept, request.stands = prefill(
            self.checkpoint.model,
            self.cache,
            request.slot,
            request.rows,
            encode=partial(self.images.group, request, budgets),
            pruner=settings.pruner,
            visual_budgets=budgets,
            first_group=request.after.groups if request.after else 0,
            chunk=settings.prefill_chunk,
            phase=self._phase,
        )
        self.counts.prefilled += len(request.rows)
        self._note_tokens([request], logits)

    def _note_tokens(self, requests: Sequence[Request], logits: Tensor) -> None:
        """Choose each request's next token, and see whether its answer has ended.

        Raises:
            LogitsError: of one of them, which ends there; the others go on.
        """
        with self._phase("decode", "sampling"):
            all_chosen = choose_tokens(requests, logits, self.checkpoint.model)
        for request, chosen in zip(requests, all_chosen, strict=True):
            if isinstance(chosen, LogitsError):
                self.cancel(request)
                continue
            self.counts.generated += 1
            request.note_token(chosen, rows=self.cache.text.lengths[request.slot])
            if request.finish_reason and not request.hold:
                self.slots.give_back(request)
        for chosen in all_chosen:
            if isinstance(chosen, LogitsError):
                raise chosen

    @contextmanager
    def _phase(self, seconds: str, memory: str | None = None) -> Iterator[None]:
        """Add what happens inside to one entry of `seconds`, and watch its memory."""
        untracked = self.decoder.compiled and (seconds, memory) == ("decode", None)
        # Compiled code makes no tensors that could be tracked, and would be compiled anew for that.
        watched = self.ledger is not None and not untracked
        with (
            Stopwatch(self.seconds, seconds, self.checkpoint.model.device),
            self.ledger.watch(memory or seconds) if watched else nullcontext(),
        ):
            yield
