"""What leaves the cache without changing an answer, and what the cache does with its rows."""

import random
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import (
    CASES,
    Conversation,
    Keep,
    assert_close,
    case_images,
    case_prompts,
    live_bytes,
    new_cache,
)
from oracle import (
    MaskedOracle,
    random_config,
    random_images,
    random_model,
    visible_images,
)

from llama_vision import LastQuery, LlamaVisionError, TrimmedLlama
from llama_vision.cache.kv import Cache, CacheError

EXACT = 1e-5
GREEDY = {"temperature": 0, "ignore_stop": True}


def pointers(cache):
    return [tensor.data_ptr() for tensor in tensors(cache)]


def tensors(cache):
    stores = (cache.text, cache.visual)
    return [tensor for store in stores for tensor in (*store.keys, *store.values)]


# Prefill in chunks


PRUNERS = {
    "none": None,
    "all rows": TrimmedLlama(0.2),
    "after": TrimmedLlama(0.2, votes="after", trim_first_layer=False),
    "last": LastQuery(0.4),
}


@pytest.mark.parametrize("pruner", PRUNERS.values(), ids=PRUNERS)
@pytest.mark.parametrize("seed", range(6))
def test_prefill_in_chunks_changes_no_logit(seed, pruner):
    """Ragged batches of 3 over two turns, chunks of 1, 2 and 7 rows each; images anywhere."""
    config = random_config(seed)
    model = random_model(config, seed)
    runs = {}
    for size in (None, 1, 6, 21):
        draw = random.Random(seed)
        conversation = runs[size] = Conversation(model, 3)
        for _ in range(2):
            turn = conversation.random_turn(draw)
            conversation.go_on(*turn, pruner, prefill_chunk=size)
            conversation.go_on([[draw.randrange(config.text.vocab_size)]] * 3)
    whole = runs.pop(None)
    for size, run in runs.items():
        for number, (got, want) in enumerate(zip(run.samples, whole.samples, strict=True)):
            assert_close(
                f"chunks of {size}, sample {number}",
                torch.cat(got.logits),
                torch.cat(want.logits),
                EXACT,
            )
            assert all(map(torch.equal, got.kept, want.kept))


@pytest.mark.parametrize("pruner", PRUNERS.values(), ids=PRUNERS)
@pytest.mark.parametrize("seed", range(3))
def test_keys_projected_in_pieces_change_no_logit(seed, pruner, monkeypatch):
    config = random_config(seed)
    model = random_model(config, seed)
    answers = []
    for most in (8192, 5):
        monkeypatch.setattr("llama_vision.engine.prefill.TOKENS_AT_ONCE", most)
        draw, conversation = random.Random(seed), Conversation(model, 2)
        conversation.go_on(*conversation.random_turn(draw), pruner)
        conversation.go_on([[1], [2]])
        answers.append(torch.cat([row for said in conversation.samples for row in said.logits]))
    assert_close("pieces of 5", answers[1], answers[0], EXACT)


@pytest.mark.parametrize("k_ratio", [None, 0.25])
@pytest.mark.parametrize("case", CASES)
def test_answers_are_the_same_whatever_the_chunk(tiny, case, k_ratio):
    prompts = case_prompts(case)
    settings = {"max_new_tokens": 8, "pruner": k_ratio and TrimmedLlama(k_ratio), **GREEDY}
    whole, *others = (
        [completion.token_ids for completion in tiny.generate(prompts, prefill_chunk=n, **settings)]
        for n in (2048, 1, 7, 64)
    )
    assert others == [whole] * 3


def test_a_chunk_of_no_rows_is_an_error(tiny):
    with pytest.raises(LlamaVisionError, match="prefill_chunk is 0; expected 1 or more"):
        tiny.generate(case_prompts("image_first"), prefill_chunk=0)


# Trims that are always on


@pytest.mark.parametrize("seed", range(24))
def test_trimming_changes_no_logit(seed):
    """Ragged batches over several turns, against a model that masks what this one has dropped."""
    draw, config = random.Random(seed), random_config(seed)
    model = random_model(config, seed)
    conversation = Conversation(model, draw.randint(1, 3))
    for _ in range(draw.randint(2, 3)):
        conversation.go_on(*conversation.random_turn(draw))
        conversation.go_on([[draw.randrange(config.text.vocab_size)]] * len(conversation.samples))
    for number, said in enumerate(conversation.samples):
        expected = MaskedOracle(model).logits(said.token_ids, said.images, said.kept, said.passes)
        assert_close(f"sample {number}", torch.cat(said.logits), expected, EXACT)


