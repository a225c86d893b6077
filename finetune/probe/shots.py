"""The option --shots of frozen evaluations; apart, since a command's --help loads no torch."""


def numbers(text: str) -> list[int]:
    """Parse `1,5,10`: one word, because the words behind it may be the recipe's."""
    found = [int(number) for number in text.split(",")]
    if min(found) < 1:
        raise ValueError("at least one video a class")
    return found
