"""How long to wait for the next try of what fails again and again."""


def doubled(first: float, failures: int, most: float) -> float:
    """Seconds: *first* after one failure, twice as long after each further one in a row, *most* in the end."""
    return min(first * 2.0 ** min(max(failures - 1, 0), 30), most)  # the exponent's bound is for the float
