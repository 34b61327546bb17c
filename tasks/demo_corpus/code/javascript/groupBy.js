function groupBy(items, keyOf) {
  const groups = new Map();
  for (const item of items) {
    const key = keyOf(item);
    if (!groups.has(key)) {
      groups.set(key, []);
    }
    groups.get(key).push(item);
  }
  return groups;
}

const pets = [
  { name: 'Biscuit', kind: 'dog' },
  { name: 'Olive', kind: 'cat' },
  { name: 'Pepper', kind: 'dog' },
];

for (const [kind, list] of groupBy(pets, (pet) => pet.kind)) {
  console.log(`${kind}: ${list.map((pet) => pet.name).join(', ')}`);
}
