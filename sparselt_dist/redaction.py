"""Addresses as messages, records and process lists may show them: without passwords, tokens and signatures.

An HTTP address loses its user and its query, a data base's its password and the secret keys of its query. On S3 every
character belongs to the key, and credentials never stand in the address. Nothing here connects to anything.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

# What ends a sentence is no part of an address.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]*[^\s'\"<>.,:;)\]]")
_SECRET_KEY = re.compile(r"pass|pwd|secret|token|key|sig|credential", re.IGNORECASE)


def shown(address: str) -> str:
    """One address without what may be secret in it; what is no address stays as it is."""
    scheme, mark, rest = address.partition("://")
    if not mark or scheme == "s3":
        return address
    try:
        parts = urlsplit(address)
    except ValueError:  # no address that anything could connect to
        return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"
    user, at, host = parts.netloc.rpartition("@")
    if scheme in ("http", "https"):
        return urlunsplit((parts.scheme, host, parts.path, "", ""))
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    public = [(key, value) for key, value in pairs if not _SECRET_KEY.search(key)]
    netloc = f"{user.partition(':')[0]}{at}{host}"
    if netloc == parts.netloc and len(public) == len(pairs):
        return address
    return urlunsplit(parts._replace(netloc=netloc, query=urlencode(public, safe="/:")))


def scrubbed(text: str) -> str:
    """Any text, the addresses in it as `shown` shows them."""
    return _ADDRESS.sub(lambda found: shown(found[0]), text) if "://" in text else text


def shown_in(tree: Any) -> Any:
    """Mappings and lists of plain values, the addresses among them as `shown` shows them."""
    if isinstance(tree, dict):
        return {key: shown_in(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [shown_in(value) for value in tree]
    if not isinstance(tree, str):
        return tree
    return shown(tree) if len(tree.split()) == 1 else scrubbed(tree)
