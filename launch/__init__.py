"""The launch room: where a recipe is run. Command line, launchers, quickstart."""
