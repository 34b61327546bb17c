from datetime import date, timedelta


def next_weekday(start, weekday):
    """The first date after start that falls on weekday (Monday is 0)."""
    ahead = (weekday - start.weekday() - 1) % 7 + 1
    return start + timedelta(days=ahead)


def working_days(first, last):
    day = first
    while day <= last:
        if day.weekday() < 5:
            yield day
        day += timedelta(days=1)


if __name__ == "__main__":
    today = date(2024, 5, 15)
    print(next_weekday(today, 0))
    print(len(list(working_days(today, date(2024, 5, 31)))))