def test_an_image_of_one_tile_holds_the_tokens_of_one(tiny):
    image = next(i for case in CASES for s in case_images(case) for i in s if len(i.pixels) == 1)
    conversation = Conversation(tiny.model, 1)
    conversation.go_on([[tiny.config.text.image_token_id, 1]], [[image]])
    assert conversation.cache.visual.lengths == [[17], [17]]
    assert tiny.config.vision.tokens_per_tile == 17


@pytest.mark.parametrize("case", CASES)
def test_a_run_allocates_room_for_what_decoding_reads(tiny, case):
    """The real tiles of the images that the last row sees; what the plan says, to the byte."""
    prompts = case_prompts(case)
    tiles = 0
    for prompt, images in zip(prompts, case_images(case), strict=True):
        seen = visible_images(prompt.token_ids, tiny.config.text.image_token_id)[-1]
        tiles = max(tiles, sum(len(images[image].pixels) for image in seen))
    cache = tiny.start(prompts, max_new_tokens=5, **GREEDY).cache
    plan = Cache.plan(
        tiny.config.text,
        batch=len(prompts),
        max_text_tokens=max(len(prompt.token_ids) for prompt in prompts) + 5,
        visual_capacity=tiles * 17,
        dtype=torch.float32,
    )
    assert cache.text.nbytes == plan.text
    assert cache.visual.nbytes == plan.visual
    assert cache.nbytes == plan.total == sum(tensor.nbytes for tensor in tensors(cache))


def test_a_new_group_of_images_takes_the_place_of_the_older_one(tiny):
    """Within a pass and in a later one; a text of its own changes nothing."""
    image_id, draw = tiny.config.text.image_token_id, random.Random(0)
    first, second, third = random_images(tiny.config, 3, draw)
    conversation = Conversation(tiny.model, 1)
    for token_ids, images, last in [
        ([image_id, 1, image_id, 2], [first, second], second),
        ([3, 4], [], second),
        ([5, image_id, 6], [third], third),
    ]:
        conversation.go_on([token_ids], [images])
        assert conversation.cache.visual.lengths == [[17 * len(last.pixels)]] * 2


def watch(module, see):
    """Call `see` whenever the module is about to run; returns what undoes it."""
    return module.register_forward_pre_hook(lambda *_: see()).remove


def features_before_modules(model, modules, pruner=None):
    """Whether the visual features are still in memory when each of the modules begins."""
    references, alive = [], []
    encode = model.encode_images

    def encode_and_watch(images):
        visual = encode(images)
        references.append(weakref.ref(visual.features))
        return visual

    undo = [watch(module, lambda: alive.append(references[0]() is not None)) for module in modules]
    model.encode_images = encode_and_watch
    try:
        image_id, draw = model.config.text.image_token_id, random.Random(0)
        images = random_images(model.config, 1, draw)
        Conversation(model, 1).go_on([[image_id, 1]], [images], pruner)
    finally:
        del model.encode_images
        for remove in undo:
            remove()
    return alive


def test_features_are_freed_once_the_last_block_has_its_keys_and_values(tiny):
    blocks = [tiny.model.text.layers[i] for i in tiny.config.text.cross_attention_layers]
    watched = [blocks[0].mlp, blocks[-1].cross_attn.v_proj, blocks[-1].cross_attn.o_proj]
    assert features_before_modules(tiny.model, watched) == [True, True, False]


def test_a_pruner_frees_the_features_of_all_tokens_before_the_second_block(tiny):
    blocks = [tiny.model.text.layers[i] for i in tiny.config.text.cross_attention_layers]
    watched = [blocks[0].mlp, blocks[1]]
    assert features_before_modules(tiny.model, watched, TrimmedLlama(0.1)) == [True, False]


# No growth


@pytest.mark.parametrize("pruner", [None, TrimmedLlama(0.1)], ids=["whole", "pruned"])
def test_the_storage_stays_where_it_is_while_decoding(tiny, pruner):
    run = tiny.start(case_prompts("batch_ragged"), max_new_tokens=201, pruner=pruner, **GREEDY)
    steps = iter(run)
    next(steps)
    cache = run.cache
    before, nbytes = pointers(cache), cache.nbytes
    for _ in range(200):
        next(steps)
        assert pointers(cache) == before
    assert cache.nbytes == nbytes
    assert [len(ids) for ids in run.token_ids] == [201, 201]


