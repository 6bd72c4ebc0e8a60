"""The prose of the project keeps the rules that `programs/prose.py` measures, which finds what it should."""

import pytest

from tests.programs import prose


def faults_of(text, is_docstring=False):
    return [fault for fault, _ in prose.faults(prose.Prose(text, 1, is_docstring))]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("There are two tables, one of which is empty.", "of which"),
        ("A buffer is free when all are done with it.", "done with"),
        ("The copy was made in vain.", "in vain"),
        ("Lengths that cannot be give NaN.", "cannot be"),
        ("It raises for impossible lengths.", "impossible"),
        ("Rows of one rank follow those of another.", "those of"),
        ("The shape is that of `q`.", "that of"),
        ("It keeps only that which is needed.", "that which"),
        ("What is gathered goes into one buffer.", "What opens"),
        ("The buffer is large. What is gathered goes there.", "What opens"),
        ("A rank is told so.", "is told"),
        ("The time of what is sent counts too.", "what is"),
        ("It is faster than ours.", "ours"),
        ("Surplus programs leave at once.", "leave at once"),
        ("It knows nothing of layouts.", "knows nothing"),
        ("It takes 165 ms for 205.", "n for m"),
        (f"One {'very ' * prose.SENTENCE_WORDS}long sentence.", "long sentence"),
    ],
)
def test_a_fault_is_found_by_name(text, fault):
    assert faults_of(text) == [fault]


@pytest.mark.parametrize(
    "text",
    [
        "A file that cannot be read raises an error.",
        "Invalid lengths raise an error.",
        "It takes 165 ms instead of 205 ms, and 0.2 s for 10,000 documents.",
        "What is a segment? See the glossary.",
        "`those of` is code, and so is the target of [this link](for/what is.md).",
        'Write "invalid", not "in vain".',
        "The rank is told something else.",
    ],
)
def test_plain_english_has_no_fault(text):
    assert faults_of(text) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("Whether `x` is on a GPU.", "opening"),
        ("As `shard`, for one row.", "opening"),
        (f"Return {'`x` and ' * (prose.FIRST_WORDS // 2)}`y`.", "long first sentence"),
    ],
)
def test_the_first_sentence_of_a_docstring_has_rules_of_its_own(text, fault):
    assert faults_of(text, is_docstring=True) == [fault]
    assert faults_of(text) == []
    assert faults_of(f"Return `x`. {text}", is_docstring=True) == []


def test_findings_have_the_line_of_their_run_of_sentences(tmp_path, monkeypatch):
    monkeypatch.setattr(prose, "ROOT", tmp_path)
    source = tmp_path / "module.py"
    source.write_text(
        '"""Whether it runs.\n\nIt was in vain.\n\nArgs:\n    x: those of y.\n"""\n'
        "X = 1  # in vain\n# A comment that\n# was in\n# vain.\n\n\nclass A:\n    '''As B.'''\n\nNAME = 'in vain'\n"
    )
    found = [(finding.line, finding.fault) for finding in prose.measure(source)]
    assert found == [(1, "opening"), (3, "in vain"), (6, "those of"), (8, "in vain"), (9, "in vain"), (15, "opening")]
    page = tmp_path / "page.md"
    page.write_text(
        "# What is new\n\nA line\nin vain.\n\n```python\n# in vain\n```\n- in vain\n- fine\n\n| in vain | x |\n"
    )
    assert [finding.line for finding in prose.measure(page)] == [3, 9, 12]


def test_the_prose_of_the_project_has_no_findings(capsys):
    assert prose.main([]) == 0, capsys.readouterr().out


def test_findings_are_printed_and_fail(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prose, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text("Fine.\n\nIt was in vain.\n")
    assert prose.main([]) == 1
    assert "README.md:3: in vain: " in capsys.readouterr().out
    assert prose.main(["docs"]) == 0
