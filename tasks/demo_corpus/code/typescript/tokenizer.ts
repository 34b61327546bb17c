type Token =
  | { kind: 'number'; value: number }
  | { kind: 'symbol'; value: string };

export function tokenize(source: string): Token[] {
  const tokens: Token[] = [];
  const pattern = /\s*(?:(\d+(?:\.\d+)?)|([-+*/()]))/y;

  while (pattern.lastIndex < source.length) {
    const position = pattern.lastIndex;
    const match = pattern.exec(source);
    if (!match) {
      throw new SyntaxError(`unexpected input at ${position}`);
    }
    tokens.push(
      match[1] !== undefined
        ? { kind: 'number', value: Number(match[1]) }
        : { kind: 'symbol', value: match[2] },
    );
  }

  return tokens;
}
