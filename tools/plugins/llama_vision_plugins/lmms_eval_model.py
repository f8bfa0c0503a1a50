"""A chat model of lmms-eval.

python -m lmms_eval --model llama_vision_pytorch --tasks ai2d --batch_size 8 \
    --model_args pretrained=meta-llama/Llama-3.2-11B-Vision-Instruct,keep=0.5
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms

from llama_vision import LlamaVision, Prompt
from llama_vision_plugins.settings import PluginError, pictures_first, rule_of

MAX_NEW_TOKENS = 1024
"""Of an answer, where the task does not say."""


class LlamaVisionChat(lmms):
    """A checkpoint that answers lmms-eval's requests, one process and one device.

    Args:
        pretrained: see `LlamaVision.from_pretrained`, as `device` and `dtype`.
        batch_size: requests that are answered together.
        rule: see `rule_of`: k_ratio, keep, pruner, merge.

    Raises:
        LlamaVisionError: the checkpoint cannot be loaded, or a value is out of range.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "meta-llama/Llama-3.2-11B-Vision-Instruct",
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **rule: Any,
    ):
        super().__init__()
        self.pruner, self.batch_size = rule_of(**rule), int(batch_size)
        self.model = LlamaVision.from_pretrained(pretrained, device=device, dtype=dtype)

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers, in the order of the requests.

        Args:
            requests: with `args` (context, doc_to_messages, gen_kwargs, doc_id, task, split).

        Raises:
            LlamaVisionError: a message holds a video or sound, or an option cannot be had.
        """
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(repr(request.args[2]), []).append(place)
        results: dict[int, GenerationResult] = {}
        for places in groups.values():
            for start in range(0, len(places), self.batch_size):
                some = places[start : start + self.batch_size]
                made = self._generate([requests[place] for place in some])
                results |= zip(some, made, strict=True)
        return [results[place] for place in range(len(requests))]

    def _generate(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers to requests of the same gen_kwargs, together."""
        gen_kwargs = requests[0].args[2]
        docs = [self._doc(*request.args[3:]) for request in requests]
        messages = [request.args[1](doc) for request, doc in zip(requests, docs, strict=True)]
        prompts = [self.model.prompt(messages_of(one)) for one in messages]
        made = self.model.generate(prompts, pruner=self.pruner, **settings_of(gen_kwargs))
        results = []
        for request, prompt, answer in zip(requests, prompts, made, strict=True):
            counts = TokenCounts(len(prompt.token_ids), len(answer.token_ids))
            results.append(GenerationResult(answer.text, counts))
            asked = (request.args[0], gen_kwargs)
            self.cache_hook.add_partial("generate_until", asked, answer.text)
        return results

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """For each request the natural log of its continuation's probability, and whether it is
        what greedy decoding gives.

        Under a rule that reads the text the continuation's rows vote too.

        Args:
            requests: with `args` (context, continuation or a function of the document that gives
                it, doc_to_visual, doc_id, task, split).
        """
        return [self._loglikelihood(*request.args) for request in requests]

    def _loglikelihood(
        self, context: str, target: str | Callable, to_visual: Callable, *place: Any
    ) -> tuple[float, bool]:
        doc = self._doc(*place)
        pictures = [{"type": "image", "image": picture} for picture in to_visual(doc) or []]
        prompt = self.model.prompt([{"role": "user", "content": [*pictures, context]}])
        text = target if isinstance(target, str) else target(doc)
        ids = torch.tensor(self.model.need_tokenizer().encode(text))
        whole = Prompt([*prompt.token_ids, *ids[:-1].tolist()], prompt.images)
        logits = self.model.logits(whole, pruner=self.pruner)[-len(ids) :].cpu()
        chosen = logits.log_softmax(-1).gather(-1, ids[:, None])
        return float(chosen.sum()), bool((logits.argmax(-1) == ids).all())

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not there: tasks of several rounds."""
        raise NotImplementedError("llama-vision answers tasks of one round; leave this one out")

    def _doc(self, doc_id: Any, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]


def messages_of(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """lmms-eval's messages in a form that `LlamaVision.prompt` takes, pictures first."""
    return [{**message, "content": pictures_first(message["content"])} for message in messages]


def settings_of(gen_kwargs: dict[str, Any]) -> dict[str, Any]:
    """A request's settings; greedy where the task asks for nothing else.

    Raises:
        PluginError: beams are asked for.
    """
    if (gen_kwargs.get("num_beams") or 1) != 1:
        raise PluginError("num_beams is not 1; expected a task that decodes without beams")
    until = gen_kwargs.get("until") or []
    settings = {
        "max_new_tokens": gen_kwargs.get("max_new_tokens") or MAX_NEW_TOKENS,
        "stop": [until] if isinstance(until, str) else [text for text in until if text],
        "temperature": 0,
    }
    if gen_kwargs.get("do_sample") or gen_kwargs.get("temperature"):
        settings["temperature"] = gen_kwargs.get("temperature") or 1.0
        settings["top_p"] = gen_kwargs.get("top_p")
        settings["seed"] = gen_kwargs.get("seed", 0)
    return settings
