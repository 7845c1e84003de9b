"""Settings as command line arguments."""

from __future__ import annotations

from lavic.config.cli_args import to_args


def test_settings_become_command_line_arguments():
    values = {"a_b": {"c": 1, "d": True, "e": False}, "f": ["x y", "$(z)"], "g": None, "h": {"i": [[1, "a"]]}}
    args = ["--a-b.c", "1", "--a-b.d", "--a-b.no-e", "--f", "x y", "$(z)", "--g", "None", "--h.i", '[1, "a"]']
    assert list(to_args(values)) == args
