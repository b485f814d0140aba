"""What a checkpoint says about itself is read from its files, resolved once and written back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalm_min.settings import check_template, fill_template


@given(st.text(), st.text(), st.text(min_size=1))
def test_braces_of_users_are_plain_text(before, after, instruction):
    """A template has one field; whatever else stands in it or in the instruction is kept."""
    assert fill_template(f"{before}{{instruction}}{after}", instruction) == (
        before + instruction + after
    )
    assert not fill_template(f"{before}{{instruction}}{after}", "")


@pytest.mark.parametrize("template", ["", "{}", "{instruction }", "{instruction}" * 2])
def test_a_template_without_its_field_is_refused(template):
    """One sentence when it is read, not a KeyError in the middle of a run."""
    with pytest.raises(
        ValueError, match=r"expected \{instruction\} in it once, found it [02] times"
    ):
        check_template(template)
    assert check_template("Instruct: {instruction}\nQuery: {query} {") is not None
