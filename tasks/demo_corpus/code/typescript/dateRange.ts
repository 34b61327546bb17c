const DAY = 24 * 60 * 60 * 1000;

export function* dateRange(from: Date, to: Date, step = 1): Generator<Date> {
  for (let time = from.getTime(); time <= to.getTime(); time += step * DAY) {
    yield new Date(time);
  }
}

export function isWeekend(date: Date): boolean {
  return date.getUTCDay() % 6 === 0;
}

const from = new Date('2024-06-28T00:00:00Z');
const to = new Date('2024-07-03T00:00:00Z');

for (const date of dateRange(from, to)) {
  const label = date.toISOString().slice(0, 10);
  console.log(label, isWeekend(date) ? 'rest' : 'work');
}
