"""What objects show of themselves, in a notebook and in a script."""

import base64
import html.parser
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, TINY, case_prompts
from PIL import Image
from torch import Tensor

from llama_vision import (
    Engine,
    LlamaVision,
    MaxMin,
    Prompt,
    TopK,
    TrimmedLlama,
    UniformGrid,
    plan_memory,
)
from llama_vision.checkpoint.hub import EMBEDDED_MODEL
from llama_vision.cli.reports import format_plan
from llama_vision.drawing.notebook import LONGEST_SIDE, data_uri, table_html
from llama_vision.drawing.palette import DROPPED, MERGED, VEIL
from llama_vision.drawing.panel import canvas_of
from llama_vision.engine.workload import workload_alike
from llama_vision.inputs.image import TiledImage, tile_image
from llama_vision.memory.units import human_bytes

GREEDY = {"temperature": 0, "ignore_stop": True, "max_new_tokens": 2}
HARM = "<script>alert('x')</script> & \"$a$\" <img src=x onerror=y>\n\x1b[31m"


class Reader(html.parser.HTMLParser):
    """What a browser would find: elements with their attributes, rows of cells, and all text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.rows, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        self.text += data
        if self.rows:
            self.rows[-1][-1] += data

    @property
    def pictures(self) -> list[Image.Image]:
        sources = [attributes["src"] for tag, attributes in self.tags if tag == "img"]
        data = [source.removeprefix("data:image/png;base64,") for source in sources]
        return [Image.open(io.BytesIO(base64.b64decode(one, validate=True))) for one in data]


def levels(image: Image.Image) -> Tensor:
    """[height, width, 3]"""
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(image.height, image.width, 3)


def expected(tiled: TiledImage, kept: Tensor, share: float) -> Tensor:
    """A canvas in the notebook's size, so much of the veil over each patch that is not kept."""
    canvas, (rows, cols) = canvas_of(tiled), tiled.grid
    scale = LONGEST_SIDE / max(canvas.size)
    size = tuple(round(side * scale) for side in canvas.size)
    plain = canvas.resize(size, Image.Resampling.BICUBIC)
    veiled = levels(Image.blend(plain, Image.new("RGB", size, VEIL), share))
    side = round((kept.shape[1] - 1) ** 0.5)
    patches = kept[:, 1:].view(rows, cols, side, side).transpose(1, 2).flatten(2).flatten(0, 1)

    def patch_of_pixels(pixels: int, count: int) -> Tensor:
        starts = torch.tensor([patch * pixels // count for patch in range(count)])
        return torch.searchsorted(starts, torch.arange(pixels), right=True) - 1

    whole = patches[patch_of_pixels(size[1], rows * side)][:, patch_of_pixels(size[0], cols * side)]
    return levels(plain).where(whole[..., None], veiled)


def assert_shows(completion, prompt, shares) -> None:
    """The prompt's pictures, and what the completion kept of them."""
    pictures = Reader(completion._repr_html_()).pictures
    rows = zip(pictures, prompt.images, completion.kept, shares, strict=True)
    for picture, image, kept, share in rows:
        tiled = tile_image(image, tile_size=56, max_tiles=completion.max_tiles)
        assert max(picture.size) == LONGEST_SIDE
        assert torch.equal(levels(picture), expected(tiled, kept, share))


RULES = [None, TrimmedLlama(0.1), TopK(0.3, merge=True), UniformGrid(7), MaxMin(0.3, merge=True)]


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("case", ["image_first", "two_images", "consecutive", "text_only"])
def test_patches_that_are_not_kept_are_veiled(tiny, case, rule):
    (prompt,) = case_prompts(case)
    completion = tiny.generate(prompt, pruner=rule, **GREEDY)
    share = MERGED if getattr(rule, "merge", False) else DROPPED
    assert_shows(completion, prompt, [share] * len(prompt.images))
    assert bool(rule) == any(not kept.all() for kept in completion.kept) or not prompt.images


@pytest.mark.parametrize("size", [(56, 56), (150, 40), (40, 170), (300, 290)])
@pytest.mark.parametrize("tiled", [False, True])
def test_any_grid_is_shown_with_its_padding(tiny, size, tiled):
    image = Image.effect_noise(size, 90).convert("RGB")
    image = tile_image(image, tile_size=56, max_tiles=4) if tiled else image
    prompt = Prompt([tiny.config.text.image_token_id, 5, 6], [image])
    completion = tiny.generate(prompt, pruner=TopK(0.5), **GREEDY)
    assert_shows(completion, prompt, [DROPPED])


def test_most_tiles_are_those_of_the_run(tiny):
    (prompt,) = case_prompts("image_first")
    completion = tiny.generate(prompt, pruner=TopK(0.5), max_tiles=1, **GREEDY)
    assert completion.kept[0].shape[0] == 1
    assert_shows(completion, prompt, [DROPPED])


@pytest.mark.parametrize("first_merges", [False, True])
def test_of_two_groups_one_may_be_merged_and_one_pruned(tiny, first_merges):
    """Whatever their sizes: here one of one tile and one of four."""

    def half(saliency, visual):
        stands = torch.arange(len(visual.image)) // 2 * 2
        return (
            stands if (visual.group == 0) == first_merges else stands == torch.arange(len(stands))
        )

    half.merge = True
    images = [Image.effect_noise(size, 90).convert("RGB") for size in ((56, 56), (112, 112))]
    marker = tiny.config.text.image_token_id
    prompt = Prompt([marker, 5, marker, 6], images)
    completion = tiny.generate(prompt, pruner=half, **GREEDY)
    assert [len(kept) for kept in completion.kept] == [1, 4]
    shares = [MERGED, DROPPED] if first_merges else [DROPPED, MERGED]
    assert_shows(completion, prompt, shares)


def test_words_below_a_picture_count_its_tokens(tiny):
    prompt = case_prompts("two_images")[0]
    completion = tiny.generate(prompt, pruner=TopK(0.3), **GREEDY)
    text = Reader(completion._repr_html_()).text
    for kept in completion.kept:
        n, classes = int(kept.sum()), int(kept[:, 0].sum())
        words = f"kept {n} of {kept.numel()} tokens, {n / kept.numel():.0%} ({classes} of "
        assert f"{words}{len(kept)} class tokens); dimmed: dropped" in text
    whole = Reader(tiny.generate(prompt, **GREEDY)._repr_html_()).text
    assert "dimmed" not in whole
    merged = tiny.generate(prompt, pruner=TopK(0.3, merge=True), **GREEDY)
    assert "dimmed: merged into others" in Reader(merged._repr_html_()).text


def test_a_request_that_has_not_finished_shows_what_there_is(tiny):
    (prompt,) = case_prompts("image_first")
    engine = Engine(tiny, max_seq_len=64)
    request = engine.submit(prompt, pruner=TopK(0.5), hold=True, **GREEDY)
    waiting = request.completion()
    assert Reader(waiting._repr_html_()).pictures == []
    of = waiting.visual_tokens.valid
    counts = f"0 tokens, interrupted, 0 of {of} visual tokens kept"
    assert repr(waiting) == f"<Completion []: {counts}>"
    assert repr(request) == f"<Request waiting: {len(prompt.token_ids)} prompt tokens, 0 generated>"
    engine.step()
    assert repr(request).startswith("<Request running in slot 0: ")
    assert_shows(request.completion(), prompt, [DROPPED])
    engine.run(request)
    assert repr(request).startswith("<Request finished (length) in slot 0: ")
    again = engine.submit(prompt, after=request, pruner=TopK(0.2), **GREEDY)
    (second,) = engine.run(again)
    assert_shows(second, prompt, [DROPPED])
    assert repr(again).endswith(f": {len(prompt.token_ids)} prompt tokens, 2 generated>")


@pytest.mark.parametrize("text", [HARM, "漢字 </div>", "", "a\n  b"])
def test_an_answer_stays_text(tiny, text):
    (prompt,) = case_prompts("text_only")
    completion = replace(tiny.generate(prompt, **GREEDY), text=text)
    page = Reader(completion._repr_html_())
    assert page.text == text + "2 tokens, length"
    assert [tag for tag, _ in page.tags] == ["div", "p", "p", "small"]
    assert page.tags[0][1]["class"].split() == ["tex2jax_ignore", "mathjax_ignore"]


def test_a_completion_is_one_short_line(tiny):
    (prompt,) = case_prompts("text_only")
    completion = tiny.generate(prompt, **GREEDY)
    assert repr(completion) == f"<Completion {completion.token_ids}: 2 tokens, length>"
    long = repr(replace(completion, text="ab\n\x1b<" * 10_000, finish_reason="stop"))
    assert re.fullmatch(r"<Completion 'ab.{70,80}': 2 tokens, stop>", long)
    (prompt,) = case_prompts("image_first")
    completion = replace(tiny.generate(prompt, pruner=TopK(3), **GREEDY), text="A sign.")
    valid = completion.visual_tokens.valid
    counts = f"2 tokens, length, 3 of {valid} visual tokens kept"
    assert repr(completion) == f"<Completion 'A sign.': {counts}>"


def test_a_prompt_is_one_short_line():
    prompt = Prompt(range(5000), [Image.new("RGB", (3, 3))] * 2)
    assert repr(prompt) == "<Prompt of 5000 token ids and 2 images>"


@pytest.mark.parametrize("size", [(1, 1), (300, 7), (448, 448)])
def test_a_picture_as_text_is_exact(size):
    image = Image.effect_noise(size, 90).convert("RGB")
    (again,) = Reader(f'<img src="{data_uri(image)}">').pictures
    assert torch.equal(levels(again), levels(image))


# Plans

SIZES = {"batch": 2, "max_seq_len": 64, "images": 1, "tiles": 2}


def test_a_plan_is_a_table_of_the_same_numbers(tiny):
    plan = plan_memory(tiny.config, device="cpu", **SIZES)
    page = Reader(plan._repr_html_())
    names = [name for name, _, _ in page.rows]
    assert [int(size.replace(",", "")) for _, _, size in page.rows] == [
        plan.weights,
        *plan.parts.values(),
        plan.text_cache,
        plan.visual_cache,
        plan.working,
        *plan.phases.values(),
        plan.total,
    ]
    parts, phases = list(plan.parts), list(plan.phases)
    caches = ["text cache", "visual cache", "working memory, at most"]
    assert names == ["weights", *parts, *caches, *phases, "total"]
    assert all(human == human_bytes(int(size.replace(",", ""))) for _, human, size in page.rows)
    tags = [tag for tag, _ in page.tags if tag in ("td", "th")][::3]
    assert [tag == "td" for tag in tags] == [name in (*parts, *phases) for name in names]


def test_the_command_prints_the_same_rows(tiny):
    plan = plan_memory(tiny.config, device="cpu", **SIZES)
    printed = format_plan(plan, workload_alike(tiny.config, **SIZES), tiny.config, "cpu", None)
    rows = [re.fullmatch(r"(.{26}) *\S+ \S+ +([\d,]+)", line) for line in printed.splitlines()]
    found = [(row[1].rstrip(), int(row[2].replace(",", ""))) for row in rows if row]
    assert [row for row in found if row in plan.rows()] == plan.rows()


def test_a_plan_is_one_short_line(tiny):
    plan = plan_memory(tiny.config, device="cpu", **SIZES)
    weights, text, visual, working, total = map(
        human_bytes, (plan.weights, plan.text_cache, plan.visual_cache, plan.working, plan.total)
    )
    assert repr(plan) == (
        f"<MemoryPlan: {total} (weights {weights}, text cache {text}, visual cache {visual}, "
        f"working {working})>"
    )


def test_a_table_indents_and_escapes():
    page = table_html([("a<b", "1 <i> 2"), ("  part", "3")])
    assert Reader(page).rows == [["a<b", "1 <i> 2"], ["part", "3"]]
    assert "a&lt;b" in page
    assert re.findall(r"padding-left: ([\d.]+)em", page) == ["0.5", "1.5"]


# Models and engines


def test_a_model_says_what_it_is(tiny):
    size = human_bytes(sum(parameter.nbytes for parameter in tiny.model.parameters()))
    assert repr(tiny) == f"<LlamaVision tiny: {size}, float32, cpu>"
    assert repr(LlamaVision(tiny.model)) == f"<LlamaVision: {size}, float32, cpu>"
    planned = LlamaVision.without_weights(EMBEDDED_MODEL, device="cpu", quantize="int8")
    words = r"<LlamaVision pico: [\d.]+ MiB, bfloat16, cpu, int8 \(text, cross\)>"
    assert re.fullmatch(words, repr(planned))


def test_an_engine_says_what_it_does(tiny):
    engine = Engine(tiny, slots=2, max_seq_len=64)
    for _ in range(3):
        engine.submit(Prompt([1, 2]), **GREEDY)
    engine.step()
    assert repr(engine) == "<Engine: 1 of 2 slots in use, 2 waiting>"
    engine.close()
    assert repr(engine) == "<Engine: closed, 0 of 2 slots in use, 0 waiting>"


@pytest.mark.parametrize(
    ("directory", "name"),
    [
        (TINY, "tiny"),
        (GOLDEN / "no\x1bwhere", r"no\x1bwhere"),
        (GOLDEN / "models--owner--a-b.c" / "snapshots" / "0123", "owner/a-b.c"),
        (GOLDEN / "models--owner--a" / "0123", "0123"),
    ],
)
def test_a_checkpoint_has_a_name(tiny, directory, name, monkeypatch):
    assert tiny.outline._replace(directory=directory).name == name
    if directory == TINY:
        monkeypatch.chdir(TINY)
        assert tiny.outline._replace(directory=Path()).name == name
