#include <stdint.h>
#include <stdio.h>

static int count_ones(uint32_t x)
{
    int count = 0;
    while (x != 0) {
        x &= x - 1; /* clears the lowest set bit */
        count++;
    }
    return count;
}

static void print_binary(uint8_t x)
{
    for (int bit = 7; bit >= 0; bit--)
        putchar((x >> bit) & 1 ? '1' : '0');
}

int main(void)
{
    for (uint8_t n = 0; n < 8; n++) {
        print_binary(n);
        printf("  %d\n", count_ones(n));
    }
    return 0;
}
