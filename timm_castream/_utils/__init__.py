"""Checks of arguments and files written whole."""
