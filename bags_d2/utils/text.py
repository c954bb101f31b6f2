"""Text of any origin, made fit to be shown."""


def printable(text: str) -> str:
    """One line without control characters, lone surrogates or marks that reverse the direction."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
