"""What a run holds: room for what decoding reads, and not a byte more while it decodes."""

from dataclasses import replace

import pytest
import torch
from conftest import (
    CASES,
    Conversation,
    cache_tensors,
    case_images,
    case_inputs,
    case_prompts,
    live_bytes,
    new_cache,
)
from oracle import random_model, visible_images

from llama_vision import TrimmedLlama
from llama_vision.cache.kv import Cache
from llama_vision.engine.decode import Decoder

GREEDY = {"temperature": 0, "ignore_stop": True}
PRUNERS = pytest.mark.parametrize("pruner", [None, TrimmedLlama(0.1)], ids=["whole", "pruned"])


@PRUNERS
@pytest.mark.parametrize("case", CASES)
def test_a_run_allocates_room_for_what_decoding_reads(tiny, case, pruner):
    """The real tiles of the images that the last row sees; what the plan says, to the byte.

    What a pruner leaves without a budget is not known before; afterwards it is just that.
    """
    prompts, held = case_prompts(case), 0
    engine, requests = tiny.start(prompts, max_new_tokens=5, pruner=pruner, **GREEDY)
    allocated = engine.cache.visual.nbytes
    engine.run(*requests)
    for prompt, request, images in zip(prompts, requests, case_images(case), strict=True):
        seen = visible_images(list(prompt.token_ids), tiny.config.text.image_token_id)[-1]
        kept = sum(int(request.kept[image].sum()) for image in seen)
        tokens = sum(17 * len(images[image].pixels) for image in seen)
        assert kept == tokens if pruner is None or not seen else 0 < kept < tokens
        held = max(held, kept)
    plan = Cache.plan(
        tiny.config.text,
        slots=len(prompts),
        max_text_tokens=max(len(prompt.token_ids) for prompt in prompts) + 5,
        visual_capacity=held,
        dtype=torch.float32,
    )
    assert (engine.cache.text.nbytes, engine.cache.visual.nbytes) == (plan.text, plan.visual)
    assert engine.cache.nbytes == sum(tensor.nbytes for tensor in cache_tensors(engine.cache))
    assert allocated == (plan.visual if pruner is None else 0)


@PRUNERS
def test_the_storage_stays_where_it_is(tiny, pruner):
    """From the first prefill to the last step, and on through the next prompts."""
    prompts = case_prompts("batch_ragged")
    settings = {"max_new_tokens": 60, "pruner": pruner, "visual_budget": 1.0, **GREEDY}
    engine, requests = tiny.start(prompts, **settings)
    pointers = [tensor.data_ptr() for tensor in cache_tensors(engine.cache)]
    nbytes = engine.cache.nbytes
    requests += [engine.submit(prompt, **settings) for prompt in case_prompts("bos_image")]
    while any(request.finish_reason is None for request in requests):
        engine.step()
        assert [tensor.data_ptr() for tensor in cache_tensors(engine.cache)] == pointers
    assert engine.cache.nbytes == nbytes
    assert [len(request.token_ids) for request in requests] == [60, 60, 60]


@PRUNERS
def test_decoding_keeps_no_memory(tiny, pruner):
    """From step 20 to step 100 all that is allocated is freed, and it is never much."""
    text = replace(tiny.config.text, num_hidden_layers=4, cross_attention_layers=(1, 3))
    model = random_model(replace(tiny.config, text=text), 0)
    cache = new_cache(model, 2, text=256)
    for slot, (ids, images) in enumerate(case_inputs("batch_ragged")):
        Conversation(model, cache, slot).go_on(ids, images, pruner=pruner)
    rows, decoder, tokens = list(cache.text.lengths), Decoder(model, cache), {0: 1, 1: 2}

    def decode(steps):
        for _ in range(steps):
            logits = decoder.step(tokens)
            tokens.update(enumerate(logits.argmax(-1).tolist()))

    decode(20)
    live = live_bytes(lambda: decode(80))
    assert cache.text.lengths == [length + 100 for length in rows]
    assert len(live) > 80, "the profiler saw nothing"
    assert live[-1] == 0
    assert max(live) < cache.text.keys[0].nbytes
