"""The ``normzoo`` command."""