@pytest.mark.parametrize("pruner", [None, TrimmedLlama(0.1)], ids=["whole", "pruned"])
def test_decoding_keeps_no_memory(tiny, pruner):
    """From step 20 to step 200 all that is allocated is freed, and it is never much."""
    text = replace(tiny.config.text, num_hidden_layers=4, cross_attention_layers=(1, 3))
    model = random_model(replace(tiny.config, text=text), 0)
    conversation = Conversation(model, 2, text=256)
    token_ids = [list(prompt.token_ids) for prompt in case_prompts("batch_ragged")]
    conversation.go_on(token_ids, case_images("batch_ragged"), pruner)
    cache, tokens = conversation.cache, [[1], [2]]

    @torch.inference_mode()
    def decode(steps):
        for _ in range(steps):
            logits = model(torch.tensor(tokens), cache=cache, last_row_only=True)
            tokens[:] = logits.argmax(-1, keepdim=True).tolist()

    decode(20)
    live = live_bytes(lambda: decode(180))
    assert cache.position == [len(ids) + 200 for ids in token_ids]
    assert len(live) > 180, "the profiler saw nothing"
    assert live[-1] == 0
    assert max(live) < cache.text.keys[0].nbytes


# rewind


@pytest.mark.parametrize("pruner", [None, TrimmedLlama(0.2)], ids=["whole", "pruned"])
@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("batch")])
def test_rewinding_then_generating_again_gives_the_same_ids(tiny, case, pruner):
    (prompt,) = case_prompts(case)
    run = tiny.start([prompt], max_new_tokens=12, pruner=pruner, **GREEDY)
    for _ in run:
        pass
    (expected,), rows = run.token_ids, len(prompt.token_ids)
    for at in (0, 3, 9):
        run.cache.rewind(rows + at)
        again = [expected[at]]
        while len(again) < len(expected) - at:
            with torch.inference_mode():
                logits = tiny.model(torch.tensor([again[-1:]]), cache=run.cache)
            again.append(int(logits[0, -1].argmax()))
        assert again == expected[at:]


def test_rewinding_into_a_prompt_then_going_on_equals_a_fresh_run(tiny):
    """Each sample of a batch to a place of its own."""
    ids = [list(prompt.token_ids) for prompt in case_prompts("batch")]
    conversation = Conversation(tiny.model, 2)
    conversation.go_on(ids, case_images("batch"))
    conversation.go_on([[7], [8]])
    places = [max(i for i, token in enumerate(row) if token == 512) + 1 for row in ids]
    conversation.cache.rewind(places)
    assert conversation.cache.position == places
    conversation.go_on([row[at:] for row, at in zip(ids, places, strict=True)])
    for said, at in zip(conversation.samples, places, strict=True):
        assert_close("again", said.logits[2], said.logits[0][at:], EXACT)


@pytest.mark.parametrize("pruner", [None, TrimmedLlama(0.2)], ids=["whole", "pruned"])
def test_rows_are_blind_after_rewinding_to_before_the_first_image(tiny, pruner):
    (image,), image_id = case_images("bos_image")[0], tiny.config.text.image_token_id
    conversation = Conversation(tiny.model, 1)
    conversation.go_on([[1, 2, image_id, 3]], [[image]], pruner)
    conversation.cache.rewind(2)
    assert conversation.cache.visual.lengths == [[0], [0]]
    conversation.go_on([[4, 5]])
    blind = Conversation(tiny.model, 1)
    blind.go_on([[1, 2, 4, 5]])
    got, expected = conversation.samples[0].logits[1], blind.samples[0].logits[0]
    assert_close("blind", got, expected[2:], EXACT)


def test_an_image_can_follow_a_rewind_to_before_the_first_one(tiny):
    (image,), image_id = case_images("bos_image")[0], tiny.config.text.image_token_id
    (other, *_), *_ = case_images("image_first")
    conversation, fresh = Conversation(tiny.model, 1), Conversation(tiny.model, 1)
    conversation.go_on([[1, image_id, 3]], [[image]])
    conversation.cache.rewind(1)
    conversation.go_on([[6, image_id, 7]], [[other]])
    fresh.go_on([[1, 6, image_id, 7]], [[other]])
    got, expected = conversation.samples[0].logits[1], fresh.samples[0].logits[0]
    assert_close("new image", got, expected[1:], EXACT)
    conversation.cache.rewind(2)  # an error, if the first image's row were not forgotten
    assert conversation.cache.position == [2]


