"""What a run ends with when something that must hold does not."""


class Failure(Exception):  # noqa: N818  # it is the world's verdict, not an error of the simulator
    """One sentence about what went wrong."""
