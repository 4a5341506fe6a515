"""The tests notice when a formula is broken: see tests/mutations.py."""

import pytest

from tests import mutations


@pytest.mark.slow
def test_every_mutation_is_killed():
    assert mutations.main([]) == 0


def test_every_mutation_applies_once():
    for mutation in mutations.MUTATIONS:
        assert (mutations.ROOT / "hopjax" / f"{mutation.module}.py").read_text().count(mutation.old) == 1, mutation.what
        file, test = mutation.test.split("::")
        assert f"def {test}(" in (mutations.ROOT / "tests" / "hopjax" / file).read_text(), mutation.what


def test_mutations_can_be_listed(capsys):
    assert mutations.main(["--list", "onset"]) == 0
    assert capsys.readouterr().out.count("\n") == sum("onset" in mutation.what for mutation in mutations.MUTATIONS)
