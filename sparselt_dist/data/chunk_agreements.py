"""Agreement rules over a sequence of chunks, for the strict track: who agrees with whom by order and word lists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sparselt_dist.data import english_words as english
from sparselt_dist.data.agreements import Agreement, Chunk, Family

_LABEL_OF_TAG = {"D": "det", "G": "poss", "J": "amod", "#": "nummod", "N": "compound"}


def agree(lower: Sequence[str], tags: str, chunks: Sequence[Chunk]) -> list[Agreement]:
    """The agreements of a chunked sentence by family, then by the dependent's position."""
    rules = _Rules(lower, tags, chunks)
    found = [*rules.subjects(), *rules.complements(), *rules.noun_internal(), *rules.prepositional()]
    return sorted(dict.fromkeys(found), key=lambda a: (a.family, a.dependent_root, a.head_root))


class _Rules:
    def __init__(self, lower: Sequence[str], tags: str, chunks: Sequence[Chunk]) -> None:
        self.lower, self.tags, self.chunks = lower, tags, chunks
        self.subject_of = {at: self._find_subject(at) for at in range(len(chunks)) if self._is_finite(at)}

    # --- looking at chunks -------------------------------------------------------------------------------------------

    def _kind(self, at: int) -> str:
        """The type of a chunk, "" beyond the ends."""
        return self.chunks[at].type if 0 <= at < len(self.chunks) else ""

    def _word(self, at: int) -> str:
        """The root word of a chunk, "" beyond the ends."""
        return self.lower[self.chunks[at].root] if 0 <= at < len(self.chunks) else ""

    def _tag(self, at: int) -> str:
        return self.tags[self.chunks[at].root] if 0 <= at < len(self.chunks) else ""

    def _opening_tag(self, at: int) -> str:
        return self.tags[self.chunks[at].words[0]]

    def _opening_tag_is(self, at: int, tag: str) -> bool:
        return 0 <= at < len(self.chunks) and self._opening_tag(at) == tag

    def _is_adverb(self, at: int) -> bool:
        return self._kind(at) == "AP" and self._tag(at) == "R"

    def _is_infinitive(self, at: int) -> bool:
        return self._kind(at) == "VG" and self._opening_tag(at) == "T"

    def _is_gerund(self, at: int) -> bool:
        return self._kind(at) == "VG" and self._opening_tag(at) == "I"

    def _is_finite(self, at: int) -> bool:
        if self._kind(at) != "VG" or self._opening_tag(at) in "TI":
            return False
        # "known", "done": never finite without an auxiliary
        return self._opening_tag(at) != "E" or "past" in english.forms_of(self._word(at))

    def _is_copula(self, at: int) -> bool:
        return self._kind(at) == "VG" and self._tag(at) == "X" and self._word(at) in english.BE

    def _is_passive(self, at: int) -> bool:
        chunk = self.chunks[at]
        auxiliaries = [word for word in chunk.words if self.tags[word] == "X"]
        return self._tag(at) == "E" and bool(auxiliaries) and self.lower[auxiliaries[-1]] in english.BE

    def _takes(self, at: int, verbs: frozenset[str]) -> bool:
        return bool(english.bases_of(self._word(at)) & verbs)

    def _after_adverbs(self, at: int) -> int:
        at += 1
        while self._is_adverb(at):
            at += 1
        return at

    def _pair(self, family: Family, label: str, head: int, dependent: int) -> Agreement:
        first, second = self.chunks[head], self.chunks[dependent]
        return Agreement(family, label, first.words, first.root, second.words, second.root)

    # --- A1 ----------------------------------------------------------------------------------------------------------

    def subjects(self) -> Iterator[Agreement]:
        for verb, subject in self.subject_of.items():
            if subject is not None:
                yield self._pair("A1", "nsubj", verb, subject)
            if subject is not None and self._word(subject) == "there" and self._kind(verb + 1) == "NP":
                yield self._pair("A1", "nsubj", verb, verb + 1)  # the verb agrees with what there is

    def _find_subject(self, verb: int) -> int | None:
        """The noun phrase left of a verb group, past adverbs and prepositional phrases."""
        inside = self._inverted_subject(verb)
        if inside is not None:
            return inside
        if self._is_reduced_relative(verb):
            return None
        at = verb - 1
        while True:
            while self._is_adverb(at) or self._is_reduced_relative(at):
                at -= 1
            if self._kind(at) != "NP":
                return None
            if self._kind(at - 1) != "P":
                break
            at -= 2
            while self._kind(at) == "P":
                at -= 1
        return self._first_conjunct(at) if self._may_be_subject(at, verb) else None

    def _is_reduced_relative(self, at: int) -> bool:
        """Whether a bare participle only describes the noun before it: the clause's verb is still to come."""
        if self._kind(at) != "VG" or self._opening_tag(at) != "E" or self._kind(at - 1) != "NP":
            return False
        at += 1
        while self._is_adverb(at) or (self._kind(at) == "P" and self._kind(at + 1) == "NP"):
            at += 1 if self._is_adverb(at) else 2
        return self._kind(at) == "VG" and self._opening_tag(at) in "XMV"

    def _inverted_subject(self, verb: int) -> int | None:
        """The noun phrase between the auxiliary and the verb of a question, or after a copula that opens one."""
        words = self.chunks[verb].words
        for at in range(len(self.chunks)):
            if self._kind(at) == "NP" and words[0] < self.chunks[at].root < words[-1]:
                return at
        opens = verb == 0 or (self._tag(verb - 1) == "W" and self._word(verb - 1) in english.WH_ADVERBS)
        return verb + 1 if opens and self._is_copula(verb) and self._kind(verb + 1) == "NP" else None

    def _may_be_subject(self, at: int, verb: int) -> bool:
        word = self._word(at)
        if word in english.OBJECT_PRONOUNS:
            return False
        after_verb = self._kind(at - 1) == "VG"
        bare_participle = self._opening_tag(verb) == "E"
        if after_verb and word not in english.SUBJECT_PRONOUNS:
            return not bare_participle and self._takes(at - 1, english.TAKE_CLAUSE)
        return True

    def _first_conjunct(self, at: int) -> int:
        while (
            self._tag(at - 1) == "C"
            and self._word(at) not in english.SUBJECT_PRONOUNS - {"i"}
            and self._kind(at - 2) == "NP"
            and self._kind(at - 3) not in ("P", "VG")
        ):
            at -= 2
        return at

    # --- A2 ----------------------------------------------------------------------------------------------------------

    def complements(self) -> Iterator[Agreement]:
        for at in range(len(self.chunks)):
            if self._kind(at) == "VG":
                yield from self._complements_of(at)
            elif self._kind(at) == "AP" and self._tag(at) == "J" and self._is_infinitive(at + 1):
                yield self._pair("A2", "xcomp", at, at + 1)
            if self._tag(at) == "W":
                yield from self._fronted_object(at)

    def _complements_of(self, verb: int) -> Iterator[Agreement]:
        after = self._after_adverbs(verb)
        if self._tag(verb) not in "XVEI":
            return
        if self._is_infinitive(after) or (self._is_gerund(after) and self._takes(verb, english.TAKE_GERUND)):
            yield self._pair("A2", "xcomp", verb, after)
        elif self._kind(after) == "AP" and (self._is_copula(verb) or self._takes(verb, english.TAKE_ADJECTIVE)):
            yield self._pair("A2", "acomp", verb, after)
        elif self._kind(after) == "NP" and after not in self.subject_of.values() and self._may_govern(verb, after):
            yield from self._objects(verb, after)
        clause = self._clause_verb(verb, after)
        if clause is not None:
            yield self._pair("A2", "ccomp", verb, clause)

    def _objects(self, verb: int, first: int) -> Iterator[Agreement]:
        if self._is_copula(verb):
            yield self._pair("A2", "attr", verb, first)
            return
        if self._is_passive(verb) or self._is_time(first):
            return
        second = first + 1
        gives = self._takes(verb, english.DITRANSITIVES) and self._kind(second) == "NP"
        if gives and second not in self.subject_of.values() and not self._is_time(second):
            yield self._pair("A2", "dative", verb, first)
            first = second
        yield self._pair("A2", "dobj", verb, first)
        infinitive = self._is_infinitive(first + 1) and self._takes(verb, english.TAKE_INFINITIVE)
        bare = self._opening_tag_is(first + 1, "V") and self._takes(verb, english.CAUSATIVES)
        if infinitive or bare:
            yield self._pair("A2", "xcomp", verb, first + 1)

    def _may_govern(self, verb: int, object_: int) -> bool:
        """Whether a noun phrase after a verb group can be its object."""
        if self._tag(object_) == "W" or self._word(self._previous(verb)) == "there":
            return False
        bare_participle = self._opening_tag(verb) == "E" and self.subject_of.get(verb) is None
        return not bare_participle or self._tag(verb - 1) == "C" or verb == 0

    def _previous(self, at: int) -> int:
        at -= 1
        while self._is_adverb(at):
            at -= 1
        return at

    def _is_time(self, at: int) -> bool:
        """A time that needs no preposition: "today", "last week", "two years"."""
        if self._word(at) not in english.TIME_NOUNS:
            return False
        first = self.chunks[at].words[0]
        bare = self._word(at) in english.BARE_TIMES
        return bare or self.lower[first] in english.TIME_DETERMINERS or self.tags[first] == "#"

    def _clause_verb(self, verb: int, after: int) -> int | None:
        """The verb of the clause that a verb of saying or thinking takes."""
        if not self._takes(verb, english.TAKE_CLAUSE) or self._is_passive(verb):
            return None
        opens = self._tag(after) == "W" or (self._kind(after) == "O" and self._word(after) in ("that", "if", "whether"))
        start = after + 1 if opens and self._word(after) not in english.PRONOUNS - {"that"} else after
        for at in range(start, min(start + 6, len(self.chunks))):
            if self.subject_of.get(at) is not None and start <= (self.subject_of[at] or 0):
                return at
            if self._kind(at) == "O" or (self._kind(at) == "VG" and at != verb):
                return None
        return None

    def _fronted_object(self, at: int) -> Iterator[Agreement]:
        """What a relative or question word stands for, where a subject follows it ("the dogs that I saw")."""
        if self._kind(at) != "NP" or self._kind(at + 1) not in ("NP", "VG"):
            return
        for verb in (at + 2, at + 1):
            subject = self.subject_of.get(verb)
            if subject is not None and subject > at and self._tag(verb) != "X" and self._kind(verb + 1) != "NP":
                yield self._pair("A2", "dobj", verb, at)
                return

    # --- A3 ----------------------------------------------------------------------------------------------------------

    def noun_internal(self) -> Iterator[Agreement]:
        for chunk in self.chunks:
            if chunk.type == "NP":
                yield from self._modifiers(chunk)

    def _modifiers(self, chunk: Chunk) -> Iterator[Agreement]:
        """Each determiner, adjective, number and noun with the noun that it precedes; a possessor with the possessed."""
        head = chunk.root
        for word in reversed(chunk.words[: chunk.words.index(chunk.root)]):
            tag = self.tags[word]
            if tag == "'":
                yield Agreement("A3", "poss", (head,), head, (word - 1,), word - 1)
                head = word - 1
            elif word != head and tag in _LABEL_OF_TAG and self.tags[word - 1 : word] not in ("C", "."):
                yield Agreement("A3", _LABEL_OF_TAG[tag], (head,), head, (word,), word)

    # --- A4 ----------------------------------------------------------------------------------------------------------

    def prepositional(self) -> Iterator[Agreement]:
        for at in range(len(self.chunks)):
            if self._kind(at) != "P" or self._kind(at - 1) == "P":
                continue
            end = at + 1
            while self._kind(end) == "P":
                end += 1
            governor = self._governor(at)
            if governor is not None and (self._kind(end) == "NP" or self._is_gerund(end)):
                yield self._with_preposition(governor, range(at, end), end)
        yield from self._bare_times()

    def _with_preposition(self, governor: int, prepositions: range, object_: int) -> Agreement:
        chain = tuple(self.chunks[at].root for at in prepositions)
        label = "prep:" + "_".join(self.lower[word] for word in chain)
        head, dependent = self.chunks[governor], self.chunks[object_]
        return Agreement("A4", label, head.words, head.root, (*chain, *dependent.words), dependent.root)

    def _governor(self, preposition: int) -> int | None:
        """The verb group, noun or adjective phrase on the left that a prepositional phrase belongs to."""
        at = preposition - 1
        while self._is_adverb(at):
            at -= 1
        if self._kind(at) in ("VG", "AP"):
            return at
        if self._kind(at) != "NP":
            return self._next_verb(preposition)
        verb = at - 1
        takes_it = self._kind(verb) == "VG" and not self._is_copula(verb) and self._word(verb) not in english.HAVE
        if self._word(preposition) in english.NOUN_PREPOSITIONS and self._tag(at) != "Q":
            return at
        return verb if takes_it else at

    def _verb_before(self, at: int) -> int | None:
        """The verb group before a run of noun phrases and prepositional phrases."""
        while self._kind(at) in ("NP", "P") or self._is_adverb(at):
            at -= 1
        return at if self._kind(at) == "VG" else None

    def _next_verb(self, preposition: int) -> int | None:
        """For a phrase that opens a clause: the verb of that clause."""
        following = [verb for verb, subject in self.subject_of.items() if subject is not None and subject > preposition]
        return following[0] if following and following[0] - preposition <= 6 else None

    def _bare_times(self) -> Iterator[Agreement]:
        """Times without preposition, with the verb before them ("left last week")."""
        for at in range(1, len(self.chunks)):
            if self._kind(at) == "NP" and self._is_time(at) and self._kind(at - 1) in ("VG", "NP"):
                verb = at - 1 if self._kind(at - 1) == "VG" else self._verb_before(at - 1)
                if verb is not None and not self._is_copula(verb) and at not in self.subject_of.values():
                    yield self._pair("A4", "npadvmod", verb, at)
