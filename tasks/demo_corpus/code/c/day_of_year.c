#include <stdbool.h>
#include <stdio.h>

static bool is_leap(int year)
{
    return (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
}

static int day_of_year(int year, int month, int day)
{
    static const int days[] = { 31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30 };

    for (int m = 1; m < month; m++)
        day += days[m - 1];
    if (month > 2 && is_leap(year))
        day++;
    return day;
}

int main(void)
{
    printf("%d\n", day_of_year(2024, 3, 1));
    printf("%d\n", day_of_year(2023, 12, 31));
    return 0;
}
