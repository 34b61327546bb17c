#include <stdio.h>
#include <stdlib.h>

static const int coins[] = { 50, 20, 10, 5, 2, 1 };

int main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "usage: %s CENTS\n", argv[0]);
        return 1;
    }

    int rest = atoi(argv[1]);
    for (size_t i = 0; i < sizeof coins / sizeof *coins; i++) {
        int count = rest / coins[i];
        if (count > 0)
            printf("%2d x %d\n", count, coins[i]);
        rest -= count * coins[i];
    }
    return 0;
}
