"""The recipes room: what is run. Configuration, training, evaluation, export, report."""
