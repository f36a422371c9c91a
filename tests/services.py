"""Skips tests that need a service which this machine does not have."""

import os

import pytest


def require(available: bool, what: str) -> None:
    """Skips the test if a service is not available; with FUSION_REQUIRE_SERVICES=1, as in CI, fails it instead."""
    if available:
        return
    if os.environ.get("FUSION_REQUIRE_SERVICES") == "1":
        pytest.fail(f"{what} is missing, and FUSION_REQUIRE_SERVICES=1 requires it")
    pytest.skip(f"{what} is missing")
