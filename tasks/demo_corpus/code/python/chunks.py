from itertools import islice


def chunks(items, size):
    """Split any iterable into lists of at most size items."""
    iterator = iter(items)
    while True:
        part = list(islice(iterator, size))
        if not part:
            return
        yield part


def columns(names, per_row=3, width=10):
    rows = []
    for row in chunks(names, per_row):
        rows.append("".join(name.ljust(width) for name in row).rstrip())
    return "\n".join(rows)


print(columns(["plum", "pear", "fig", "cherry", "quince"]))
