#include <assert.h>
#include <stddef.h>

void insertion_sort(int *items, size_t count)
{
    for (size_t i = 1; i < count; i++) {
        int current = items[i];
        size_t j = i;

        /* Move larger items one place to the right. */
        while (j > 0 && items[j - 1] > current) {
            items[j] = items[j - 1];
            j--;
        }
        items[j] = current;
    }
}

int main(void)
{
    int ages[] = { 34, 8, 61, 19, 45 };

    insertion_sort(ages, 5);
    assert(ages[0] == 8 && ages[4] == 61);
    return 0;
}
