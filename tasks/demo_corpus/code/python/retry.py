import functools
import time


def retry(times, delay=0.1, errors=(OSError,)):
    """Decorator that calls a function again when it fails."""

    def wrap(func):
        @functools.wraps(func)
        def inner(*args, **kwargs):
            for attempt in range(1, times + 1):
                try:
                    return func(*args, **kwargs)
                except errors:
                    if attempt == times:
                        raise
                    time.sleep(delay * attempt)

        return inner

    return wrap


@retry(times=3)
def read_note(path):
    with open(path, encoding="utf-8") as handle:
        return handle.read()
