// Copy only some of the properties of an object.
export function pick<T extends object, K extends keyof T>(source: T, ...keys: K[]): Pick<T, K> {
  const result = {} as Pick<T, K>;
  for (const key of keys) {
    result[key] = source[key];
  }
  return result;
}

interface Person {
  name: string;
  email: string;
  birthYear: number;
}

const person: Person = {
  name: 'Yara',
  email: 'yara@example.org',
  birthYear: 1991,
};

const card = pick(person, 'name', 'email');
console.log(`${card.name} <${card.email}>`);
