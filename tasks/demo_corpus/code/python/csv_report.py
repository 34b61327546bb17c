import csv
import io
from collections import defaultdict

DATA = """city,month,rain
Oslo,May,53
Porto,May,78
Oslo,June,65
Porto,June,36
"""


def rain_by_city(handle):
    totals = defaultdict(int)
    for row in csv.DictReader(handle):
        totals[row["city"]] += int(row["rain"])
    return dict(totals)


def main():
    report = rain_by_city(io.StringIO(DATA))
    for city in sorted(report):
        print(f"{city}: {report[city]} mm")


if __name__ == "__main__":
    main()
