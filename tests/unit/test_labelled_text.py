"""What a submodel that reads context learns of each piece."""

import numpy as np
import pytest

from sparselt_dist.data.agreement_sentences import read_strictly
from sparselt_dist.data.agreements import Agreement, Chunk
from sparselt_dist.data.labelled_text import bucket, join_text, label_sentence

SENTENCE = next(read_strictly(["The two old dogs were chasing a small cat in the garden."]))[0]


def label(words: list[int]) -> dict[str, list[int]]:
    """Labels of E1's pieces; ids are their places."""
    arrays = label_sentence(range(len(words)), words, SENTENCE.chunks, SENTENCE.agreements, 100)
    return {name: array.tolist() for name, array in arrays.items()}


def test_each_word_has_its_roles() -> None:
    found = label(list(range(13)))
    assert np.flatnonzero(found["begins"]).tolist() == [0, 4, 6, 9, 10, 12]
    # chunks: The two old dogs | were chasing | a small cat | in | the garden | .
    assert found["roles_A1"] == [2, 2, 2, 2, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert found["distances_A1"] == [5] * 4 + [4] * 2 + [0] * 7
    assert found["roles_A2"] == [0] * 4 + [1, 1, 2, 2, 2] + [0] * 4
    assert found["distances_A2"] == [0] * 4 + [5] * 2 + [4] * 3 + [0] * 4
    assert found["roles_A3"] == [2, 2, 2, 1, 0, 0, 2, 2, 1, 0, 2, 1, 0]
    # in words; of a noun's modifiers the first counts
    assert found["distances_A3"] == [7, 6, 5, 2, 0, 0, 6, 5, 3, 0, 5, 4, 0]
    assert found["roles_A4"] == [0] * 4 + [1, 1] + [0] * 3 + [2, 2, 2, 0]
    assert found["distances_A4"] == [0] * 4 + [7, 7] + [0] * 3 + [3, 2, 2, 0]


def test_pieces_share_their_words_labels_and_pieces_of_no_word_have_none() -> None:
    found = label([3, 3, -1, 4, 5, 5])
    assert found["begins"] == [True, False, False, True, False, False]
    assert found["roles_A1"] == [2, 2, 0, 1, 1, 1]
    assert found["distances_A1"] == [5, 5, 0, 4, 4, 4]
    assert found["ends"] == [6]


def test_of_two_pairs_the_first_has_a_word_and_a_gap_begins_a_chunk_anew() -> None:
    chunks = [Chunk("VG", (0, 2), 2), Chunk("NP", (1,), 1), Chunk("NP", (3,), 3)]
    pairs = [Agreement("A1", "nsubj", (0, 2), 2, (1,), 1), Agreement("A1", "expl", (1,), 1, (3,), 3)]
    found = label_sentence([7, 8, 9, 7], [0, 1, 2, 3], chunks, pairs, 2**17)
    assert found["begins"].tolist() == [True] * 4
    assert found["roles_A1"].tolist() == [1, 2, 1, 2]
    assert found["distances_A1"].tolist() == [5, 4, 5, 4]
    assert found["ids"].dtype == np.uint32


@pytest.mark.parametrize(("distance", "expected"), [(-5, 9), (-4, 1), (-1, 4), (0, 0), (1, 5), (4, 8), (5, 9)])
def test_distances_have_nine_buckets(distance: int, expected: int) -> None:
    assert bucket(distance) == expected


def test_joined_text_ends_with_a_sentence() -> None:
    sentence = label_sentence(range(13), list(range(13)), SENTENCE.chunks, SENTENCE.agreements, 100)
    joined = join_text([join_text([sentence] * 2, 100, 1000), sentence, sentence], 100, 40)
    assert joined["ends"].tolist() == [13, 26, 39]
    assert all(len(array) == 39 for name, array in joined.items() if name != "ends")
    assert joined["roles_A4"].tolist() == 3 * sentence["roles_A4"].tolist()
    empty = join_text([], 100, 40)
    assert {name: array.dtype for name, array in empty.items()} == {name: array.dtype for name, array in joined.items()}
    assert not any(map(len, empty.values()))