def two_groups(tiny):
    """A conversation whose images are in rows 1 and 4."""
    image_id = tiny.config.text.image_token_id
    images = random_images(tiny.config, 2, random.Random(0))
    conversation = Conversation(tiny.model, 1)
    conversation.go_on([[1, image_id, 2]], [images[:1]])
    conversation.go_on([[3, image_id, 4]], [images[1:]])
    return conversation.cache


@pytest.mark.parametrize("position", [2, 3, 4])
def test_rewinding_between_two_groups_of_images_is_an_error(tiny, position):
    cache = two_groups(tiny)
    says = rf"cannot rewind to {position}: a later image \(row 4\).*5 or more, or at most 1"
    with pytest.raises(CacheError, match=says):
        cache.rewind(position)
    assert cache.position == [6], "an error must change nothing"


@pytest.mark.parametrize("position", [0, 1, 5, 6])
def test_rewinding_outside_the_groups_is_possible(tiny, position):
    cache = two_groups(tiny)
    cache.rewind(position)
    assert cache.position == [position]
    assert (cache.visual.lengths[0] == [0]) == (position <= 1)


@pytest.mark.parametrize("position", [-1, 7, [7], [-2]], ids=str)
def test_rewinding_to_rows_that_are_not_there_is_an_error(tiny, position):
    number = position if isinstance(position, int) else position[0]
    with pytest.raises(CacheError, match=rf"cannot rewind to {number}; expected 0 to 6"):
        two_groups(tiny).rewind(position)


def test_a_rewind_needs_a_position_for_each_sample(tiny):
    with pytest.raises(CacheError, match=r"2 positions for 1 samples"):
        two_groups(tiny).rewind([1, 1])


# keep


def filled_store(seed, lengths, rows=40):
    """A cache of random rows of each sample, and how many samples and layers it has."""
    config = random_config(seed).text
    sizes = {"batch": len(lengths), "max_text_tokens": 1, "visual_capacity": rows}
    cache = Cache(config, dtype=torch.float32, **sizes)
    shape = (len(lengths), config.num_key_value_heads, max(lengths), config.head_dim)
    runs = [slice(0, length) for length in lengths]
    for layer in range(len(config.cross_attention_layers)):
        cache.visual.write(layer, torch.randn(shape), torch.randn(shape), runs)
    return cache


@pytest.mark.parametrize("seed", range(12))
def test_keeping_some_rows_equals_a_store_of_them_alone(seed):
    torch.manual_seed(seed)
    draw = random.Random(seed)
    lengths = [draw.randint(1, 40) for _ in range(draw.randint(1, 4))]
    cache = filled_store(seed, lengths)
    mask = torch.rand(len(lengths), max(lengths)) < draw.random()
    stores = [*cache.visual.keys, *cache.visual.values]
    expected = [
        [store[sample, :, :length][:, mask[sample, :length]].clone() for store in stores]
        for sample, length in enumerate(lengths)
    ]
    before = pointers(cache)
    cache.keep(mask)
    assert pointers(cache) == before
    for sample, rows in enumerate(expected):
        count = int(mask[sample, : lengths[sample]].sum())
        assert [held[sample] for held in cache.visual.lengths] == [count] * len(stores[::2])
        for store, fresh in zip(stores, rows, strict=True):
            assert torch.equal(store[sample, :, :count], fresh)


def test_what_is_kept_later_reads_as_if_it_had_been_pruned_so(tiny):
    """Keeping tokens of a whole cache equals masking them for all rows after."""
    prompts, images = case_prompts("batch_ragged"), case_images("batch_ragged")
    conversation = Conversation(tiny.model, 2)
    conversation.go_on([list(prompt.token_ids) for prompt in prompts], images)
    groups = [len(sample[-1].pixels) * 17 for sample in images]
    assert conversation.cache.visual.lengths[0] == groups
    mask = torch.arange(max(groups)).expand(2, -1) % 3 == 1
    conversation.cache.keep(mask)
    conversation.go_on([[5], [6]])
    for said, row, group in zip(conversation.samples, mask, groups, strict=True):
        kept = [torch.ones(len(i.pixels), 17, dtype=torch.bool) for i in said.images]
        kept[-1] = row[:group].view(-1, 17)
        oracle, passes = MaskedOracle(tiny.model), [len(said.token_ids) - 1, 1]
        after, _ = oracle.masks(said.token_ids, said.images, kept, passes)
        features = [oracle.project_slots(image).flatten(0, 1) for image in said.images]
        expected = oracle.run(said.token_ids, features, [after, after])
        assert_close("decoded", said.logits[1], expected[-1:], EXACT)


