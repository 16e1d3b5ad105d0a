import pytest

from pyprune import ops
from pyprune.runtime import accelerate as whole
from pyprune.runtime import measure
from pyprune.runtime.timing import in_turns


@pytest.fixture
def times(monkeypatch):
    """Times that are told: of a layout, of the whole model ("sparse"); 1 of what is dense."""
    told = dict.fromkeys(("sparse", *ops.SPARSE_LAYOUTS), 0.5)

    def instead(ways, *, seconds, **options):
        measured = in_turns(ways, seconds=0, least=2, **options)
        return {way: [told.get(way, 1.0)] * len(samples) for way, samples in measured.items()}

    monkeypatch.setattr(measure, "in_turns", instead)
    monkeypatch.setattr(whole, "in_turns", instead)
    return told
