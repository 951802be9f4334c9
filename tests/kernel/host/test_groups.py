"""Groups of ranks."""

from __future__ import annotations

from typing import Any

import pytest

from megaproof.kernel import api
from megaproof.kernel.host.sizes import ConfigError


@pytest.mark.parametrize("size", [0, 9, 2.0, True, "2"], ids=repr)
def test_virtual_groups_have_one_to_eight_ranks(size: Any) -> None:
    assert [api.VirtualGroup(size).size for size in (1, 8)] == [1, 8]
    with pytest.raises(ConfigError, match=r"VirtualGroup size = .* must be an int( in \[1, 8\])?$"):
        api.VirtualGroup(size)
