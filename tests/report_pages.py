"""Pages of reports, read as a browser would."""

from __future__ import annotations

import base64
import gzip
import html.parser
import json
from pathlib import Path
from typing import Any

LINKS = ("src", "href", "xlink:href", "data", "srcset", "poster", "action", "formaction", "background", "ping", "cite")


class Page(html.parser.HTMLParser):
    """What a page holds.

    Attributes:
        text: the page.
        tags: names of its elements, in their order.
        attributes: of all elements, each with the element's name.
        loads: addresses that it would load or go to, but for places in the page and pictures that it holds itself.
        scripts: attributes and text of each script.
        styles: the text of its style sheets.
        policy: its content security policy.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.styles = self.policy = self._inside = ""
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = dict(attrs)["content"] or ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = attributes, text + data
        elif self._inside == "style":
            self.styles += data

    @property
    def loads(self) -> list[str]:
        links = [value for _, name, value in self.attributes if name in LINKS]
        return [link for link in links if link and not link.startswith(("#", "data:image/png;base64,"))]

    @property
    def data(self) -> dict[str, Any]:
        """What its script draws from."""
        [text] = [text for attributes, text in self.scripts if attributes.get("id") == "data"]
        unpacked: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(text, validate=True)))
        return unpacked
