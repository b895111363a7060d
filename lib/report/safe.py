"""Harmless HTML from text of notebooks, tables and figures: what is not known to be safe stays out.

markdown(text, known)     formulas as MathML, raw HTML as text
sanitized(html)           known tags and attributes only
drawn(svg, prefix)        shapes only, no address outside
highlighted, plain        code and outputs
"""

import re
from collections.abc import Callable
from functools import cache
from html import escape
from html.parser import HTMLParser
from xml.etree import ElementTree


def scrolled(content: str, label: str) -> str:
    """A wide table scrolls by itself, also by keyboard."""
    name = escape(label[:80] or "table")
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{name}">{content}</div>'


def plain(text: str, kind: str = "output") -> str:
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).strip("\n")
    return f'<pre class="{kind}">{escape(text)}</pre>' if text else ""


# ------------------------------------------------------------------ markdown, formulas, code

# Code comes first, so that a dollar in it is a dollar. An inline formula has no space inside its
# dollars and no digit behind them.
FORMULA = re.compile(
    r"""(?P<code>^[ \t]*(?P<fence>`{3,}|~{3,}).*?(?:^[ \t]*(?P=fence)|\Z)
    |(?<!`)(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`))
    |\$\$(?P<block>.+?)\$\$
    |(?<![\\$\w])\$(?P<inline>[^\s$](?:(?:[^$\n]|\n(?!\s*\n))*[^\s$\\])?)\$(?![\d\w])""",
    re.S | re.M | re.X,
)
MATHML = set(
    (
        "math mrow mi mn mo mtext mspace msup msub msubsup mfrac msqrt mroot munder mover "
        "munderover mtable mtr mtd mstyle mpadded mphantom menclose mmultiscripts mprescripts "
        "none"
    ).split()
)


FORMULA_KEYS = set(
    (
        "display mathvariant stretchy width minsize maxsize accent linethickness columnalign fence "
        "form movablelimits notation lspace rspace"
    ).split()
)


def markdown(text: str, known: set[str]) -> str:
    """Markdown as HTML: formulas in MathML, raw HTML escaped, links to the index."""
    import mistune

    class Renderer(mistune.HTMLRenderer):
        def link(self, text, url, title=None):
            if re.match(r"https?://[^\s\"'<>\ue000]+$", url):
                return f'<a href="{escape(url)}" rel="noopener">{text}</a>'
            name = re.fullmatch(r"(?:\./)?(\d\d_\w+)\.ipynb(?:#.*)?", url)
            return (
                f'<a href="../index.html#notebook-{name[1]}">{text}</a>'
                if name and name[1] in known
                else text
            )

        def image(self, text, url, title=None):
            return text

        def block_code(self, code, info=None):
            return highlighted(code, info or "text") + "\n"

    formulas: list[str] = []

    def keep(match: re.Match) -> str:
        if match["code"]:
            return match[0]
        formulas.append(
            formula(match["block"] or match["inline"], "block" if match["block"] else "inline")
        )
        return f"\ue000{len(formulas) - 1}\ue001"  # characters that mean nothing to markdown

    text = FORMULA.sub(keep, re.sub("[\ue000\ue001]", "", text))
    html = mistune.create_markdown(
        renderer=Renderer(escape=True), plugins=["table", "strikethrough"]
    )(text)
    html = re.sub("\ue000(\\d+)\ue001", lambda match: formulas[int(match[1])], html)
    return re.sub(
        r"<table>.*?</table>", lambda match: scrolled(match[0], "table"), html, flags=re.S
    ).strip()


def formula(latex: str, display: str) -> str:
    """LaTeX as MathML; what cannot be converted is shown as it was typed."""
    from latex2mathml.converter import convert

    try:
        tree = ElementTree.fromstring(convert(latex.strip(), display=display))
        bad = any(
            local(part.tag) not in MATHML or "\\" in (part.text or "") for part in tree.iter()
        )
    except Exception:  # the converter raises a dozen kinds
        bad = True
    if bad:
        return f"<code>{escape(' '.join(latex.split()))}</code>"
    return markup(tree, MATHML, lambda _, key, value: (key, value) if key in FORMULA_KEYS else None)


def highlighted(code: str, language: str = "python") -> str:
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    try:
        lexer = get_lexer_by_name(language.split()[0], stripnl=True)
    except (ClassNotFound, IndexError):
        lexer = get_lexer_by_name("text")
    html = highlight(code, lexer, HtmlFormatter(nowrap=True)).rstrip()
    return f'<pre class="code"><code>{html}</code></pre>' if code.strip() else ""


@cache
def code_css() -> str:
    """Colours of code in daylight and in the dark."""
    from pygments.formatters import HtmlFormatter

    def colours(style: str) -> str:
        lines = HtmlFormatter(style=style).get_style_defs("pre.code").split("\n")
        return "\n".join(line for line in lines if re.match(r"pre\.code \.\w+ ", line))

    dark = f"@media screen and (prefers-color-scheme: dark) {{\n{colours('github-dark')}\n}}"
    return f"{colours('xcode')}\n{dark}\n"


# ------------------------------------------------------------------ harmless HTML and SVG

