"""Old address, deleted at the end."""

COLOURS: dict[str, str] = {
    "initializing": "#999999",
    "deduction": "#0072B2",
    "adding-knowledge": "#009E73",
    "example-testing": "#E69F00",
    "uncertainty-estimation": "#CC79A7",
    "backtracking": "#D55E00",
}
OTHER = "#555555"


def __getattr__(name: str):  # not imported above: labels, below it, imports this module
    if name.startswith("__"):
        raise AttributeError(name)
    from stllms.plotting import text

    return getattr(text, name)
