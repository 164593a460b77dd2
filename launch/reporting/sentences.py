"""Numbers as a reader sees them in a report."""


def short(value: float) -> str:
    """A figure such as a perplexity, with two decimals below 1,000."""
    return f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def percent(share: float) -> str:
    """A share in percent, with a decimal below 10 %."""
    return f"{100 * share:.0f}%" if abs(share) >= 0.095 else f"{100 * share:.1f}%"


def change_text(before: float, after: float) -> str:
    """The relative change between two numbers, in percent with its sign."""
    change = after / before - 1
    if abs(change) < 0.0005:
        return "unchanged"
    return ("+" if change > 0 else "−") + percent(abs(change))


def bytes_text(count: float) -> str:
    """Return a number of bytes in the largest binary unit that it fills, e.g. `1.5 MiB`."""
    for unit in ("bytes", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:,.4g} {unit}"
        count /= 1024
    return f"{count:,.4g} GiB"
