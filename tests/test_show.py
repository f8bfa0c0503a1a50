"""What `--show-kept` writes: the data, the picture, and the page in a browser."""

import base64
import html.parser
import json
import re
import struct
from dataclasses import dataclass, replace
from itertools import accumulate

import pytest
import torch
from browser import CHROMIUM, Browser
from conftest import GOLDEN, TINY, Spy, assert_close, case_prompts
from PIL import Image

from llama_vision import (
    KeyNorm,
    LastQuery,
    LlamaVision,
    MaxMin,
    RandomTokens,
    TopK,
    TrimmedLlama,
    UniformGrid,
)
from llama_vision.checkpoint.hub import EMBEDDED_MODEL
from llama_vision.cli.main import main
from llama_vision.cli.parsing import SHOWN_RULES
from llama_vision.drawing.palette import CLUSTERS, HEAT, VEIL, heat
from llama_vision.drawing.panel import DROPPED, Panel, Picture, canvas_of
from llama_vision.engine.segments import image_groups
from llama_vision.inputs.image import open_image, tile_image
from llama_vision.show.attention import look
from llama_vision.show.kept import ROWS, Shown, ShownRule, Stop, gather
from llama_vision.show.page import embedded_json, make_page, page_data, quantised
from llama_vision.show.picture import draw_picture
from llama_vision.show.write import ShowError, check_target, show_kept

GREEDY = {"temperature": 0, "ignore_stop": True, "max_new_tokens": 2}
EXAMPLES = EMBEDDED_MODEL / "examples"
RULES = [
    TrimmedLlama(0.1),
    TrimmedLlama(0.1, votes="last", merge=True),
    TopK(0.3, votes="after"),
    LastQuery(0.3, merge=True),
    KeyNorm(7),
    UniformGrid(0.3, merge=True),
    MaxMin(0.3, merge=True),
    MaxMin(0.3, keep_class_tokens=True),
]
each_rule = pytest.mark.parametrize("rule", RULES, ids=repr)


def shown_run(model, prompt, question="What?", others=(), **settings):
    """The completion of a run, and what is shown of it."""
    engine, (request,) = model.start([prompt], **{**GREEDY, **settings})
    (completion,) = engine.run(request)
    return completion, gather(model, request, question=question, others=others)


def unpacked(stands: str) -> list[int]:
    data = base64.b64decode(stands)
    return list(struct.unpack(f"<{len(data) // 4}i", data))


def stands_in(page: dict, rule: int = 0) -> list[int]:
    """Of the stop that was in use."""
    own = page["rules"][rule]
    return unpacked(own["stops"][own["chosen"]]["stands"])


# The data


@each_rule
@pytest.mark.parametrize("case", ["image_first", "two_images", "consecutive"])
def test_the_page_has_what_the_completion_has(tiny, case, rule):
    prompt = case_prompts(case)[0]
    completion, shown = shown_run(tiny, prompt, pruner=rule)
    stands, page = stands_in(page_data(shown)), page_data(shown)
    kept = torch.cat([mask.flatten() for mask in completion.kept]).tolist()
    assert [own == token for token, own in enumerate(stands)] == kept
    assert page["tokens"] == len(kept)
    sizes = [mask.numel() for mask in completion.kept]
    before = [0, *accumulate(sizes)]
    groups, first = [], 0
    for rows in image_groups(prompt.token_ids, tiny.config.text.image_token_id):
        groups += [before[first]] * len(rows)  # the first token of an image's group
        first += len(rows)
    expected = [
        int(own) + start
        for of_image, start in zip(completion.stands, groups, strict=rule.merge)
        for own in of_image.flatten()
    ]
    dropped = [token if keep else DROPPED for token, keep in enumerate(kept)]
    assert stands == (expected if rule.merge else dropped)
    assert [picture["start"] for picture in page["pictures"]] == before[:-1]


@each_rule
def test_another_stop_is_what_a_run_would_keep_there(tiny, rule):
    """At another share, by the same rule with the same options."""
    prompt = case_prompts("two_images")[0]
    name = "k_ratio" if isinstance(rule, TrimmedLlama) else "keep"
    completion, _ = shown_run(tiny, prompt, pruner=replace(rule, **{name: 0.2}))
    _, shown = shown_run(tiny, prompt, pruner=rule)
    (stop,) = (stop for stop in shown.rules[0].stops if stop.setting == f"{name} 0.2")
    assert torch.equal(stop.kept, torch.cat([mask.flatten() for mask in completion.kept]))
    counts = [int(stop.kept.sum()) for stop in shown.rules[0].stops]
    assert counts == sorted(set(counts))
    assert len(counts) >= (10 if name == "keep" else 3)


