from mptbook.data.languages import _unescape, samples


def test_there_are_hundreds_of_languages_with_text_of_their_own():
    found = samples()
    assert len(found) > 700
    assert len({sample.text for sample in found.values()}) > 700
    assert all(len(sample.text) > 200 for sample in found.values())


def test_a_text_is_the_declaration_and_its_newlines_are_newlines():
    english = samples()["en_Latn"]
    assert english.language == "English"
    assert "No one shall be held in slavery" in english.text
    assert "\\n" not in english.text
    assert english.text.count("\n") == 8  # 5 passages, of which two have three lines


def test_backslashes_of_the_file_are_undone():
    assert _unescape(r"a\nb \"c\" d\'e \\n") == 'a\nb "c" d\'e \\n'