HTML_TAGS = set(
    ("table thead tbody tr th td caption div span p code pre b i em strong sub sup br").split()
)
SILENT = set(
    ("script style template title head iframe object svg math noscript textarea select").split()
)
SVG_TAGS = set(
    (
        "svg g path use defs clipPath rect circle ellipse line polyline polygon text tspan "
        "title desc linearGradient radialGradient stop pattern mask marker symbol image"
    ).split()
)


class Sanitizer(HTMLParser):
    """Writes the harmless tags and attributes anew, closes them, and keeps other tags' text."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.written: list[str] = []
        self.open: list[str] = []
        self.silent: list[str] = []

    def handle_starttag(self, tag, attributes):
        if tag in SILENT:
            self.silent.append(tag)
        if self.silent or tag not in HTML_TAGS:
            return
        kept = "".join(
            f' {key}="{escape(value or "")}"'
            for key, value in dict(attributes).items()
            if key in ("align", "scope", "colspan", "rowspan", "class")
        )
        self.written.append(f"<{tag}{kept}>")
        if tag != "br":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        if tag not in SILENT:
            self.handle_starttag(tag, attributes)
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if self.silent:
            if tag in self.silent:
                del self.silent[self.silent.index(tag) :]
        elif tag in self.open:
            while self.open[-1] != tag:
                self.written.append(f"</{self.open.pop()}>")
            self.written.append(f"</{self.open.pop()}>")

    def handle_data(self, data):
        if not self.silent:
            self.written.append(escape(data))


def sanitized(html: str) -> str:
    parser = Sanitizer()
    parser.feed(html)
    parser.close()
    return "".join(parser.written) + "".join(f"</{tag}>" for tag in reversed(parser.open))


def drawn(text: str, prefix: str) -> tuple[str, str]:
    """(an SVG for the middle of a page, its caption): shapes only, no address, ids of its own.

    Raises:
        ValueError, ElementTree.ParseError: it is no SVG, or declares entities.
    """
    prefix = re.sub(r"\W", "-", prefix)
    if "<!ENTITY" in text:
        raise ValueError("declares entities")
    root = ElementTree.fromstring(text)
    if local(root.tag) != "svg":
        raise ValueError(f"holds <{local(root.tag)}>, not <svg>")
    said = {
        kind: next((child for child in root if local(child.tag) == kind), None)
        for kind in ("title", "desc")
    }
    for kind, child in said.items():
        if child is not None:
            child.set("id", kind)
    labels = [kind for kind, child in said.items() if child is not None]
    wanted = {
        name
        for part in root.iter()
        for key, value in part.items()
        for name in re.findall(r"url\(#([^)\s]+)\)" if local(key) != "href" else r"^#(\S+)$", value)
    } | {*labels}

    def attribute(tag: str, key: str, value: str) -> tuple[str, str] | None:
        if key == "id":
            return (key, f"{prefix}-{value}") if value in wanted else None
        return kept_attribute(tag, key, value, prefix)

    for part in root.iter():  # matplotlib's line breaks between shapes
        part.text, part.tail = (
            (part.text if local(part.tag) in ("text", "tspan", "title", "desc") else None),
            (part.tail or "").strip() and part.tail,
        )
    named = " ".join(f"{prefix}-{kind}" for kind in labels)
    label = f'aria-labelledby="{named}"' if labels else 'aria-label="figure"'
    captions = [said[kind].text or "" for kind in ("desc", "title") if said[kind] is not None]
    picture = markup(root, SVG_TAGS, attribute)
    picture = picture.replace("<svg", f'<svg role="img" {label}', 1)
    return picture, " ".join((captions or [""])[0].split())


def kept_attribute(tag: str, key: str, value: str, prefix: str) -> tuple[str, str] | None:
    """An attribute of a drawing, its references to other parts renamed; None if it may do harm."""
    if key == "href":
        if value.startswith("#"):
            return key, f"#{prefix}-{value[1:]}"
        png = re.fullmatch(r"data:image/png;base64,[A-Za-z0-9+/=\s]*", value)
        return (key, value) if tag == "image" and png else None
    value = re.sub(r"url\(#([^)\s]+)\)", rf"url(#{prefix}-\1)", value)
    known = re.fullmatch(r"[A-Za-z][A-Za-z-]*\d?", key)
    if key.lower().startswith(("on", "aria", "role")) or not known:
        return None
    return None if re.search(r"//|\\|@|url\((?!#)", value) else (key, value)


def local(name) -> str:
    """A name without its namespace; comments have none."""
    return name.rpartition("}")[2] if isinstance(name, str) else ""


def markup(part: ElementTree.Element, tags: set[str], attribute: Callable) -> str:
    """The element as HTML takes it: known tags, and attributes that `attribute` lets through."""
    tag = local(part.tag)
    if tag not in tags:
        return ""
    kept = "".join(
        f' {item[0]}="{escape(item[1])}"'
        for key, value in part.items()
        if (item := attribute(tag, local(key), value))
    )
    inside = escape(part.text or "", quote=False) + "".join(
        markup(child, tags, attribute) + escape(child.tail or "", quote=False) for child in part
    )
    return (
        f"<{tag}{kept}>{inside}</{tag}>"
        if inside or tag not in ("path", "use", "rect", "image", "mspace")
        else f"<{tag}{kept}/>"
    )