@pytest.mark.parametrize("budget", [None, 0.5])
def test_a_pruner_of_ones_own_has_the_stop_in_use_alone(tiny, budget):
    prompt = case_prompts("image_first")[0]

    def thirds(saliency, visual):
        return torch.arange(len(visual.image)) % 3 == 0

    _, shown = shown_run(tiny, prompt, pruner=thirds, visual_budget=budget)
    (rule,) = shown.rules
    assert (rule.name, rule.chosen, len(rule.stops)) == ("thirds", 0, 1)
    assert rule.stops[0].kept.nonzero().flatten().tolist() == list(
        range(0, len(rule.stops[0].kept), 3)
    )


def test_without_a_rule_everything_is_kept(tiny):
    _, shown = shown_run(tiny, case_prompts("image_first")[0])
    (rule,) = shown.rules
    assert rule.chosen == len(rule.stops) - 1
    assert bool(rule.stops[rule.chosen].kept.all())
    assert not bool(rule.stops[0].kept.all())


@pytest.mark.parametrize("rule", [TrimmedLlama(0.1), MaxMin(0.4, merge=True)], ids=repr)
def test_other_rules_keep_as_much_and_merge_alike(tiny, rule):
    """The paper's rule keeps at most as much: its counts go in steps."""
    prompt = case_prompts("two_images")[0]
    completion, shown = shown_run(tiny, prompt, pruner=rule, others=list(SHOWN_RULES.values()))
    assert len(shown.rules) == 1 + len(SHOWN_RULES)
    for kind, other in zip(SHOWN_RULES.values(), shown.rules[1:], strict=True):
        stop = other.stops[other.chosen]
        kept = stop.kept.split([mask.numel() for mask in completion.kept])
        pairs = list(zip(kept, completion.kept, strict=True))
        if kind is TrimmedLlama:
            assert all(0 < int(own.sum()) <= int(mask.sum()) for own, mask in pairs)
        else:
            assert [int(own.sum()) for own, _ in pairs] == [int(mask.sum()) for _, mask in pairs]
        assert bool((stop.stands == DROPPED).any()) != rule.merge


@pytest.mark.parametrize("votes", ["all", "after", "last"])
@pytest.mark.parametrize("case", ["image_first", "two_images", "consecutive"])
def test_attention_is_what_a_pruner_is_shown(tiny, case, votes):
    """In the first block; in each block a row's shares add up to one, however the rows go in."""
    prompt = case_prompts(case)[0]
    images = [tile_image(image, tile_size=56, max_tiles=4) for image in prompt.images]
    seen = look(tiny.model, prompt.token_ids, images, 1000)
    spy = Spy()
    spy.votes = votes
    tiny.generate(prompt, pruner=spy, **GREEDY)
    assert len(spy.saliencies) == len(seen)
    for one, saliency, visual in zip(seen, spy.saliencies, spy.visuals, strict=True):
        assert_close("saliency", one.saliency[votes][0], saliency, 1e-5)
        assert_close("keys", one.visual.keys, visual.keys, 1e-5)
        assert_close("features", one.visual.features, visual.features, 1e-5)
        shares = one.shares(votes)
        assert shares.shape[0] == len(tiny.config.text.cross_attention_layers)
        total = shares.sum(-1)
        assert_close("rows", total, torch.ones_like(total) * bool(one.voters[votes]), 1e-5)
    for one, other in zip(seen, look(tiny.model, prompt.token_ids, images, 2), strict=True):
        assert_close("in chunks", other.shares(votes), one.shares(votes), 1e-5)


@pytest.mark.parametrize("size", [(56, 56), (112, 56), (40, 170)])
def test_the_canvas_is_what_the_model_saw(size):
    image = Image.effect_noise(size, 90).convert("RGB")
    tiled = tile_image(image, tile_size=56, max_tiles=4)
    canvas = canvas_of(tiled)
    assert canvas.size == (56 * tiled.grid[1], 56 * tiled.grid[0])
    again = tile_image(canvas, tile_size=56, max_tiles=4)
    assert_close("pixels", again.pixels, tiled.pixels, 1e-5)


