"""Text of any origin."""

from bags_d2.utils.text import printable


def test_printable_is_one_line_of_what_can_be_shown():
    assert printable("a\n\tb\x00c\ud800d") == "a b c d"
    assert printable("\u202egnp.exe") == "gnp.exe"  # no mark that reverses the direction
    assert printable("שלום 漢字 ähre $x$ <b>") == "שלום 漢字 ähre $x$ <b>"
    assert printable("\udcff") == ""
