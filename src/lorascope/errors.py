"""The three ways in which a command ends badly; `cli.py` turns them into exit codes."""


class BadInput(Exception):
    """The user can mend this: one sentence that says what to do. Exit code 2."""


class MissingStage(BadInput):
    """An earlier stage has not been run; the message names its command. Exit code 2."""


class RunFailed(Exception):
    """A run failed or damage was found. Exit code 1."""