def test_a_byte_tells_attention_to_half_a_step():
    shares = torch.softmax(4 * torch.randn(3, 2, 50, generator=torch.Generator()), -1)
    shares[0, 0] = 0  # nobody votes
    data, most = quantised(shares)
    levels = torch.tensor(list(data)).unflatten(0, shares.shape) / 255
    root = levels * torch.tensor(most)[..., None].sqrt()
    assert_close("roots", root, shares.sqrt(), 0.5 / 255 + 1e-6)


# The picture


def by_hand(grid=(1, 2), side=2, stands=None, colour=(200, 30, 90), **changes):
    """Something to show of one picture of one colour."""
    tokens = grid[0] * grid[1] * (side**2 + 1)
    stands = torch.arange(tokens) if stands is None else torch.tensor(stands)
    canvas = Image.new("RGB", (grid[1] * 40, grid[0] * 40), colour)
    even = torch.full((2, 3, tokens), 1 / tokens)
    rule = ShownRule("Rule", [Stop("keep 0.5", stands)], 0)
    shown = Shown(
        "Q", "A", [Picture(canvas, grid, 0)], side, [3, 8], {"last": even, "all": even}, [rule]
    )
    return replace(shown, **changes)


def test_patches_are_where_the_tiles_say():
    """Tile 0 has tokens 0 to 4, class token first; tile 1 those from 5 on."""
    panel = Panel(by_hand().pictures[0], 2)
    patches = list(panel.patches())
    assert [patch.token for patch in patches] == [1, 2, 6, 7, 3, 4, 8, 9]
    area = sum((p.box[2] - p.box[0]) * (p.box[3] - p.box[1]) for p in patches)
    assert area == panel.image.width * panel.image.height


def middle(panel, token):
    (box,) = (patch.box for patch in panel.patches() if patch.token == token)
    return panel.image.getpixel(((box[0] + box[2]) // 2, (box[1] + box[3]) // 2))


def test_what_is_not_kept_is_dimmed_and_nothing_else():
    panel = Panel(by_hand().pictures[0], 2)
    panel.veil(1.0, lambda token: token in (2, 8))
    for token in (1, 2, 3, 4, 6, 7, 8, 9):
        assert middle(panel, token) == (VEIL if token in (2, 8) else (200, 30, 90))


def test_clusters_of_several_are_outlined_where_they_end():
    """1 and 2 together, across the tiles' border 4 and 8; the others alone or dropped."""
    stands = torch.tensor([0, 1, 1, DROPPED, 4, 5, 6, 7, 4, 9])
    panel = Panel(by_hand().pictures[0], 2)
    panel.outline(stands)
    boxes = {patch.token: patch.box for patch in panel.patches()}

    def drawn(token):
        left, top, right, bottom = boxes[token]
        x, y = (left + right) // 2, (top + bottom) // 2
        edges = {
            "up": (x, top),
            "down": (x, bottom - 1),
            "left": (left, y),
            "right": (right - 1, y),
        }
        return {name for name, at in edges.items() if panel.image.getpixel(at) in CLUSTERS}

    assert [drawn(token) for token in (3, 6, 7, 9)] == [set()] * 4
    assert drawn(1) == {"up", "down", "left"}
    assert drawn(2) == {"up", "down", "right"}
    assert drawn(4) == {"up", "down", "left"}
    assert drawn(8) == {"up", "down", "right"}


def test_heat_rises_from_end_to_end():
    levels = [sum(heat(share / 50)) for share in range(51)]
    assert levels == sorted(levels)
    assert (heat(-1), heat(0), heat(1), heat(2)) == (HEAT[0], HEAT[0], HEAT[-1], HEAT[-1])


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (4, 1), (2, 2)])
@pytest.mark.parametrize("text", ["", "word " * 400, "x" * 900, "a\nb\x1b[31m", "漢字 \u202e"])
def test_a_picture_of_any_shape_and_text_is_drawn(grid, text):
    shown = by_hand(grid, question=text, answer=text)
    two = replace(shown, rules=shown.rules * 3)
    sheet = draw_picture(two)
    assert max(sheet.size) < 8000
    assert sheet.getpixel((2, 2)) == (255, 255, 255)


# The page


