import sys

import pytest

from dyhead.necks import NECKS


@pytest.fixture(autouse=True)
def necks_of_this_project_alone():
    """What a study's modules register is gone after a test."""
    before = dict(NECKS)
    yield
    NECKS.clear()
    NECKS.update(before)
    sys.modules.pop("benchmarks.variants", None)
