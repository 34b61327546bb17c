#include <stdio.h>

#define ROWS 2
#define COLS 3

static void transpose(int in[ROWS][COLS], int out[COLS][ROWS])
{
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < COLS; c++)
            out[c][r] = in[r][c];
}

int main(void)
{
    int table[ROWS][COLS] = { { 1, 2, 3 }, { 4, 5, 6 } };
    int turned[COLS][ROWS];

    transpose(table, turned);
    for (int r = 0; r < COLS; r++) {
        for (int c = 0; c < ROWS; c++)
            printf("%3d", turned[r][c]);
        putchar('\n');
    }
    return 0;
}
