const scores = [
  { player: 'Nora', points: 41 },
  { player: 'Emil', points: 57 },
  { player: 'Tariq', points: 41 },
  { player: 'Lou', points: 12 },
];

// Players with equal points share the same rank.
function rank(entries) {
  const sorted = [...entries].sort(
    (a, b) => b.points - a.points || a.player.localeCompare(b.player),
  );
  return sorted.map((entry) => ({
    ...entry,
    rank: sorted.findIndex((other) => other.points === entry.points) + 1,
  }));
}

console.table(rank(scores));
