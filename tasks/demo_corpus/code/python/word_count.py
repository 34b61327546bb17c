"""Count how often each word appears in a text."""

import re
from collections import Counter

SAMPLE = "Rain in the morning, sun at noon, and rain again in the evening."


def words(text):
    return re.findall(r"[a-z']+", text.lower())


def most_common(text, limit=3):
    return Counter(words(text)).most_common(limit)


if __name__ == "__main__":
    for word, count in most_common(SAMPLE):
        print(f"{word:<10}{count:>3}")
