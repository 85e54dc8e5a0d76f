"""Wrong words by frequency: the alignment and the groups."""

import word_frequency


def test_each_word_of_the_reference_is_right_or_wrong():
    found, inserted = word_frequency.alignment("a b c d", "a x c e e")
    assert found == [("a", False), ("b", True), ("c", False), ("d", True)]
    assert inserted == 1


def test_missing_words_are_wrong():
    assert word_frequency.alignment("a b", "b") == ([("a", True), ("b", False)], 0)


def test_without_a_reference_all_words_are_inserted():
    assert word_frequency.alignment("", "a b") == ([], 2)


def test_groups_begin_at_their_first_count():
    names = {count: word_frequency.name(word_frequency.group(count)) for count in (0, 2, 29, 5000)}
    assert names == {0: "0", 2: "1 to 2", 29: "10 to 29", 5000: "from 1000"}
