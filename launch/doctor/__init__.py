"""The doctor: every reason why a run would fail, before anything of it starts."""
