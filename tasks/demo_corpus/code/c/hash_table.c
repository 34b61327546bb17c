#include <string.h>

#define SLOTS 64

struct table {
    const char *keys[SLOTS];
    int values[SLOTS];
};

static unsigned slot_of(const struct table *t, const char *key)
{
    unsigned h = 17;
    for (const char *p = key; *p; p++)
        h = h * 31 + (unsigned char)*p;
    h %= SLOTS;
    /* Linear probing: step on while another key sits here. */
    while (t->keys[h] && strcmp(t->keys[h], key) != 0)
        h = (h + 1) % SLOTS;
    return h;
}

void table_set(struct table *t, const char *key, int value)
{
    unsigned s = slot_of(t, key);
    t->keys[s] = key;
    t->values[s] = value;
}
