"""Tests of what no single room owns."""
