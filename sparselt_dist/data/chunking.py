"""Chunks and dependency agreements from words alone: the strict track of the DAC objective.

Rules over closed-class lists, endings and word order, no learned model and no parser, so that extraction stays within
cramming's rules (Geiping & Goldstein 2022, arXiv 2212.14034, section 3), which count every learned part. Chunks and agreements
have the form that `data/agreements.py` gives the parser track, so both tracks can be compared pair by pair.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparselt_dist.data import english_words as english
from sparselt_dist.data.agreements import Agreement, AgreementPair, Chunk, in_words
from sparselt_dist.data.chunk_agreements import agree
from sparselt_dist.data.strict_tagging import tag_words

_NOUN_PHRASE = "DGJ#N"


def extract_pairs_strictly(words: Sequence[str]) -> list[AgreementPair]:
    """The agreements of one sentence given as words and punctuation marks, each pair once."""
    return in_words(list(words), find_agreements_strictly(words))


def find_agreements_strictly(words: Sequence[str]) -> list[Agreement]:
    """The agreements of one sentence by family, then by the dependent's position."""
    lower = [word.lower().replace("’", "'") for word in words]
    tags = tag_words(words)
    return agree(lower, tags, chunk_tags(lower, tags))


def find_chunks_strictly(words: Sequence[str]) -> list[Chunk]:
    """The chunks of one sentence in order; each word is in exactly one."""
    lower = [word.lower().replace("’", "'") for word in words]
    return chunk_tags(lower, tag_words(words))


def chunk_tags(lower: Sequence[str], tags: str) -> list[Chunk]:
    """Chunks from lower-case words and their tags."""
    chunks: list[Chunk] = []
    start = 0
    while start < len(tags):
        chunk = _verb_group(lower, tags, start) or _noun_phrase(lower, tags, start) or _rest(tags, start)
        chunks.append(chunk)
        start = chunk.words[-1] + 1
    return _join_questions(tags, chunks)


def _verb_group(lower: Sequence[str], tags: str, start: int) -> Chunk | None:
    """Auxiliaries, adverbs between them, one lexical verb and its particle."""
    if tags[start] not in "TMXVEI!":
        return None
    words, root, at = [], -1, start
    while at < len(tags):
        if tags[at] in "TMX!":
            if tags[at] in "TM" and root >= 0:
                break
            words.append(at)
            root = at if tags[at] == "X" else root
        elif tags[at] in "VEI":
            words, root = [*words, at], at
            break
        elif tags[at] != "R" or not _verb_follows(tags, at):
            break
        else:
            words.append(at)
        at += 1
    if root < 0:
        root = words[0]
    after = words[-1] + 1
    if tags[root] in "VEI" and tags[after : after + 1] == "R" and lower[after] in english.PARTICLES:
        words.append(after)
    return Chunk("VG", tuple(words), root)


def _verb_follows(tags: str, at: int) -> bool:
    while at < len(tags) and tags[at] in "R!":
        at += 1
    return at < len(tags) and tags[at] in "MXVEI"


def _noun_phrase(lower: Sequence[str], tags: str, start: int) -> Chunk | None:
    """A pronoun, or determiners, adjectives, numbers and nouns up to the last noun."""
    if tags[start] == "Q" or (tags[start] == "W" and lower[start] in english.PRONOUNS):
        return Chunk("NP", (start,), start)
    end = _noun_phrase_end(lower, tags, start)
    if end is None:
        return None
    return Chunk("NP", tuple(range(start, end + 1)), end)


def _noun_phrase_end(lower: Sequence[str], tags: str, start: int) -> int | None:
    """The head's position, None if no noun phrase begins here."""
    at, head, determined = start, None, False
    while at < len(tags):
        tag, after = tags[at], tags[at + 1 : at + 2]
        if tag in "DG":
            if head is not None or (at > start and tags[at - 1] not in "D"):
                break
            determined, head = True, None
        elif tag in "N#":
            head = at
        elif tag == "'":
            if head is None or not after or after not in _NOUN_PHRASE:
                return head
            head = None
        elif tag == "J":
            if head is not None and tags[head] == "N" and not (lower[at] == "old" and after == "N"):
                break
        elif tag == "R":
            if (
                after not in ("J", "#")
                or (head is not None)
                or (at == start and not _noun_after_adjectives(tags, at + 1))
            ):
                break
        elif lower[at] == "-" and at > start and after and after in "NJEI" and tags[at - 1] in "NJ#":
            head = None
        elif tag in "EI" and lower[at - 1] == "-" and at > start:
            head = at
        elif not (tag in "C." and lower[at] in ("and", "or", ",", "but") and _joins_adjectives(tags, at)):
            break
        at += 1
    if head is None and determined:
        return _last_of(tags, start, at)
    return head if head is None or tags[start] != "'" else None


def _joins_adjectives(tags: str, at: int) -> bool:
    return tags[at - 1 : at] == "J" and tags[at + 1 : at + 2] == "J" and _noun_after_adjectives(tags, at + 1)


def _noun_after_adjectives(tags: str, at: int) -> bool:
    while at < len(tags) and tags[at] in "JR#":
        at += 1
    return tags[at : at + 1] == "N"


def _last_of(tags: str, start: int, end: int) -> int:
    """The head of a phrase without noun ("the poor", "this"): its last adjective, number or determiner."""
    return max(at for at in range(start, end) if tags[at] in "DGJ#")


def _rest(tags: str, start: int) -> Chunk:
    """An adjective with its adverbs, a preposition, or another word alone."""
    end = start
    while tags[end : end + 1] == "R" and tags[end + 1 : end + 2] in ("R", "J"):
        end += 1
    if tags[end] == "J" or (tags[start] == "R"):
        return Chunk("AP", tuple(range(start, end + 1)), end)
    return Chunk("P" if tags[start] == "P" else "O", (start,), start)


def _join_questions(tags: str, chunks: list[Chunk]) -> list[Chunk]:
    """Put an auxiliary before its subject into the verb's group ("does he know")."""
    joined = list(chunks)
    for at in range(len(chunks) - 2):
        end = at + 2
        while end < len(chunks) - 1 and joined[end].type == "AP" and tags[joined[end].root] in "R":
            end += 1
        first, subject, verb = joined[at], joined[at + 1], joined[end]
        inverted = first.type == verb.type == "VG" and subject.type == "NP" and tags[first.root] in "MX"
        opens = at == 0 or joined[at - 1].type == "O" or tags[joined[at - 1].root] == "W"
        if inverted and opens and tags[verb.words[0]] in "VEIX" and tags[first.words[-1]] in "MX!":
            joined[end] = Chunk("VG", first.words + verb.words, verb.root)
            joined[at] = Chunk("VG", (), -1)
    return [chunk for chunk in joined if chunk.words]
