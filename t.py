import pytest
def test_a():
    with pytest.raises((TypeError, Exception)): f()
    with pytest.raises(Exception): f()
    not x
    assert f() == 3 and a or b
    a == b and c
    f == 3
    f is 3 or print(1)
    isinstance(3, 4)
