import pytest

from pyprune.methods.method import PruneMode, check_mode


def test_check_mode_takes_members_and_strings():
    for name in ("UNSTRUCTURED_MAGNITUDE_LOCAL", "unstructured_magnitude_local"):
        assert check_mode(name) is PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL
    mode = PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL
    assert check_mode(mode) is mode


def test_check_mode_says_what_is_allowed():
    with pytest.raises(ValueError, match="allowed are UNSTRUCTURED_MAGNITUDE_LOCAL, "):
        check_mode("MAGNITUDE")
    with pytest.raises(TypeError, match="PruneMode or its name"):
        check_mode(3)
