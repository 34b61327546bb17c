export type Result<T, E = string> =
  | { ok: true; value: T }
  | { ok: false; error: E };

export function parseAge(input: string): Result<number> {
  const age = Number(input.trim());
  if (!Number.isInteger(age)) {
    return { ok: false, error: `"${input}" is not a whole number` };
  }
  if (age < 0 || age > 130) {
    return { ok: false, error: `${age} is out of range` };
  }
  return { ok: true, value: age };
}

for (const input of ['42', 'many', '-3']) {
  const result = parseAge(input);
  console.log(result.ok ? result.value : result.error);
}