class Reader(html.parser.HTMLParser):
    """What a browser would find: elements, and the text of each kind of them."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.open, self.texts = [], [], {}
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        for tag in self.open[-1:]:
            self.texts.setdefault(tag, []).append(data)


HARM = (
    "</script><script>document.title = 'harm'</script> <!-- \"'& <img src=x onerror=alert(1)>\u2028"
)


@pytest.mark.parametrize("text", [HARM, "$data ${style} %s {0}", "\ud800 lone", "", "<!--<script>"])
def test_any_question_and_answer_stay_text(text):
    page = make_page(by_hand(question=text, answer=text))
    reader = Reader(page.encode("utf-8", "replace").decode())
    assert [tag for tag, _ in reader.tags].count("script") == 2
    assert "img" not in {tag for tag, _ in reader.tags}
    data = json.loads(reader.texts["script"][0])
    assert (data["question"], data["answer"]) == (text, text)
    assert "".join(reader.texts.get("title", [])) == text.replace("\ud800", "?")


def test_a_page_names_no_address():
    page = make_page(by_hand())
    assert not re.search(r"https?:|//[a-z]|url\(|@import", page)
    links = [of.get("src") or of.get("href") for _, of in Reader(page).tags]
    assert {link for link in links if link} == {"data:,"}
    policy = Reader(page).tags[3][1]["content"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert embedded_json("<&>") == '"\\u003c\\u0026\\u003e"'


# The command

PICTURE = GOLDEN / "images" / "rgb_120x30.png"
ASK = ("--model", str(TINY), "--device", "cpu", "--max-new-tokens", "2", "--prompt", "What is it?")
SHOW = (*ASK, "--image", str(PICTURE))


OTHERS = ("--show-rules", "trimmed,uniform")


@pytest.mark.parametrize(
    ("name", "rule", "others"),
    [
        ("a.PNG", (), ()),
        ("a.png", ("--pruner", "top-k", "--keep", "9"), OTHERS),
        ("a.html", ("--k-ratio", "0.1"), ()),
        ("a.html", ("--pruner", "top-k", "--keep", "9"), OTHERS),
    ],
)
def test_the_command_writes_it_and_answers_as_without(capsys, tmp_path, name, rule, others):
    ask = [*SHOW, "--seed", "1", *rule, "--json"]
    assert main(ask) == 0
    expected = json.loads(capsys.readouterr().out.splitlines()[-1])
    target = tmp_path / name
    assert main([*ask, *others, "--show-kept", str(target)]) == 0
    got = json.loads(capsys.readouterr().out.splitlines()[-1])
    same = ("token_ids", "logprobs", "visual_tokens")
    assert [got[name] for name in same] == [expected[name] for name in same]
    if name == "a.html":
        reader = Reader(target.read_text(encoding="utf-8"))
        data = json.loads(reader.texts["script"][0])
        assert (data["question"], data["answer"]) == ("What is it?", got["text"])
        stands = stands_in(data)
        assert sum(own == token for token, own in enumerate(stands)) == got["visual_tokens"]["kept"]
        assert len(data["rules"]) == (3 if others else 1)
    else:
        assert Image.open(target).size > (448, 448)


def refused(capsys, *arguments: str) -> str:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    return line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((*SHOW, "--show-kept", "a.jpg"), "ends in .png or .html"),
        ((*SHOW, "--show-kept", "a"), "ends in .png or .html"),
        ((*SHOW, "--show-kept", ""), "ends in .png or .html"),
        ((*SHOW, "--show-kept", "no/such/a.png"), "in no directory that exists"),
        ((*SHOW, "--show-kept", "made.html"), "is a directory"),
        ((*SHOW, "--show-kept", "n" * 300 + ".png"), "cannot be written"),
        ((*ASK, "--show-kept", "a.png"), "give an --image"),
        ((*ASK, "--image", "mine.png", "--show-kept", "mine.png"), "is the picture itself"),
        ((*ASK, "--image", "file:mine.png", "--show-kept", "./made.html/../mine.png"), "is the"),
        ((*SHOW, "--show-rules", "top-k"), "needs --show-kept"),
        ((*SHOW, "--show-rules", "top-k", "--show-kept", "a.png"), "needs --keep or --k-ratio"),
        ((*SHOW, "--show-rules", "top-k,best"), "is not of trimmed, "),
        ((*SHOW, "--show-rules", ""), "is not of trimmed, "),
    ],
)
def test_what_cannot_be_shown_is_told_before_anything_is_run(
    capsys, tmp_path, monkeypatch, arguments, says
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made.html").mkdir()
    (tmp_path / "mine.png").write_bytes(PICTURE.read_bytes())
    monkeypatch.setattr(LlamaVision, "without_weights", None)
    if arguments[-1].endswith("../mine.png"):
        arguments = [argument.replace("file:", f"file://{tmp_path}/") for argument in arguments]
    assert says in refused(capsys, *arguments)
    assert (tmp_path / "mine.png").read_bytes() == PICTURE.read_bytes()


def test_no_permission_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ShowError, match="no permission"):
        check_target(str(tmp_path / "a.png"), ["a"])


def test_a_full_disk_is_told(tiny, tmp_path, monkeypatch):
    engine, (request,) = tiny.start([case_prompts("image_first")[0]], **GREEDY)
    engine.run(request)
    (tmp_path / "a.html").mkdir()  # since it was looked at
    with pytest.raises(ShowError, match="cannot be written: Is a directory"):
        show_kept(str(tmp_path / "a.html"), tiny, request, question="?")


def test_a_prompt_without_pictures_is_told(tiny):
    with pytest.raises(ShowError, match="has none"):
        shown_run(tiny, case_prompts("text_only")[0])


# In a browser


@dataclass
class Open:
    """A page in a browser, and what it shows."""

    browser: Browser
    shown: Shown

    def reading(self) -> list[str]:
        """The lines about the chosen patch."""
        return self.browser.value(
            "[...document.querySelectorAll('#reading p')].map(p => p.textContent)"
        )

    def text(self, id: str) -> str:
        return self.browser.value(f"document.getElementById('{id}').textContent")

    def focus(self, selector: str) -> None:
        self.browser.value(f"document.querySelectorAll('{selector}')[0].focus()")

    def go_to(self, row: int, col: int) -> None:
        """By keyboard, from no patch."""
        self.browser.press("Escape", *["ArrowDown"] * (row + 1), *["ArrowRight"] * col)

    def patch_of(self, token: int) -> tuple[int, int]:
        """Row and column among all patches of the first picture."""
        panel = Panel(self.shown.pictures[0], self.shown.patches_per_side)
        (place,) = ((p.row, p.col) for p in panel.patches() if p.token == token)
        return place

    def name(self, token: int) -> str:
        """Where a token is, in the page's words."""
        side = self.shown.patches_per_side
        tile, patch = divmod(token, side**2 + 1)
        row, col = divmod(patch - 1, side)
        place = f"tile {tile + 1}, row {row + 1}, column {col + 1}"
        return place if patch else f"class token of tile {tile + 1}"

    def fate(self, stop: Stop, token: int) -> str:
        """What became of a token, in the page's words."""
        own = int(stop.stands[token])
        size = int((stop.stands == own).sum())
        if own == token:
            return f"kept, stands for {size} tokens" if size > 1 else "kept"
        return f"merged into {self.name(own)}; a cluster of {size} tokens"


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """The page of a merged run of the embedded model, beside another rule."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium, as from apt-get install chromium")
    folder = tmp_path_factory.mktemp("page")
    model = LlamaVision.from_pretrained(EMBEDDED_MODEL, device="cpu")
    content = [open_image(EXAMPLES / "scene.png"), "Describe the image."]
    prompt = model.prompt([{"role": "user", "content": content}])
    rule = MaxMin(0.3, merge=True)
    _, shown = shown_run(model, prompt, question=HARM, others=[RandomTokens], pruner=rule)
    path = folder / "page.html"
    path.write_bytes(make_page(shown).encode())
    with Browser(folder / "profile") as browser:
        browser.screen(1280, 900)
        browser.open(path)
        yield Open(browser, shown)


def test_the_slider_goes_through_all_shares_by_keyboard(opened):
    opened.focus("#share")
    opened.browser.press("Home")
    stops = opened.shown.rules[0].stops
    for number, stop in enumerate(stops):
        count = int(stop.kept.sum())
        words = f"{count} of 260 tokens ({round(100 * count / 260)} %): {stop.setting}"
        used = ", as in the run" * (number == opened.shown.rules[0].chosen)
        assert opened.text("setting") == words + used
        opened.browser.press("ArrowRight")
    opened.browser.value("document.getElementById('reset').click()")
    assert opened.text("setting").endswith("as in the run")


@pytest.mark.parametrize("share", [None, 0], ids=["in use", "least"])
def test_a_patch_and_its_cluster_are_read_by_keyboard_and_pointer(opened, share):
    rule, other = opened.shown.rules
    if share is not None:
        opened.focus("#share")
        opened.browser.press("Home")
    stop = rule.stops[rule.chosen if share is None else share]
    beside = other.stops[other.chosen if share is None else share]
    patches = [token for token in range(260) if token % 65]
    merged = next(t for t in patches if stop.stands[t] != t)
    leader = next(t for t in patches if stop.stands[t] == t and int((stop.stands == t).sum()) > 1)
    most = int(stop.stands.bincount().argmax())
    crowd = next(t for t in patches if stop.stands[t] == most)
    opened.focus("canvas")
    for token in (merged, leader, crowd, 259):
        expected = [f"{rule.name}: {opened.fate(stop, token)}"]
        expected += [f"{other.name}: {opened.fate(beside, token)}"]
        row, col = opened.patch_of(token)
        opened.go_to(row, col)
        assert opened.reading()[0].lower() == opened.name(token)
        assert opened.reading()[2:] == expected
        opened.browser.press("Escape")
        assert opened.reading()[0] == "No patch chosen"
        box = opened.browser.value(
            "document.querySelectorAll('canvas')[1].scrollIntoView({block: 'center'}), "
            "(b => [b.left, b.top, b.width])(document.querySelectorAll('canvas')[1]"
            ".getBoundingClientRect())"
        )
        step = box[2] / 16
        opened.browser.point(box[0] + (col + 0.5) * step, box[1] + (row + 0.5) * step)
        assert opened.reading()[2:] == expected
    opened.browser.value("document.getElementById('reset').click()")


def test_a_class_token_is_read(opened):
    opened.focus(".classes button:nth-of-type(3)")
    stop = opened.shown.rules[0].stops[opened.shown.rules[0].chosen]
    assert opened.reading()[0] == "Class token of tile 3"
    assert opened.reading()[2].endswith(opened.fate(stop, 2 * 65))


@pytest.mark.parametrize("rows", range(len(ROWS)))
@pytest.mark.parametrize(("block", "head"), [("all", "all"), (0, "all"), ("all", 3), (2, 1)])
def test_attention_of_a_block_and_head_is_read(opened, rows, block, head):
    """To what a byte leaves, and the two digits that are shown."""
    for id, value in (("rows", rows), ("block", block), ("head", head)):
        opened.browser.value(
            f"(s => {{ s.value = '{value}'; s.dispatchEvent(new Event('change')) }})"
            f"(document.getElementById('{id}'))"
        )
    paid = list(opened.shown.attention.values())[rows]  # [blocks, H, V]
    paid = paid.mean(0) if block == "all" else paid[block]
    paid = paid.mean(0) if head == "all" else paid[head]
    token = int(paid.clone().index_fill(0, torch.arange(0, 260, 65), 0).argmax())
    opened.focus("canvas")
    opened.go_to(*opened.patch_of(token))
    said = re.fullmatch(
        r"Attention ([\d.e-]+) %, ([\d.]+) times an even share, rank (\d+) of 260",
        opened.reading()[1],
    )
    assert float(said[1]) / 100 == pytest.approx(float(paid[token]), rel=0.06)
    assert float(said[2]) == pytest.approx(260 * float(paid[token]), rel=0.06)
    assert int(said[3]) <= 1 + int((paid > paid[token]).sum()) + 2


def luminance(rgb: str) -> float:
    """Source: WCAG 2.1, relative luminance."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", rgb)[:3]]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_it_can_be_read_in_light_and_dark_at_any_width(opened, dark, width):
    opened.browser.screen(width, 800, dark=dark)
    paper, *inks = opened.browser.value(
        "[getComputedStyle(document.body).backgroundColor, ...['h1', 'label', 'footer', 'output', "
        "'#reading p'].map(s => getComputedStyle(document.querySelector(s)).color)]"
    )
    assert (luminance(paper) < 0.2) == dark
    for ink in inks:
        light, dim = sorted([luminance(ink), luminance(paper)], reverse=True)
        assert (light + 0.05) / (dim + 0.05) >= 4.5
    assert opened.browser.value("document.documentElement.scrollWidth <= innerWidth")
    assert opened.browser.value(
        "[...document.querySelectorAll('canvas')].every(c => c.clientWidth > 200)"
    )


def test_no_request_leaves_the_page(opened):
    """All that it asked for, in all that these tests did; and it could not, even if it tried."""
    assert {re.match("[a-z]+:", url)[0] for url in opened.browser.requests()} == {"file:", "data:"}
    assert opened.browser.complaints() == []
    assert opened.browser.value("document.title") == HARM
    stopped = (
        "new Promise(done => {"
        "addEventListener('securitypolicyviolation', e => done(e.effectiveDirective));"
        "fetch('http://127.0.0.1:9/').catch(() => {}) })"
    )
    assert opened.browser.value(stopped) == "connect-src"
