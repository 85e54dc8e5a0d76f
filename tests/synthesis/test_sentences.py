"""Selection of sentences from text files, and the examples of WordNet."""

import pytest

from fastslm_jax.errors import UserError
from fastslm_jax.synthesis import sentences, texts


def test_lines_are_selected_and_what_is_dropped_is_counted(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(
        "\ufeffThe  cat\tsat.\r\n\nThe cat sat.\n-no!\n...\nbell \a rings\n"
        + "word " * 90
        + "\nécole 7\n",
        encoding="utf-8",
    )
    kept, dropped = sentences.read([path])
    assert kept == ["The cat sat.", "-no!", "école 7"]
    assert dropped == {
        "duplicates": 1,
        "no words": 1,
        "control characters": 1,
        "more than 400 characters": 1,
    }


def test_sentences_of_other_texts_are_excluded():
    """Equal ones, and those that share four words in a row; case and punctuation do not matter."""
    lines = ["Hang up now", "hang up, now please", "you may hang up now, sir", "thank you"]
    kept, dropped = sentences.select(
        [*lines, "May I hang up now?"], ["HANG UP NOW!", "may hang up now"]
    )
    assert kept == ["hang up, now please", "thank you", "May I hang up now?"]
    assert dropped == {"equal to an excluded text": 1, "4 words of an excluded text": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "a.txt: no such file of sentences"),
        (b"\n \n", "a.txt: contains no sentences"),
        (b"caf\xe9", "a.txt: is not UTF-8 text"),
        (b"...\n!!", "a.txt: no sentence is left .2 no words."),
    ],
)
def test_unusable_files(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        sentences.read([tmp_path / "a.txt"])


def test_definitions_of_wordnet():
    gloss = ' (of time) a month; a part  of a year; "last month"; "cut - A. Smith'
    assert [texts.clean(part) for part in texts.definitions(gloss)][:2] == [
        "a month",
        "a part of a year",
    ]
    assert texts.definitions('a bird; "it sings"- John Keats') == ["a bird"]


def test_examples_of_wordnet(tmp_path):
    """Quotations after the bar; the license at the start of a file is indented."""
    for part in texts.PARTS:
        (tmp_path / part).write_text('  1 This is a | license; "of many words here"\n')
    (tmp_path / "data.verb").write_text(
        '00001740 29 v 04 breathe 0 | draw air; "I can  breathe better ; now"; "He inhaled"\n'
        '00002325 29 v 01 respire 0 | "he inhaled"; "FBI agents came"; "in 1999 it rained"\n'
    )
    assert list(texts.wordnet(tmp_path)) == ["I can breathe better; now", "He inhaled"]
    assert list(texts.wordnet(tmp_path, "definitions")) == ["draw air"]
    (tmp_path / "data.noun").unlink()
    with pytest.raises(UserError, match=r"data\.noun: no such file; give the folder of WordNet's"):
        list(texts.wordnet(tmp_path))
