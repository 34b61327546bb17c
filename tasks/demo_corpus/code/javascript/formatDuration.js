const UNITS = [
  ['day', 86400],
  ['hour', 3600],
  ['minute', 60],
  ['second', 1],
];

function formatDuration(seconds) {
  const parts = [];
  let rest = Math.floor(seconds);

  for (const [name, size] of UNITS) {
    const amount = Math.floor(rest / size);
    rest %= size;
    if (amount > 0) {
      parts.push(`${amount} ${name}${amount === 1 ? '' : 's'}`);
    }
  }

  return parts.join(', ') || 'no time';
}

console.log(formatDuration(3725));
console.log(formatDuration(0));
