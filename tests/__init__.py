"""Tests of model, lora, data, train, the device and the imports; and what all tests share."""

import pytest

pytest.register_assert_rewrite("tests.helpers")
