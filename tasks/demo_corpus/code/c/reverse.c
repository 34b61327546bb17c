#include <stdio.h>
#include <string.h>

/* Reverse a string in place. */
static void reverse(char *text)
{
    size_t length = strlen(text);

    for (size_t i = 0; i < length / 2; i++) {
        char saved = text[i];
        text[i] = text[length - 1 - i];
        text[length - 1 - i] = saved;
    }
}

int main(void)
{
    char words[][16] = { "lantern", "window", "kayak" };

    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++) {
        reverse(words[i]);
        puts(words[i]);
    }
    return 0;
}
