"""Services that a test needs and a machine may not have."""

import os

import pytest


def require(available: bool, what: str) -> None:
    """Skips the test where `what` cannot be had; fails it where everything is demanded, as in CI."""
    if available:
        return
    if os.environ.get("FUSION_REQUIRE_SERVICES") == "1":
        pytest.fail(f"{what} is missing, and FUSION_REQUIRE_SERVICES demands it")
    pytest.skip(f"left out: {what} is missing")