def test_keeping_takes_far_less_room_than_a_second_store():
    lengths = [512] * 4
    config = random_config(3).text
    cache = filled_store(3, lengths, rows=512)
    assert len(config.cross_attention_layers) > 1
    mask = torch.arange(512).expand(4, -1) % 4 != 1
    live = live_bytes(lambda: cache.keep(mask))
    assert cache.visual.lengths[0] == [384] * 4
    assert max(live) < cache.visual.nbytes / 8
    assert live[-1] == 0


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, 6, dtype=torch.bool),
        torch.ones(1, 7, dtype=torch.bool),
        torch.ones(2, 7, dtype=torch.uint8),
        torch.ones(2, 7),
    ],
    ids=["too short", "too few samples", "uint8", "float"],
)
def test_keep_needs_a_bool_for_each_row(mask):
    cache = filled_store(0, [7, 3])
    says = r"keep-mask is torch\.\w+ \[\d, \d\]; expected torch\.bool \[2, 7\]"
    with pytest.raises(CacheError, match=says):
        cache.keep(mask)
    assert cache.visual.lengths[0] == [7, 3]


def test_a_store_whose_first_layer_was_left_whole_cannot_be_trimmed_alike(tiny):
    (image,), image_id = case_images("bos_image")[0], tiny.config.text.image_token_id
    tokens = len(image.pixels) * 17
    mask = torch.arange(tokens)[None] < 5
    conversation = Conversation(tiny.model, 1)
    conversation.go_on([[image_id, 1]], [[image]], Keep(mask, trim_first_layer=False))
    assert conversation.cache.visual.lengths == [[tokens], [5]]
    with pytest.raises(CacheError, match="first cross-attention layer was left whole"):
        conversation.cache.keep(mask)


def test_the_cache_says_what_a_prefill_needs_when_it_does_not_fit(tiny):
    (image,), image_id = case_images("bos_image")[0], tiny.config.text.image_token_id
    conversation = Conversation(tiny.model, 1)
    conversation.cache = Cache(
        tiny.config.text,
        batch=1,
        max_text_tokens=9,
        visual_capacity=20,
        dtype=torch.float32,
    )
    with pytest.raises(CacheError, match=r"holds 20 tokens.*34 are needed.*--visual-budget"):
        conversation.go_on([[image_id, 1]], [[image]])
    conversation = Conversation(tiny.model, 1, images=1)
    conversation.go_on([[image_id, 1]], [[image]], Keep(torch.arange(34)[None] < 20))
    assert conversation.cache.visual.lengths == [[20], [20]]


def test_an_open_store_takes_exactly_what_the_pruner_left(tiny):
    """Without a budget its size is not known before; afterwards it is the kept tokens' own."""
    prompts = case_prompts("batch_ragged")
    run = tiny.start(prompts, max_new_tokens=3, pruner=TrimmedLlama(0.1), **GREEDY)
    for _ in run:
        pass
    group = [int(completion.kept[-1].sum()) for completion in run.completions()]
    assert run.cache.visual.capacities == [max(group)] * 2
    assert run.cache.visual.lengths == [group] * 2
    plan = Cache.plan(
        tiny.config.text,
        batch=2,
        max_text_tokens=run.cache.text.capacity,
        visual_capacity=max(group),
        dtype=torch.float32,
    )
    assert run.cache.nbytes == plan.total
    assert new_cache(tiny.model, 2).visual.nbytes > plan.visual


def test_an_open_store_follows_each_prefill_up_and_down(tiny):
    image_id = tiny.config.text.image_token_id
    images = sorted(random_images(tiny.config, 8, random.Random(0)), key=lambda i: len(i.pixels))
    conversation = Conversation(tiny.model, 1)
    conversation.cache = Cache(
        tiny.config.text, batch=1, max_text_tokens=9, visual_capacity=None, dtype=torch.float32
    )
    assert conversation.cache.visual.nbytes == 0
    for image in (images[0], images[-1], images[0]):
        conversation.go_on([[image_id, 1]], [[image]])
        assert conversation.cache.visual.capacities == [17 * len(image.pixels)] * 2
    assert len(images[0].pixels) < len(images[-1].pixels)
    (said,) = conversation.samples
    expected = MaskedOracle(tiny.model).logits(said.token_ids, said.images, said.kept, said.passes)
    assert_close("three turns", torch.cat(said.logits), expected, EXACT)
