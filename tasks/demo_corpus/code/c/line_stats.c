#include <ctype.h>
#include <stdio.h>

/* Count the lines, words and characters of standard input. */
int main(void)
{
    long lines = 0, words = 0, chars = 0;
    int inside_word = 0;
    int c;

    while ((c = getchar()) != EOF) {
        chars++;
        if (c == '\n')
            lines++;
        if (isspace(c)) {
            inside_word = 0;
        } else if (!inside_word) {
            inside_word = 1;
            words++;
        }
    }

    printf("lines %ld, words %ld, chars %ld\n", lines, words, chars);
    return 0;
}
