"""What a run kept, as one picture: the attention, and a panel for each rule."""

from bisect import bisect_right

from PIL import Image, ImageDraw, ImageFont

from llama_vision.drawing.palette import FAINT, heat
from llama_vision.drawing.panel import Panel, Picture, counted
from llama_vision.errors import printable
from llama_vision.show.kept import ROWS, Shown, ShownRule, Stop

PAPER, INK = (255, 255, 255), (24, 26, 30)
LONGEST_TEXT = 1500
"""Characters of the question, and of the answer."""


def draw_picture(shown: Shown) -> Image.Image:
    """One picture of all: a row of panels for each image, below them the question and answer."""
    of_pictures = [_panels(shown, number) for number in range(len(shown.pictures))]
    gap, widest = 24, max(panels[0].width for panels in of_pictures)
    side_by_side = max(sum(one.width for one in panels) for panels in of_pictures)
    below = max(sum(one.height for one in panels) for panels in of_pictures)
    wide = side_by_side > below
    rows = [[one] for panels in of_pictures for one in panels] if wide else of_pictures
    width = max(sum(one.width + gap for one in row) for row in rows) + gap
    caption = _caption(shown, width - 2 * gap, _font(widest))
    height = sum(max(one.height for one in row) + gap for row in rows) + caption.height + 2 * gap
    sheet, y = Image.new("RGB", (width, height), PAPER), gap
    for row in rows:
        x = gap
        for one in row:
            sheet.paste(one, (x, y))
            x += one.width + gap
        y += max(one.height for one in row) + gap
    sheet.paste(caption, (gap, y))
    return sheet


def _panels(shown: Shown, number: int) -> list[Image.Image]:
    """Those of one picture: its attention, then each rule."""
    picture = shown.pictures[number]
    name = f"Picture {number + 1}: " if len(shown.pictures) > 1 else ""
    panels = [_attention_panel(shown, picture, name)]
    return panels + [_rule_panel(shown, picture, rule, name) for rule in shown.rules]


def _attention_panel(shown: Shown, picture: Picture, name: str) -> Image.Image:
    panel = Panel(picture, shown.patches_per_side)
    paid = shown.attention["last"].mean((0, 1)).tolist()  # [V]
    most = max(paid[patch.token] for patch in panel.patches()) or 1.0
    # The square root shows what little attention most patches get; the legend says so.
    panel.paint(lambda token: heat((paid[token] / most) ** 0.5))
    panel.tile_lines()
    legend = _heat_legend(panel.image.width, most)
    return _stack(
        _line(panel.image.width, f"{name}Attention before pruning"),
        panel.image,
        legend,
        _line(panel.image.width, f"{ROWS['last']}, mean of blocks and heads", small=True),
    )


def _rule_panel(shown: Shown, picture: Picture, rule: ShownRule, name: str) -> Image.Image:
    panel = Panel(picture, shown.patches_per_side)
    stop = rule.stops[rule.chosen]
    merged = bool((stop.stands[~stop.kept] >= 0).any())
    panel.veil_dropped(stop.stands)
    panel.outline(stop.stands)
    panel.tile_lines()
    return _stack(
        _line(panel.image.width, f"{name}{rule.name}"),
        panel.image,
        _line(panel.image.width, counted_at(stop, picture, shown.patches_per_side), small=True),
        _line(panel.image.width, _key(merged, bool(stop.kept.all())), small=True),
    )


def counted_at(stop: Stop, picture: Picture, side: int) -> str:
    """How many of one picture's tokens a rule keeps, in words."""
    tiles = picture.grid[0] * picture.grid[1]
    kept = stop.kept[picture.start :][: tiles * (side**2 + 1)].unflatten(0, (tiles, -1))
    return f"{stop.setting}: {counted(kept)}"


def _key(merged: bool, everything: bool) -> str:
    if everything:
        return "nothing is dropped"
    if merged:
        return "dimmed: merged into a token of the same outline"
    return "dimmed: dropped"


def _heat_legend(width: int, most: float) -> Image.Image:
    """A bar of the colours, with what they mean at its ends and in between."""
    font = _font(width, small=True)
    bar, text = max(10, font.size * 2 // 3), int(font.size * 1.5)
    strip = Image.new("RGB", (width, bar + text), PAPER)
    draw = ImageDraw.Draw(strip)
    for x in range(width):
        draw.line((x, 0, x, bar - 1), fill=heat(x / (width - 1)))
    for place, anchor in ((0.0, "la"), (0.5, "ma"), (1.0, "ra")):
        words = f"{100 * most * place**2:.2g} %" if place else "0 % of a row's attention"
        draw.text((place * (width - 1), bar + 3), words, font=font, fill=INK, anchor=anchor)
    return strip


def _font(width: int, small: bool = False) -> ImageFont.FreeTypeFont:
    """Pillow's own, which has Latin letters only: nothing is looked for on the machine."""
    size = max(17, width // 34)
    return ImageFont.load_default(size * 4 // 5 if small else size)


def _line(width: int, words: str, small: bool = False) -> Image.Image:
    """One line, cut where it is too long."""
    font = _font(width, small)
    while font.getlength(words) > width and len(words) > 1:
        words = words[:-2] + "…"
    line = Image.new("RGB", (width, int(font.size * 1.5)), PAPER)
    ImageDraw.Draw(line).text((0, 0), words, font=font, fill=FAINT if small else INK)
    return line


def _stack(*parts: Image.Image) -> Image.Image:
    gap = 6
    height = sum(part.height + gap for part in parts) - gap
    sheet, y = Image.new("RGB", (parts[0].width, height), PAPER), 0
    for part in parts:
        sheet.paste(part, (0, y))
        y += part.height + gap
    return sheet


def _caption(shown: Shown, width: int, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Question and answer, in lines of the sheet's width."""
    lines = []
    for name, text in (("Question: ", shown.question), ("Answer: ", shown.answer)):
        for number, part in enumerate(text[:LONGEST_TEXT].splitlines() or [""]):
            lines += _wrapped(name * (number == 0) + printable(part, LONGEST_TEXT), font, width)
    step = int(font.size * 1.4)
    sheet = Image.new("RGB", (width, step * len(lines)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, words in enumerate(lines):
        draw.text((0, number * step), words, font=font, fill=INK)
    return sheet


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """A text in lines that fit; a word that is wider than a line is cut."""
    lines, line = [], ""
    for word in text.split(" "):
        longer = f"{line} {word}" if line else word
        if font.getlength(longer) <= width:
            line = longer
            continue
        lines += [line] * bool(line)
        line = word
        while font.getlength(line) > width and len(line) > 1:
            places = range(1, len(line))
            fits = max(1, bisect_right(places, width, key=lambda n: font.getlength(line[:n])))
            lines.append(line[:fits])
            line = line[fits:]
    return [*lines, line]
