type Colour = 'red' | 'green' | 'yellow';

const next: Record<Colour, Colour> = {
  red: 'green',
  green: 'yellow',
  yellow: 'red',
};

const seconds: Record<Colour, number> = { red: 30, green: 25, yellow: 5 };

function colourAt(time: number, start: Colour = 'red'): Colour {
  let colour = start;
  let rest = time % 60; // one full cycle takes a minute
  while (rest >= seconds[colour]) {
    rest -= seconds[colour];
    colour = next[colour];
  }
  return colour;
}

console.log([0, 31, 58].map((time) => colourAt(time)));
