"""What a person sees of a mistake."""

import pytest

from flame.errors import LONGEST_LINE, UserError, report


def test_an_error_is_one_printable_line_of_bounded_length(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report(UserError("file a\x1b[31m\nb" + "x" * 10_000 + " is damaged"))
    said = capsys.readouterr().err
    assert said.startswith("slimstate: error: file a?[31m b") and said.endswith(" is damaged\n")
    assert said[:-1].isprintable() and len(said) < LONGEST_LINE + 50
