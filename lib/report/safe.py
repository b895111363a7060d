"""Harmless HTML from the text of notebooks, tables and figures: unknown tags stay out.

markdown(text, known)     Markdown with formulas as MathML; raw HTML is shown as text
sanitized(html)           the tags of tables and of text, without addresses
picture(svg)              a drawing in an <img>, in which a browser runs and fetches nothing
highlighted, plain        code and outputs
"""

import re
from html import escape
from urllib.parse import quote
from xml.etree import ElementTree

import bleach
import mistune
from latex2mathml.converter import convert
from markupsafe import Markup
from nbconvert.filters.markdown_mistune import MathBlockParser, MathInlineParser
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

HTML = "table thead tbody tr th td caption div span p code pre b i em strong sub sup br"
HTML_KEYS = "align scope colspan rowspan class"
MATHML = (
    "math mrow mi mn mo mtext mspace msup msub msubsup mfrac msqrt mroot munder mover munderover "
    "mtable mtr mtd mstyle mpadded mphantom menclose mmultiscripts mprescripts none"
)
MATHML_KEYS = (
    "display mathvariant stretchy width minsize maxsize accent linethickness columnalign fence "
    "form movablelimits notation lspace rspace"
)


def sanitized(html: str, tags: str = HTML, keys: str = HTML_KEYS) -> Markup:
    """HTML with these tags and attributes only, every tag closed; other tags leave their text."""
    html = re.sub(r"(?is)<(script|style)\b.*?</\1\s*>", "", html)
    return Markup(bleach.clean(html, tags=tags.split(), attributes=keys.split(), strip=True))


def scrolled(table: str, label: str = "table") -> Markup:
    """A wide table scrolls by itself, also by keyboard."""
    region = '<div class="scroll" tabindex="0" role="region" aria-label="{}">{}</div>'
    return Markup(region).format(label[:80], Markup(table))


def plain(text: str, kind: str = "output") -> Markup:
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).strip("\n")
    return Markup('<pre class="{}">{}</pre>').format(kind, text) if text else Markup()


def picture(svg: str) -> tuple[Markup, str]:
    """(an <img> that shows the drawing, the drawing's own caption).

    Raises:
        ValueError, ElementTree.ParseError: it is no SVG.
    """
    root = ElementTree.fromstring(svg)
    if root.tag.rpartition("}")[2] != "svg":
        raise ValueError("is not an SVG")
    title, caption = (
        " ".join(root.findtext(f"{{*}}{name}", "").split()) for name in ("title", "desc")
    )
    address = f"data:image/svg+xml,{quote(' '.join(svg.split()), safe=' =:;/,()-')}"
    return Markup('<img alt="{}" src="{}">').format(title or "figure", address), caption


class Renderer(mistune.HTMLRenderer):
    """Links lead to the web and to the notebooks of the index; formulas become MathML."""

    def __init__(self, known: set[str]):
        super().__init__(escape=True)
        self.known = known

    def link(self, text, url, title=None):
        if re.match(r"https?://[^\s\"'<>]+$", url):
            return f'<a href="{escape(url)}" rel="noopener">{text}</a>'
        name = re.fullmatch(r"(?:\./)?(\d\d_\w+)\.ipynb(?:#.*)?", url)
        known = name and name[1] in self.known
        return f'<a href="../index.html#notebook-{name[1]}">{text}</a>' if known else text

    def image(self, text, url, title=None):
        return text

    def block_code(self, code, info=None):
        return highlighted(code, info or "text") + "\n"

    def table(self, text):
        return scrolled(f"<table>\n{text}</table>") + "\n"

    def inline_math(self, text):
        return formula(text, "inline")

    def block_math(self, text):
        return formula(text, "block")


class Inline(MathInlineParser):
    """An inline formula has no space inside its dollars, and no digit after them."""

    SPECIFICATION = MathInlineParser.SPECIFICATION | {
        "inline_math_tex": r"(?<![\\$\w])\$(?P<math_inline_tex>[^\s$]"
        r"(?:(?:[^$\n]|\n(?!\s*\n))*[^\s$\\])?)\$(?![\d\w])"
    }


def markdown(text: str, known: set[str]) -> Markup:
    """Markdown as HTML; `known` are the notebooks that the index has an anchor for."""
    plugins = [mistune.import_plugin(name) for name in ("table", "strikethrough")]
    return Markup(mistune.Markdown(Renderer(known), MathBlockParser(), Inline(), plugins)(text))


def formula(latex: str, display: str) -> Markup:
    """LaTeX as MathML; what cannot be converted is shown as it was typed."""
    try:
        mathml = convert(latex.strip(), display=display)
        ElementTree.fromstring(mathml)
    except Exception:  # the converter raises a dozen kinds
        mathml = "\\"
    if "\\" in mathml:  # an unknown command
        return Markup("<code>{}</code>").format(" ".join(latex.split()))
    return sanitized(mathml, MATHML, MATHML_KEYS)


def highlighted(code: str, language: str = "python") -> Markup:
    try:
        lexer = get_lexer_by_name(language.split()[0], stripnl=True)
    except (ClassNotFound, IndexError):
        lexer = get_lexer_by_name("text")
    html = highlight(code, lexer, HtmlFormatter(nowrap=True)).rstrip()
    return Markup(f'<pre class="code"><code>{html}</code></pre>' if code.strip() else "")


def code_css() -> str:
    """Colours of code, by day and by night."""

    def colours(style: str) -> str:
        lines = HtmlFormatter(style=style).get_style_defs("pre.code").split("\n")
        return "\n".join(line for line in lines if re.match(r"pre\.code \.\w+ ", line))

    dark = f"@media screen and (prefers-color-scheme: dark) {{\n{colours('github-dark')}\n}}"
    return f"{colours('xcode')}\n{dark}\n"
