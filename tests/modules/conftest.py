"""Each kind of layer of `LAYERS` in turn: its name, the layer, and inputs for it."""

import pytest

from tests.modules.layers import LAYERS


@pytest.fixture(params=LAYERS)
def kind(request):
    return request.param


@pytest.fixture
def dense(kind):
    return LAYERS[kind][0]()


@pytest.fixture
def inputs(kind):
    return LAYERS[kind][1]()
