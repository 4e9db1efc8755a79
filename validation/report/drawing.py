"""What a panel may draw: known SVG shapes and nothing that runs, loads or lies over the page.

Drawings come with measurements, measurements come from files, and files can be edited: so a drawing is parsed
and written anew from an allowed set of elements and attributes, whoever made it. What `plots.py` and
matplotlib draw passes unchanged in looks.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator

from markupsafe import Markup, escape

MOST_CHARACTERS = 200_000
"""Longest drawing that a page carries; a scatter of thousands of points is better shown as its quantiles."""

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "{http://www.w3.org/1999/xlink}href"
_CONTAINERS = {"svg", "g", "defs", "clipPath"}
_SHAPES = {"line", "rect", "circle", "ellipse", "path", "polyline", "polygon", "use"}
_WORDS = {"text", "tspan", "title", "desc"}
_GRID = {"plot", "plot heat", "head", "label", "label over", "value"}
"""Classes of the `div`s that plots of the page are laid out with; no other class is let through."""
_PLAIN = set(
    "x y x1 x2 y1 y2 cx cy r rx ry dx dy width height d points transform viewBox preserveAspectRatio "
    "fill-opacity fill-rule clip-rule stroke-width stroke-opacity stroke-dasharray stroke-dashoffset "
    "stroke-linecap stroke-linejoin stroke-miterlimit opacity text-anchor dominant-baseline font-size "
    "font-weight font-style font-family fill stroke clip-path clipPathUnits id class role aria-label "
    "aria-hidden".split()
)
_STYLED = set(
    "fill fill-opacity fill-rule stroke stroke-width stroke-opacity stroke-dasharray stroke-dashoffset "
    "stroke-linecap stroke-linejoin stroke-miterlimit opacity font font-size font-family font-weight "
    "font-style text-anchor".split()
)
_VALUE = re.compile(r"""(?:[\w\s.,%#+'"-]|rgba?\([\d\s.,%]+\)|url\(#[\w-]+\))*""")
_DOCTYPE = re.compile(r"<!DOCTYPE[^\[>]*>")


def clean_svg(text: str) -> Markup | None:
    """The drawing as markup that may stand in a page; None if it is not XML, too long, or draws nothing."""
    if len(text) > MOST_CHARACTERS or "<!ENTITY" in text:
        return None
    try:
        # Namespaces that are not declared would be an error, and inline SVG in a page declares none.
        root = ET.fromstring(_DOCTYPE.sub("", text, count=1))
    except (ET.ParseError, ValueError):
        return None
    written = "".join(_written(root))
    return Markup(written) if "<svg" in written else None  # noqa: S704: written by `_written` alone


def _written(element: ET.Element) -> Iterator[str]:
    name = _name(element.tag)
    attributes = dict(_attributes(element))
    grid = name == "div" and attributes.get("class", "head") in _GRID
    if not (grid or name in _CONTAINERS or name in _SHAPES or name in _WORDS):
        return
    if grid:
        attributes = {k: v for k, v in attributes.items() if k in ("class", "role", "aria-label")}
    yield f"<{name}" + "".join(f' {key}="{escape(value)}"' for key, value in attributes.items())
    if name in _SHAPES:
        yield "/>"
        return
    yield ">"
    if grid or name in _WORDS:
        yield str(escape(element.text or ""))
    for child in element:
        if name not in ("title", "desc"):
            yield from _written(child)
        if grid or name in _WORDS:
            yield str(escape(child.tail or ""))
    yield f"</{name}>"


def _name(tag: object) -> str:
    """The local name of an SVG element, or of one without a namespace; "" for all others."""
    if not isinstance(tag, str):
        return ""  # a comment or a processing instruction
    space, _, name = tag.rpartition("}")
    return name if space in ("", "{" + _SVG) else ""


def _attributes(element: ET.Element) -> Iterator[tuple[str, str]]:
    for key, value in element.attrib.items():
        if key in ("href", _XLINK):
            if re.fullmatch(r"#[\w-]+", value):
                yield "href", value
        elif key == "style":
            if kept := _style(value):
                yield "style", kept
        elif key in ("aria-label", "d", "points", "transform") or (
            key in _PLAIN and _VALUE.fullmatch(value)
        ):
            yield key, value


def _style(text: str) -> str:
    pairs = (declaration.partition(":") for declaration in text.split(";"))
    kept = [
        f"{name.strip()}: {value.strip()}"
        for name, _, value in pairs
        if name.strip() in _STYLED and _VALUE.fullmatch(value)
    ]
    return "; ".join(kept)
