"""Put pictures that are drawn in the page's colour into the page, where they turn dark with it."""

from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform

#: matplotlib's.
_EVERYWHERE = '<style type="text/css">*{stroke-linejoin: round; stroke-linecap: butt}</style>'


class InlineSvg(SphinxPostTransform):
    """Replace local images in ``currentColor`` by their SVG."""

    default_priority = 300  # after the images' places are known
    formats = ("html",)

    def run(self, **_: Any) -> None:
        for node in list(self.document.findall(nodes.image)):
            path = Path(self.env.srcdir, node["uri"])
            if path.suffix != ".svg" or not path.is_file():
                continue
            svg = path.read_text(encoding="utf-8")
            if "currentColor" not in svg:
                continue
            alt = escape(" ".join(node.get("alt", "").split()))
            # What a style says of everything would hold for the whole page; the root's attributes are inherited.
            svg = svg[svg.index("<svg") :].replace(_EVERYWHERE, "")
            svg = svg.replace("<svg", f'<svg role="img" aria-label="{alt}" stroke-linejoin="round"', 1)
            # Markdown has pictures in paragraphs, which HTML does not let hold a block.
            is_inline = isinstance(node.parent, nodes.TextElement)
            alone = is_inline and len(node.parent) == 1
            block = svg if is_inline and not alone else f'<div class="figure">{svg}</div>'
            (node.parent if alone else node).replace_self(nodes.raw("", block, format="html"))


def setup(app: Any) -> dict[str, bool]:
    app.add_post_transform(InlineSvg)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
